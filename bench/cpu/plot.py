"""The roofline as a picture: the machine's limits as lines, and a point for each engine and workload.

matplotlib (`pip install matplotlib`, the extra `bench`) is imported when a picture is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu import limits
from bench.cpu.ceilings import Ceilings
from bench.cpu.results import Figure, Key
from bench.cpu.workloads import Workload

COLOURS = {"quire": "#1b6ca8", "vllm": "#d9822b", "llama.cpp": "#5b8c3e"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
UNITS = ("f32", "bf16", "int8")


@dataclass(frozen=True, slots=True)
class Point:
    """Operations for each byte read, and operations per second."""

    workload: str
    engine: str
    intensity: float
    rate: float


def points_of(workloads: Iterable[Workload], figures: dict[Key, Figure]) -> list[Point]:
    """A point for each figure of speed; work is counted as an ideal engine would do it with the engine's own weights."""
    found = []
    for workload in workloads:
        for (name, engine, variant), figure in figures.items():
            work = limits.work_of(workload, variant) if name == workload.name else None
            if work is not None and figure.value:
                seconds = limits.seconds_of(workload, figure.value)
                found.append(Point(name, engine, work.operations / work.bytes, work.operations / seconds))
    return found


def draw(points: list[Point], ceilings: Ceilings, machine: str, path: Path) -> None:
    """Write the picture. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5), layout="constrained")
    draw_limits(axes, points, ceilings)
    names = list(dict.fromkeys(point.workload for point in points))
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(names)}
    for point in points:
        axes.plot(
            *(point.intensity, point.rate / 1e9),
            marker=markers[point.workload],
            color=COLOURS[point.engine],
            markersize=8,
            linestyle="none",
            alpha=0.85,
        )
    handles = [axes.plot([], [], "o", color=colour, label=engine)[0] for engine, colour in COLOURS.items()]
    handles += [axes.plot([], [], marker, color="grey", label=name)[0] for name, marker in markers.items()]
    axes.legend(handles=handles, fontsize=8, loc="lower right", ncols=2)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte read",
        ylabel="billion operations per second",
        title=f"{machine}\nread {ceilings.read / 1e9:.1f} GB/s on {ceilings.threads} threads",
    )
    axes.title.set_fontsize(10)
    axes.grid(True, which="both", alpha=0.2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_limits(axes: Any, points: list[Point], ceilings: Ceilings) -> None:
    """The slope of the read bandwidth, and a level for each unit of arithmetic."""
    left = min((point.intensity for point in points), default=1.0) / 2
    right = max((point.intensity for point in points), default=1000.0) * 2
    levels: dict[float, list[str]] = {}
    for unit in UNITS:
        levels.setdefault(float(f"{ceilings.rate(unit):.2g}"), []).append(
            unit
        )  # units that are equally fast share a line
    for units in levels.values():
        rate = ceilings.rate(units[0])
        corner = rate / ceilings.read
        axes.plot([corner, max(right, corner)], [rate / 1e9] * 2, color="black", linewidth=1)
        axes.annotate(", ".join(units), (max(right, corner), rate / 1e9), fontsize=8, ha="right", va="bottom")
    top = max(ceilings.rate(unit) for unit in UNITS) / ceilings.read
    axes.plot([left, top], [left * ceilings.read / 1e9, top * ceilings.read / 1e9], color="black", linewidth=1)

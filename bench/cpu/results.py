"""What came out: records of single runs, the figure of each engine, and whether quire reached what it must.

Pure: no engine, no clock, no file.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.cpu import limits
from bench.cpu.ceilings import Ceilings, mean
from bench.cpu.workloads import CACHE_BYTES, ENGINES, PERPLEXITY, SPARE_BYTES, VARIANTS, Workload, weight_count

Key = tuple[str, str, str]  # workload, engine, variant


@dataclass(frozen=True, slots=True)
class Record:
    """One run of one workload by one engine. A run that failed has a reason in the place of a value."""

    workload: str
    engine: str
    variant: str
    round: int
    attempt: int
    value: float | None = None
    samples: tuple[float, ...] = ()
    peak: int = 0
    others: float = 0.0  # cores that other processes used meanwhile
    difference: float = 0.0  # of the ceilings before and after
    disturbed: str | None = None
    failed: str | None = None
    ceilings: Ceilings | None = None  # the mean of before and after
    details: dict[str, Any] = field(default_factory=dict)
    at: str = ""  # when, UTC
    commit: str = ""  # which version of quire the benchmark was of


@dataclass(frozen=True, slots=True)
class Figure:
    """An engine's result for a workload, over all rounds: the median of its quiet runs."""

    variant: str
    value: float | None
    runs: int = 0
    spread: float = 0.0  # (largest - smallest) / median
    disturbed: bool = False  # no run was quiet; the value is the median of the disturbed ones
    failed: str | None = None
    ceilings: Ceilings | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """One condition of an aim: what it asks for, what there is, and whether that is enough (None: cannot be said)."""

    asks: str
    found: str
    reached: bool | None


@dataclass(frozen=True, slots=True)
class Row:
    """A workload with all figures and the verdict."""

    workload: Workload
    ours: Figure | None
    others: dict[str, Figure]  # the best variant of each engine
    more: tuple[Figure, ...]  # quire's other variants
    ratio: float | None  # quire by the best peer, whichever that is
    ceiling: float | None  # share of the machine's limit that quire reached
    parts: tuple[Part, ...]

    @property
    def verdict(self) -> str:
        peers = [self.others[engine] for engine in self.workload.aim.peers if engine in self.others]
        needed = peers if self.workload.aim.ratio is not None else []
        if any(figure.disturbed for figure in (self.ours, *needed) if figure is not None):
            return "disturbed"
        found = [part.reached for part in self.parts]
        if not found or None in found and False not in found:
            return "-"
        return "reached" if all(found) else "not reached"


def figures_of(records: Iterable[Record]) -> dict[Key, Figure]:
    """The figure of each workload, engine and variant."""
    grouped: dict[Key, list[Record]] = {}
    for record in records:
        grouped.setdefault((record.workload, record.engine, record.variant), []).append(record)
    return {key: figure_of(key[2], found) for key, found in grouped.items()}


def figure_of(variant: str, records: list[Record]) -> Figure:
    """The median of the quiet runs; of all when none was quiet; a failure only where nothing was measured."""
    measured = [record for record in records if record.value is not None]
    if not measured:
        return Figure(variant, None, failed=records[-1].failed or "not run")
    quiet = [record for record in measured if record.disturbed is None]
    counted = quiet or measured
    values = [record.value for record in counted if record.value is not None]
    middle = statistics.median(values)
    nearest = min(counted, key=lambda record: abs((record.value or 0.0) - middle))
    return Figure(
        variant,
        middle,
        runs=len(values),
        spread=(max(values) - min(values)) / middle,
        disturbed=not quiet,
        ceilings=ceilings_of(counted),
        details=nearest.details,
    )


def ceilings_of(records: Iterable[Record]) -> Ceilings | None:
    """The limits that the machine had during these runs."""
    found = [record.ceilings for record in records if record.ceilings is not None]
    return mean(found) if found else None


def best_of(figures: Iterable[Figure], more_is_better: bool) -> Figure | None:
    """The best figure that has a value; a failure when none has; None when there is none at all."""
    listed = list(figures)
    measured = [figure for figure in listed if figure.value is not None]
    if measured:
        choose = max if more_is_better else min
        return choose(measured, key=lambda figure: figure.value or 0.0)
    return listed[0] if listed else None


def row_of(workload: Workload, figures: dict[Key, Figure]) -> Row:
    """All that the table shows of a workload."""
    found: dict[str, list[Figure]] = {name: [] for name in ENGINES}
    for (name, engine, _), figure in figures.items():
        if name == workload.name:
            found[engine].append(figure)
    first = VARIANTS["quire", workload.precision][0]
    ours = next((figure for figure in found["quire"] if figure.variant == first), None)
    more = tuple(figure for figure in found["quire"] if figure.variant != first)
    others = {
        engine: best for engine in ENGINES[1:] if (best := best_of(found[engine], workload.more_is_better)) is not None
    }
    peer = best_of(others.values(), workload.more_is_better)
    ratio = None
    if ours is not None and ours.value and peer is not None and peer.value:
        ratio = ours.value / peer.value
    parts = tuple(judge(workload, ours, others, more, figures)) if ours is not None and ours.value else ()
    return Row(workload, ours, others, more, ratio, share_of_limit(workload, ours), parts)


def share_of_limit(workload: Workload, figure: Figure | None) -> float | None:
    """How much of what the machine allows was reached, 1 being all."""
    if figure is None or not figure.value or figure.ceilings is None:
        return None
    best = limits.best_seconds(workload, figure.variant, figure.ceilings)
    return None if best is None else best / limits.seconds_of(workload, figure.value)


def judge(
    workload: Workload,
    ours: Figure,
    others: dict[str, Figure],
    more: tuple[Figure, ...],
    figures: dict[Key, Figure],
) -> Iterable[Part]:
    """Each condition of the workload's aim."""
    aim = workload.aim
    value = ours.value or 0.0
    if aim.ratio is not None:
        yield against_peers(workload, value, others)
    if aim.bandwidth is not None:
        work = limits.work_of(workload, ours.variant)
        share = None
        if work is not None and ours.ceilings is not None:
            share = work.bytes / limits.seconds_of(workload, value) / ours.ceilings.read
        text = "-" if share is None else f"{share:.0%} of bandwidth"
        yield Part(f">= {aim.bandwidth:.0%} of bandwidth", text, None if share is None else share >= aim.bandwidth)
    if aim.most is not None:
        yield Part(f"<= {aim.most:g} {workload.unit}", f"{value:.2f} {workload.unit}", value <= aim.most)
    if aim.packages is not None:
        count = ours.details.get("packages")
        yield Part(f"< {aim.packages} packages", f"{count} packages", None if count is None else count < aim.packages)
    if workload.kind == "memory":
        most = (2 * sum(weight_count(workload.shape)) + CACHE_BYTES + SPARE_BYTES) / 1e9
        yield Part(f"<= {most:.1f} GB", f"{value:.1f} GB", value <= most)
    if workload.kind == "perplexity":
        yield from against_bf16((ours, *more), figures)


def against_peers(workload: Workload, value: float, others: dict[str, Figure]) -> Part:
    """The ratio to the best of the peers that the aim names."""
    aim = workload.aim
    assert aim.ratio is not None
    sign = ">=" if workload.more_is_better else "<="
    asks = f"{sign} {aim.ratio:g} x {'best' if len(aim.peers) > 1 else aim.peers[0]}"
    named = [figure for engine, figure in others.items() if engine in aim.peers]
    peer = best_of(named, workload.more_is_better)
    if peer is None or not peer.value:
        return Part(asks, "no peer", None)
    ratio = value / peer.value
    return Part(asks, f"{ratio:.2f} x", ratio >= aim.ratio if workload.more_is_better else ratio <= aim.ratio)


def against_bf16(ours: tuple[Figure, ...], figures: dict[Key, Figure]) -> Iterable[Part]:
    """How much the perplexity grows by quantization."""
    plain = figures.get(("perplexity-bf16", "quire", "bf16"))
    for figure in ours:
        most = PERPLEXITY.get(figure.variant)
        if most is None or figure.value is None:
            continue
        if plain is None or plain.value is None:
            yield Part(f"<= +{most:.0%}", "bf16 not measured", None)
        else:
            growth = figure.value / plain.value - 1
            yield Part(f"{figure.variant} <= +{most:.0%}", f"{growth:+.1%}", growth <= most)

"""The results as a table, for the terminal and for Markdown. Pure: rows in, text out."""

from __future__ import annotations

from collections.abc import Sequence

from bench.cpu.ceilings import Ceilings
from bench.cpu.results import Figure, Record, Row
from bench.cpu.workloads import ENGINES

TITLES = ("workload", "unit", *ENGINES, "quire / best", "of the limit", "must reach", "is", "verdict")


def show(figure: Figure | None, only_variant: bool) -> str:
    """A cell: the value, how it was stored where that is a choice, and a mark for disturbed runs."""
    if figure is None:
        return "-"
    if figure.value is None:
        return "failed"
    value = f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.3g}"
    name = "" if only_variant else f" {figure.variant}"
    return f"{value}{name}{' (disturbed)' if figure.disturbed else ''}"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    ours = show(row.ours, True)
    for figure in row.more:
        ours += f"; {show(figure, False)}"
    return (
        row.workload.title,
        row.workload.unit,
        ours,
        *(show(row.others.get(engine), False) for engine in ENGINES[1:]),
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        "-" if row.ceiling is None else f"{row.ceiling:.0%}",
        ", ".join(part.asks for part in row.parts) or "-",
        ", ".join(part.found for part in row.parts) or "-",
        row.verdict,
    )


def as_text(rows: Sequence[Row]) -> str:
    """Columns padded with spaces."""
    lines = [TITLES, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(TITLES))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(line.rstrip() for line in [padded[0], "-" * len(padded[0].rstrip()), *padded[1:]])


def as_markdown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [TITLES, tuple("---" for _ in TITLES), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def failures(rows: Sequence[Row]) -> list[str]:
    """One line for each engine that failed, with its reason."""
    found = []
    for row in rows:
        figures = {"quire": row.ours, **row.others}
        for engine, figure in figures.items():
            if figure is not None and figure.value is None:
                found.append(f"{row.workload.name}, {engine} {figure.variant}: failed: {figure.failed}")
    return found


def thrown_away(records: Sequence[Record]) -> list[str]:
    """One line for each run that did not count because it was disturbed."""
    return [
        f"{record.workload}, {record.engine} {record.variant}, round {record.round + 1}: {record.disturbed}"
        for record in records
        if record.disturbed is not None
    ]


def describe(ceilings: Ceilings) -> str:
    """The machine's limits in one line."""
    return (
        f"read {ceilings.read / 1e9:.1f} GB/s; float32 {ceilings.f32 / 1e9:,.0f}, bf16 {ceilings.bf16 / 1e9:,.0f} "
        f"({ceilings.bf16_unit}), int8 {ceilings.int8 / 1e9:,.0f} ({ceilings.int8_unit}) GOP/s; {ceilings.threads} threads"
    )

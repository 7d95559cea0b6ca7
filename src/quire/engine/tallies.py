"""Tallies: counters of several processes as plain lists of numbers under names, which add up. Knows no metric."""

from __future__ import annotations

from collections.abc import Iterable

Tallies = dict[str, list[float]]


def total(several: Iterable[Tallies]) -> Tallies:
    """The sum, name by name and place by place."""
    found: Tallies = {}
    for tallies in several:
        for name, numbers in tallies.items():
            before = found.get(name)
            found[name] = list(numbers) if before is None else [a + b for a, b in zip(before, numbers, strict=True)]
    return found

"""Metrics as plain objects, for programs that run the engine themselves and have no Prometheus to ask.

Reads what a collector shows; counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class Counter:
    """A number that only grows. The name comes without Prometheus' ending `_total`."""

    name: str
    labels: dict[str, str]
    value: int


@dataclass(frozen=True, slots=True)
class Gauge:
    """A number of this moment."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(slots=True)
class Histogram:
    """How many values were at most each bound, by the bound as text; `+Inf` counts all."""

    name: str
    labels: dict[str, str]
    count: int = 0
    sum: float = 0.0
    buckets: dict[str, int] = field(default_factory=dict)


def read_metrics(families: Iterable[Metric]) -> list[Counter | Gauge | Histogram]:
    """One object per metric and set of labels, in the order of the families."""
    found: list[Counter | Gauge | Histogram] = []
    for family in families:
        if family.type == "histogram":
            found.extend(_histograms(family))
            continue
        for sample in family.samples:
            if family.type == "counter":
                if sample.name.endswith("_total"):  # the other sample says when counting began
                    found.append(Counter(family.name, dict(sample.labels), int(sample.value)))
            else:
                found.append(Gauge(sample.name, dict(sample.labels), float(sample.value)))
    return found


def _histograms(family: Metric) -> list[Histogram]:
    by_labels: dict[tuple[tuple[str, str], ...], Histogram] = {}
    for sample in family.samples:
        labels = {key: value for key, value in sample.labels.items() if key != "le"}
        found = by_labels.setdefault(tuple(sorted(labels.items())), Histogram(family.name, labels))
        if sample.name.endswith("_bucket"):
            found.buckets[sample.labels["le"]] = int(sample.value)
        elif sample.name.endswith("_count"):
            found.count = int(sample.value)
        elif sample.name.endswith("_sum"):
            found.sum = float(sample.value)
    return list(by_labels.values())

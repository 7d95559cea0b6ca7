"""Bytes: what a page costs, how many pages fit, and which groups of pages a model gets. Arithmetic only.

`quire plan` and the engine share these functions, so that what was predicted is what is allocated. Knows layouts and
sizes; reads no file and asks no device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from quire.core.plan import GroupSpec
from quire.errors import ConfigError
from quire.layers.spec import LayerSpec, ModelLayout

# bytes of one page of one layer: (page_size, kv_heads, key_dim, value_dim, dtype, shared) -> int, as kernels have it
CacheBytes = Callable[[int, int, int, int, torch.dtype, bool], int]

NULL_PAGES = 1  # page 0 of each group stands for "nothing here"
SNAPSHOT_SHARE = 0.5  # state pages kept beside the running ones, so that prompts that begin alike find their state


@dataclass(frozen=True, slots=True)
class GroupCost:
    """One group of layers that share page tables: what a page costs and how many a request of n positions holds."""

    kind: str  # full, window or state
    page_size: int  # of a state group: the grid of its snapshots
    page_bytes: int  # one page of all layers of the group
    window: int | None = None

    def pages_for(self, positions: int, in_step: int) -> int:
        """Pages that one request of `positions` holds at most, when a step computes `in_step` positions of it."""
        if self.kind == "state":
            return 1
        held = positions if self.window is None else min(positions, self.window + in_step)
        # A window that does not begin on a page boundary touches one page more.
        extra = 1 if self.window is not None and held < positions else 0
        return math.ceil(held / self.page_size) + extra


def layer_page_bytes(layer: LayerSpec, page_size: int, dtype: torch.dtype, cache_bytes: CacheBytes) -> int:
    """Bytes of one page of one layer; 0 for a layer that reads another one's keys and values."""
    if layer.kind == "state":
        return sum(math.prod(state.shape) * state.dtype.itemsize for state in layer.states)
    if layer.shares is not None:
        return 0
    return cache_bytes(page_size, layer.kv_heads, layer.key_dim, layer.value_dim, dtype, layer.shared)


def group_costs(
    layout: ModelLayout,
    page_size: int,
    dtype: torch.dtype,
    cache_bytes: CacheBytes,
    draft: ModelLayout | None = None,
) -> tuple[GroupCost, ...]:
    """One GroupCost per group index of the layout, in order; empty for a model that keeps nothing.

    The keys and values of a `draft` lie under the numbers of the first full group's pages, and count there.
    """
    count = 1 + max((layer.group for layer in layout.layers), default=-1)
    costs = []
    for index in range(count):
        layers = [layer for layer in layout.layers if layer.group == index]
        total = sum(layer_page_bytes(layer, page_size, dtype, cache_bytes) for layer in layers)
        if layers[0].kind == "state":
            costs.append(GroupCost("state", page_size, total))
            continue
        windows = [layer.window for layer in layers if layer.shares is None and layer.window is not None]
        writers = sum(layer.shares is None for layer in layers)
        window = max(windows) if windows and len(windows) == writers else None
        costs.append(GroupCost("full" if window is None else "window", page_size, total, window))
    return tuple(costs) if draft is None else _with_draft(tuple(costs), draft, dtype, cache_bytes)


def _with_draft(
    costs: tuple[GroupCost, ...], draft: ModelLayout, dtype: torch.dtype, cache_bytes: CacheBytes
) -> tuple[GroupCost, ...]:
    if not draft.layers:
        return costs
    for index, cost in enumerate(costs):
        if cost.kind == "full":
            more = sum(layer_page_bytes(layer, cost.page_size, dtype, cache_bytes) for layer in draft.layers)
            grown = replace(cost, page_bytes=cost.page_bytes + more)
            return (*costs[:index], grown, *costs[index + 1 :])
    raise ConfigError("A draft model needs a model with layers that attend to the whole text; this one has none.")


def request_bytes(costs: tuple[GroupCost, ...], positions: int, in_step: int) -> int:
    """Bytes of pages that one request of `positions` needs."""
    return sum(cost.pages_for(positions, min(in_step, positions)) * cost.page_bytes for cost in costs)


def longest_context(costs: tuple[GroupCost, ...], budget: int, limit: int, in_step: int) -> int:
    """The most positions, at most `limit`, that a single request can hold in `budget` bytes; 0 when none fits."""
    budget -= sum(NULL_PAGES * cost.page_bytes for cost in costs)
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if request_bytes(costs, middle, in_step) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def concurrent_requests(groups: tuple[GroupSpec, ...], costs: tuple[GroupCost, ...], positions: int) -> int:
    """How many requests of `positions` fit in the pages at once; a large number when the model keeps nothing."""
    fits = [
        (group.num_pages - NULL_PAGES) // max(1, cost.pages_for(positions, cost.page_size))
        for group, cost in zip(groups, costs, strict=True)
    ]
    return min(fits, default=1 << 30)


def page_groups(
    costs: tuple[GroupCost, ...], budget: int, max_model_len: int, max_num_seqs: int, in_step: int
) -> tuple[GroupSpec, ...]:
    """Divide `budget` bytes among the groups. Every group can hold one request of max_model_len, if the budget can.

    State groups get a page per running request and some for snapshots, at most a third of the budget when others need
    it too. The rest is divided so that full and window groups run out together for requests of ordinary length, and
    never exceeds what max_num_seqs requests of max_model_len can use.
    """
    counts = [NULL_PAGES + cost.pages_for(max_model_len, in_step) for cost in costs]
    spare = budget - sum(count * cost.page_bytes for count, cost in zip(counts, costs, strict=True))
    paged = [index for index, cost in enumerate(costs) if cost.kind != "state"]
    for index, cost in enumerate(costs):
        if cost.kind == "state":
            wanted = math.ceil(max_num_seqs * (1 + SNAPSHOT_SHARE))
            room = spare // 3 if paged else spare
            more = max(0, min(wanted, room // max(1, cost.page_bytes)))
            counts[index] += more
            spare -= more * cost.page_bytes
    usual = max(1, max_model_len // 2)
    rates = {index: costs[index].pages_for(usual, in_step) for index in paged}
    round_bytes = sum(rates[index] * costs[index].page_bytes for index in paged)
    rounds = max(0, spare) / max(1, round_bytes)
    for index in paged:
        most = max_num_seqs * costs[index].pages_for(max_model_len, in_step) + NULL_PAGES
        counts[index] = max(counts[index], min(most, counts[index] + int(rounds * rates[index])))
    return tuple(
        GroupSpec(kind=cost.kind, page_size=cost.page_size, num_pages=count, window=cost.window)  # type: ignore[arg-type]
        for cost, count in zip(costs, counts, strict=True)
    )


def groups_bytes(groups: tuple[GroupSpec, ...], costs: tuple[GroupCost, ...]) -> int:
    """Bytes of all pages of all groups."""
    return sum(group.num_pages * cost.page_bytes for group, cost in zip(groups, costs, strict=True))

"""Bytes and pages: what a request needs, and how a budget is divided among groups."""

from __future__ import annotations

import pytest
import torch

from quire import sizing
from quire.layers.spec import LayerSpec, ModelLayout, StateSpec

PAGE = 16
STEP = 64


def cache_bytes(
    page_size: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, shared: bool = False
) -> int:
    return page_size * kv_heads * (key_dim + (0 if shared else value_dim)) * dtype.itemsize


def attention(group: int, window: int | None = None, shares: int | None = None) -> LayerSpec:
    return LayerSpec("layer", heads=4, kv_heads=2, key_dim=8, value_dim=8, window=window, shares=shares, group=group)


def layout(*layers: LayerSpec) -> ModelLayout:
    return ModelLayout(layers, vocab_size=100, hidden_size=32, tier="A")


def costs_of(*layers: LayerSpec) -> tuple[sizing.GroupCost, ...]:
    return sizing.group_costs(layout(*layers), PAGE, torch.bfloat16, cache_bytes)


LAYER_PAGE = PAGE * 2 * 16 * 2


def test_costs_add_up_over_the_layers_that_write() -> None:
    state = LayerSpec("state", kind="state", states=(StateSpec("s", (3, 5), torch.float32),), group=2)
    costs = costs_of(attention(0), attention(1, window=40), attention(0), attention(0, shares=0), state)
    assert [(cost.kind, cost.page_bytes) for cost in costs] == [
        ("full", 2 * LAYER_PAGE),
        ("window", LAYER_PAGE),
        ("state", 60),
    ]
    assert costs[1].window == 40


@pytest.mark.parametrize(
    ("positions", "full", "window"),
    [(1, 1, 1), (16, 1, 1), (17, 2, 2), (104, 7, 7), (105, 7, 8), (1000, 63, 8)],
)
def test_pages_of_a_request(positions: int, full: int, window: int) -> None:
    assert sizing.GroupCost("full", PAGE, 1).pages_for(positions, STEP) == full
    assert sizing.GroupCost("window", PAGE, 1, 40).pages_for(positions, STEP) == window
    assert sizing.GroupCost("state", 1, 1).pages_for(positions, STEP) == 1


def test_longest_context_is_exact() -> None:
    costs = costs_of(attention(0), attention(1, window=40))
    for budget in (0, 5 * LAYER_PAGE, 20 * LAYER_PAGE + 1, 1000 * LAYER_PAGE):
        longest = sizing.longest_context(costs, budget, 10_000, STEP)
        null = sum(cost.page_bytes for cost in costs)
        if longest:
            assert sizing.request_bytes(costs, longest, STEP) + null <= budget
        if longest < 10_000:
            assert sizing.request_bytes(costs, longest + 1, STEP) + null > budget


@pytest.mark.parametrize("pages", [30, 100, 1000, 100_000])
def test_groups_stay_in_the_budget_and_hold_one_request(pages: int) -> None:
    state = LayerSpec("state", kind="state", states=(StateSpec("s", (8, 64), torch.float32),), group=2)
    costs = costs_of(attention(0), attention(1, window=40), state)
    budget = pages * LAYER_PAGE
    length = sizing.longest_context(costs, budget, 2048, STEP)
    groups = sizing.page_groups(costs, budget, length, max_num_seqs=16, in_step=STEP)
    assert sizing.groups_bytes(groups, costs) <= budget
    for group, cost in zip(groups, costs, strict=True):
        assert group.num_pages - 1 >= cost.pages_for(length, STEP)
        assert group.kind == cost.kind
        assert group.window == cost.window
    assert sizing.concurrent_requests(groups, costs, length) >= 1


def test_no_more_pages_than_can_be_used() -> None:
    costs = costs_of(attention(0))
    groups = sizing.page_groups(costs, 1 << 40, max_model_len=100, max_num_seqs=3, in_step=STEP)
    assert groups[0].num_pages == 3 * 7 + 1


def test_a_large_budget_gives_every_request_its_state() -> None:
    state = LayerSpec("state", kind="state", states=(StateSpec("s", (4,), torch.float32),))
    costs = costs_of(state)
    groups = sizing.page_groups(costs, 1 << 30, max_model_len=100, max_num_seqs=8, in_step=STEP)
    assert groups[0].num_pages >= 8 + 1


def test_a_model_that_keeps_nothing() -> None:
    assert costs_of() == ()
    assert sizing.page_groups((), 1000, 100, 4, STEP) == ()
    assert sizing.longest_context((), 1000, 512, STEP) == 512

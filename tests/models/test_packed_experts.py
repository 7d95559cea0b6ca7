"""Experts of the library's modules: which of them take the one call for all blocks, and that both ways give the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quire.kernels.table import load_ops
from quire.layers.target import Target
from quire.models.replacements.experts import PackedExperts

COUNT, SIZE, INNER = 5, 24, 16


def plain(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def clamped(both: torch.Tensor) -> torch.Tensor:
    gate, up = both.chunk(2, -1)
    return F.silu(gate.clamp(max=7.0)) * up


def interleaved(both: torch.Tensor) -> torch.Tensor:
    return F.silu(both[..., ::2]) * both[..., 1::2]


def module(gating: Any, norm: bool = False) -> nn.Module:
    """What the library's decorator says of an experts module, with weights [experts, outputs, inputs]."""
    made = nn.Module()
    facts = {"is_transposed": False, "has_gate": True, "has_bias": False, "has_post_expert_norm": norm}
    vars(made).update(facts, _apply_gate=gating, post_expert_norm=F.tanh)
    return made


def packed(gating: Any, norm: bool = False) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(11)
    found, one = module(gating, norm), PackedExperts(module(gating, norm), load_ops("cpu"))
    weights = {
        "gate_up_proj": torch.randn(COUNT, 2 * INNER, SIZE, generator=generator),
        "down_proj": torch.randn(COUNT, SIZE, INNER, generator=generator),
    }
    given = {f"experts.{name}": Target(tuple(w.shape), w.dtype, lambda _: None) for name, w in weights.items()}
    for name, target in one.targets(found, "experts", given).items():
        target.load(weights[name.removeprefix("experts.")])
    return SimpleNamespace(module=found, experts=one, weights=weights)


def wanted(made: SimpleNamespace, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    out = torch.zeros_like(x)
    for row, numbers in enumerate(chosen.tolist()):
        for choice, number in enumerate(numbers):
            if number < COUNT:
                hidden = made.module._apply_gate(x[row] @ made.weights["gate_up_proj"][number].T)
                block = hidden @ made.weights["down_proj"][number].T
                block = F.tanh(block) if made.module.has_post_expert_norm else block
                out[row] += weights[row, choice] * block
    return out


@pytest.mark.parametrize(
    ("gating", "norm", "together"),
    [(plain, False, True), (clamped, False, False), (interleaved, False, False), (plain, True, False)],
    ids=["plain", "clamped", "interleaved", "a norm behind"],
)
def test_plain_gating_takes_one_call_and_any_other_its_own(gating: Any, norm: bool, together: bool) -> None:
    made = packed(gating, norm)
    assert (made.experts.stack is not None) == together
    x, weights = torch.randn(9, SIZE), torch.rand(9, 3)
    chosen = torch.stack([torch.randperm(COUNT + 1)[:3] for _ in range(9)])  # COUNT is nobody's number
    found = made.experts(made.module, x, chosen, weights)
    assert torch.allclose(found, wanted(made, x, chosen, weights), rtol=1e-4, atol=1e-3)
    alone = [made.experts(made.module, x[i : i + 1], chosen[i : i + 1], weights[i : i + 1]) for i in range(9)]
    assert torch.equal(torch.cat(alone), found)

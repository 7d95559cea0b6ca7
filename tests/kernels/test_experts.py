"""Experts of every level: what the blocks give one by one, whoever else is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quire.kernels.table import Ops
from quire.quant.format import quantized_ops

SIZE, INNER, COUNT = 40, 24, 5
DTYPES = [torch.float32, torch.bfloat16]
METHODS = [None, "int8", "int4-g32-zp"]


def stack(ops: Ops, method: str | None, dtype: torch.dtype, bias: bool = False) -> Any:
    generator = torch.Generator().manual_seed(3)

    def packed(outputs: int, inputs: int) -> list[Any]:
        draw = [torch.randn(outputs, inputs + 1, generator=generator).to(dtype) for _ in range(COUNT)]
        pack = quantized_ops(ops, method).pack_linear
        return [pack(x[:, 1:].contiguous(), x[:, 0].contiguous() if bias else None) for x in draw]

    return ops.stack_experts(packed(2 * INNER, SIZE), packed(SIZE, INNER), "silu")


def rows(count: int, choices: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(count, SIZE + 3).to(dtype)[:, :SIZE]
    chosen = torch.stack([torch.randperm(COUNT + 1)[:choices] for _ in range(count)])  # COUNT is nobody's number
    return x, chosen, torch.rand(count, choices).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 33])
def test_the_sum_of_the_chosen_blocks(
    ops: Ops, oracle: Ops, dtype: torch.dtype, method: str | None, count: int
) -> None:
    given = rows(count, 3, dtype)
    found = ops.experts(*given, stack(ops, method, dtype, bias=True))
    wanted = oracle.experts(*given, stack(oracle, method, dtype, bias=True))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert found.dtype == dtype
    assert (found.float() - wanted.float()).norm() <= tolerance * wanted.float().norm()


@pytest.mark.parametrize("method", METHODS)
def test_a_row_does_not_depend_on_the_others(ops: Ops, method: str | None) -> None:
    blocks = stack(ops, method, torch.bfloat16)
    x, chosen, weights = rows(70, 4, torch.bfloat16)
    together = ops.experts(x, chosen, weights, blocks)
    alone = [ops.experts(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1], blocks) for i in range(70)]
    assert torch.equal(together, torch.cat(alone))
    order = torch.randperm(70)
    assert torch.equal(ops.experts(x[order], chosen[order], weights[order], blocks), together[order])


def test_rows_without_an_expert_are_zero(ops: Ops) -> None:
    x, chosen, weights = rows(4, 2, torch.float32)
    chosen[1], chosen[2] = COUNT, -1
    found = ops.experts(x, chosen, weights, stack(ops, None, torch.float32))
    assert (found[1:3] == 0).all() and (found[0] != 0).any()
    assert ops.experts(x[:0], chosen[:0], weights[:0], stack(ops, None, torch.float32)).shape == (0, SIZE)


def test_blocks_of_several_kinds_are_not_for_one_call(ops: Ops) -> None:
    weight = torch.randn(8, 8)
    plain, rounded = ops.pack_linear(weight, None), quantized_ops(ops, "int8").pack_linear(weight, None)
    assert ops.stack_experts([plain, plain], [rounded, plain], "silu") is None
    assert ops.stack_experts([plain], [plain], "silu") is None  # down takes half of what up gives

"""Weights of 8 and 4 bits on every level: the very bits of the definition, whatever the shape and the company."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference import QuantizedWeights
from quire.kernels.table import Ops

SHAPES = [(1, 1), (7, 5), (16, 32), (33, 31), (64, 64), (100, 257), (31, 600), (130, 96)]
KINDS = ["int8", "int4", "int4 with zero points"]


def some_weights(kind: str, n: int, k: int, group: int) -> QuantizedWeights:
    """Random integers over their whole range, the largest and smallest among them."""
    if kind == "int8":
        values = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return QuantizedWeights(8, 0, values, torch.rand(n, 1) + 0.1)
    groups = -(-k // group)
    zeros = torch.randint(0, 17, (n, groups), dtype=torch.uint8) if kind != "int4" else None
    scales = (torch.rand(n, groups) + 0.1).bfloat16().float()
    return QuantizedWeights(4, group, torch.randint(0, 16, (n, k), dtype=torch.int8), scales, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_any_shape_gives_the_bits_of_the_definition(
    ops: Ops, oracle: Ops, dtype: torch.dtype, kind: str, n: int, k: int
) -> None:
    for group, bias in ((32, None), (64, torch.randn(n).to(dtype)), (128, None)):
        weights = some_weights(kind, n, k, group)
        packed, plain = ops.pack_quantized(weights, bias, dtype), oracle.pack_quantized(weights, bias, dtype)
        for m in (1, 2, 3, 5, 14):
            x = torch.randn(m, k).to(dtype)
            got, want = ops.quantized_linear(x, packed), oracle.quantized_linear(x, plain)
            assert got.dtype == dtype
            assert torch.equal(got, want), (group, m)


@pytest.mark.parametrize("kind", KINDS)
def test_largest_sums_are_exact(ops: Ops, oracle: Ops, kind: str) -> None:
    """Every product at its largest and of one sign: sums of 16 bits would overflow first here."""
    for sign in (1, -1):
        weights = some_weights(kind, 20, 640, 128)
        weights.values.fill_(127 * sign if kind == "int8" else 15 if sign > 0 else 0)
        x = torch.ones(9, 640) * torch.tensor([1.0, -1.0, 3.0]).repeat(3)[:, None]
        got = ops.quantized_linear(x, ops.pack_quantized(weights, None, torch.float32))
        assert torch.equal(got, oracle.quantized_linear(x, oracle.pack_quantized(weights, None, torch.float32)))


@pytest.mark.parametrize("kind", KINDS)
def test_unpacking_gives_the_weights_back(ops: Ops, kind: str) -> None:
    for n, k in SHAPES:
        weights = some_weights(kind, n, k, 32)
        back = ops.unpack_quantized(ops.pack_quantized(weights, None, torch.bfloat16))
        assert (back.bits, back.group) == (weights.bits, weights.group)
        assert torch.equal(back.values, weights.values)
        assert torch.equal(back.scales, weights.scales)
        assert (back.zeros is None) == (weights.zeros is None)
        assert weights.zeros is None or torch.equal(back.zeros, weights.zeros)


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_a_row_do_not_depend_on_the_others(ops: Ops, kind: str) -> None:
    packed = ops.pack_quantized(some_weights(kind, 90, 704, 64), torch.randn(90), torch.float32)
    x = torch.randn(512, 704)
    whole = ops.quantized_linear(x, packed)
    for rows in (1, 2, 3, 4, 5, 6, 7, 12, 13, 97, 250):
        assert torch.equal(ops.quantized_linear(x[100 : 100 + rows], packed), whole[100 : 100 + rows]), rows
    assert torch.equal(ops.quantized_linear(x[511:], packed), whole[511:])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_cannot_be_rounded(ops: Ops, oracle: Ops, kind: str) -> None:
    """Zeros and next to nothing give zeros, inf and NaN give NaN, and the rows beside them stay as they are."""
    weights = some_weights(kind, 20, 64, 32)
    x = torch.randn(6, 64)
    x[1], x[2], x[3, 5], x[4, 60] = 0, 1e-38, float("inf"), float("nan")
    got = ops.quantized_linear(x, ops.pack_quantized(weights, None, torch.float32))
    want = oracle.quantized_linear(x, oracle.pack_quantized(weights, None, torch.float32))
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert got[3:5].isnan().all()
    assert not got[1:3].any()
    assert got[[0, 5]].isfinite().all()


def test_inputs_of_any_form(ops: Ops) -> None:
    packed = ops.pack_quantized(some_weights("int8", 48, 64, 0), None, torch.bfloat16)
    wide = torch.randn(6, 100).bfloat16()
    want = ops.quantized_linear(wide[:, :64].contiguous(), packed)
    assert torch.equal(ops.quantized_linear(wide[:, :64], packed), want)  # rows that stand apart
    assert torch.equal(ops.quantized_linear(wide[:, :64].reshape(2, 3, 64), packed), want.view(2, 3, 48))
    assert torch.equal(ops.quantized_linear(wide[0, :64], packed), want[0])
    assert torch.equal(ops.quantized_linear(wide[:, :64].float(), packed), want.float())
    assert ops.quantized_linear(wide[:0, :64], packed).shape == (0, 48)
    with pytest.raises(ValueError, match="takes 64 features"):
        ops.quantized_linear(wide[:, :63], packed)


def test_other_dtypes_are_left_to_the_definition(ops: Ops, oracle: Ops) -> None:
    weights = some_weights("int4", 10, 64, 32)
    x = torch.randn(3, 64).half()
    got = ops.quantized_linear(x, ops.pack_quantized(weights, None, torch.float16))
    assert torch.equal(got, oracle.quantized_linear(x, oracle.pack_quantized(weights, None, torch.float16)))

"""A matrix for each head: every level against the reference, and bit for bit against itself."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.table import Ops

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "n", "width", "k"), [(16, 512, 512, 128), (3, 16, 8, 16), (5, 48, 40, 7), (2, 144, 129, 33)]
)
def test_each_head_has_its_own_matrix(
    ops: Ops, oracle: Ops, dtype: torch.dtype, heads: int, n: int, width: int, k: int
) -> None:
    weight = torch.randn(heads * n, k).to(dtype)
    packed, plain = ops.pack_linear(weight, None), oracle.pack_linear(weight, None)
    for rows in (1, 2, 5, 13, 60):
        x = torch.randn(rows, heads, k).to(dtype)
        got, want = ops.heads_linear(x, packed, heads, width), oracle.heads_linear(x, plain, heads, width)
        assert got.shape == (rows, heads, width)
        torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * k**0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_a_row_do_not_depend_on_the_others(ops: Ops, dtype: torch.dtype) -> None:
    heads, n, k = 4, 80, 136
    packed = ops.pack_linear(torch.randn(heads * n, k).to(dtype), None)
    x = torch.randn(110, heads, k).to(dtype)
    whole = ops.heads_linear(x, packed, heads, n)
    for first, last in [(0, 1), (0, 2), (3, 8), (7, 20), (40, 109), (109, 110)]:
        assert torch.equal(ops.heads_linear(x[first:last], packed, heads, n), whole[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_wider_rows(ops: Ops, dtype: torch.dtype) -> None:
    """Reads a part of each head's numbers, heads before rows, and writes a part of another tensor's."""
    heads, n, k, rows = 3, 32, 24, 9
    packed = ops.pack_linear(torch.randn(heads * n, k).to(dtype), None)
    wide = torch.randn(heads, rows, k + 8).to(dtype).transpose(0, 1)
    want = ops.heads_linear(wide[..., :k].contiguous(), packed, heads, n)
    out = torch.full((rows, heads, n + 5), 7.0, dtype=dtype)
    ops.heads_linear(wide[..., :k], packed, heads, n, out[..., :n])
    assert torch.equal(out[..., :n], want)
    assert bool((out[..., n:] == 7.0).all())

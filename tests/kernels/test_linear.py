"""linear of every level: right for every shape, and the bits of a row are the same in any company."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.cpu import packing
from quire.kernels.table import Ops

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (7, 5), (16, 2), (33, 31), (64, 64), (100, 257), (31, 600), (130, 96)]


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """Within a few float32 roundings of a long sum, or for bfloat16 within one rounding of the result."""
    scale = want.abs().max().item()
    relative = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(got.float(), want.float(), rtol=relative, atol=3e-6 * max(scale, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_any_shape_agrees_with_the_definition(ops: Ops, dtype: torch.dtype, n: int, k: int, bias: bool) -> None:
    weight = torch.randn(n, k).to(dtype)
    added = torch.randn(n).to(dtype) if bias else None
    packed = ops.pack_linear(weight, added)
    for m in (1, 2, 5, 13, 40):
        x = torch.randn(m, k).to(dtype)
        want = x.double() @ weight.double().T + (added.double() if bias else 0)
        assert_near(ops.linear(x, packed), want, dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_unpacking_gives_the_weight_back_bit_for_bit(ops: Ops, dtype: torch.dtype) -> None:
    for n, k in SHAPES:
        weight = torch.randn(n, k).to(dtype)
        assert torch.equal(ops.unpack_linear(ops.pack_linear(weight, None)), weight)


@pytest.mark.parametrize("given", [torch.float16, *DTYPES])
def test_a_weight_packed_slice_by_slice_is_the_same(ops: Ops, given: torch.dtype, monkeypatch) -> None:
    """Slices end in the middle of a part; parts are converted, and their rows may stand apart."""
    parts = [torch.randn(70, 48).to(given), torch.randn(33, 96).to(given)[:, ::2], torch.randn(48, 25).to(given).T]
    for dtype in DTYPES:
        whole = ops.pack_linear(parts, None, dtype)
        monkeypatch.setattr(packing, "SLICE", 16 * 48 * given.itemsize * 2)
        sliced = ops.pack_linear(parts, None, dtype)
        monkeypatch.undo()
        assert torch.equal(whole.data, sliced.data)
        assert torch.equal(ops.unpack_linear(sliced), torch.cat(parts).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_row_do_not_depend_on_the_others(ops: Ops, dtype: torch.dtype) -> None:
    n, k = 90, 700
    packed = ops.pack_linear(torch.randn(n, k).to(dtype), torch.randn(n).to(dtype))
    x = torch.randn(512, k).to(dtype)
    whole = ops.linear(x, packed)
    for rows in (1, 2, 3, 4, 5, 6, 7, 12, 13, 64, 250):
        assert torch.equal(ops.linear(x[100 : 100 + rows], packed), whole[100 : 100 + rows]), rows
    assert torch.equal(ops.linear(x[511:], packed), whole[511:])


def test_more_rows_than_are_packed_at_a_time(ops: Ops) -> None:
    packed = ops.pack_linear(torch.randn(20, 24), None)
    x = torch.randn(1700, 24)
    torch.testing.assert_close(ops.linear(x, packed), x @ ops.unpack_linear(packed).T, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.linear(x, packed)[900:901], ops.linear(x[900:901], packed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_form(ops: Ops, dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64).to(dtype)
    packed = ops.pack_linear(weight, None)
    wide = torch.randn(6, 100).to(dtype)
    want = ops.linear(wide[:, :64].contiguous(), packed)
    assert torch.equal(ops.linear(wide[:, :64], packed), want)  # rows that stand apart
    assert torch.equal(ops.linear(wide[:, :64].reshape(2, 3, 64), packed), want.view(2, 3, 48))
    assert torch.equal(ops.linear(wide[:, :64].T.contiguous().T, packed), want)
    assert torch.equal(ops.linear(wide[0, :64], packed), want[0])
    assert ops.linear(wide[:0, :64], packed).shape == (0, 48)
    assert torch.equal(ops.linear(wide[:, :64], ops.pack_linear(weight.T.contiguous().T, None)), want)


def test_a_wrong_width_is_refused(ops: Ops) -> None:
    with pytest.raises(ValueError, match="takes 64 features"):
        ops.linear(torch.randn(2, 63), ops.pack_linear(torch.randn(8, 64), None))


def test_nothing_leaks_into_the_padding(ops: Ops) -> None:
    """Infinite activations meet the zeros that fill up a panel; the real outputs must not become NaN by it."""
    for dtype in DTYPES:
        weight = torch.ones(17, 3).to(dtype)
        out = ops.linear(torch.tensor([[1.0, float("inf"), 2.0]]).to(dtype), ops.pack_linear(weight, None))
        assert torch.isinf(out).all()

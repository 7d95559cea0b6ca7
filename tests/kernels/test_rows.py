"""Norms and gated activations of every level: float32 close to the reference, bfloat16 the same bits but for a few."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.reference import ACTIVATIONS
from quire.kernels.table import Ops

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 3, 100), (70, 2048), (1, 4097)]


def check(got: torch.Tensor, want: torch.Tensor, noise: float = 0.0) -> None:
    """float32 within a few roundings; bfloat16 equal in all but one in a hundred, and those next to each other.
    Differences below `noise` do not count."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.dtype == torch.bfloat16:
        differ = (got != want) & ((got - want).abs() > noise)
        assert differ.float().mean() <= 0.01 + 1 / got.numel()
        torch.testing.assert_close(got, want, rtol=2.0**-6, atol=max(noise, 1e-6))
    else:
        torch.testing.assert_close(got, want, rtol=3e-6, atol=max(noise, 2e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("style", ["down_then_scale", "scale_then_down", "plus_one"])
def test_rms_norm(ops: Ops, oracle: Ops, dtype: torch.dtype, shape: tuple[int, ...], style: str) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    check(ops.rms_norm(x, weight, 1e-6, style), oracle.rms_norm(x, weight, 1e-6, style))
    check(ops.rms_norm(x, None, 1e-6, style), oracle.rms_norm(x, None, 1e-6, style))
    got, want = (o.add_rms_norm(x, residual, weight, 1e-6, style) for o in (ops, oracle))
    check(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(ops: Ops, oracle: Ops, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    for w, b in [(weight, bias), (weight, None), (None, None)]:
        check(ops.layer_norm(x, w, b, 1e-5), oracle.layer_norm(x, w, b, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(ops: Ops, oracle: Ops, dtype: torch.dtype, activation: str) -> None:
    for shape in [(1, 2), (3, 14), (2, 5, 64), (40, 2 * 1111)]:
        x = (torch.randn(shape) * 4).to(dtype)
        for gate_first in (True, False):
            # PyTorch's gelu takes 1 - 0.999.. far out on the left and keeps few digits there; ours keeps all.
            noise = 1e-5 if activation.startswith("gelu") else 0.0
            check(ops.gated(x, activation, gate_first), oracle.gated(x, activation, gate_first), noise)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(ops: Ops, oracle: Ops, activation: str) -> None:
    gate = torch.tensor([-1e30, -200.0, -90.0, -20.0, -1e-3, -0.0, 0.0, 1e-3, 20.0, 90.0, 200.0, 1e10])
    x = torch.cat([gate, torch.ones_like(gate)])[None]
    torch.testing.assert_close(ops.gated(x, activation), oracle.gated(x, activation), rtol=1e-5, atol=1e-7)
    broken = torch.tensor([[float("nan"), 1.0]])
    assert ops.gated(broken, activation).isnan().all()


def test_rows_that_stand_apart_and_rows_alone(ops: Ops) -> None:
    x = torch.randn(64, 300)
    part, weight = x[:, :200], torch.randn(200)
    whole = ops.rms_norm(part, weight, 1e-6, "plus_one")
    assert torch.equal(ops.rms_norm(part.contiguous(), weight, 1e-6, "plus_one"), whole)
    assert torch.equal(ops.rms_norm(part[63:], weight, 1e-6, "plus_one"), whole[63:])
    assert torch.equal(ops.layer_norm(part[7:8], weight, weight, 1e-6), ops.layer_norm(part, weight, weight, 1e-6)[7:8])
    assert torch.equal(ops.gated(part[9], "silu"), ops.gated(part, "silu")[9])


def test_other_dtypes_go_to_the_reference(ops: Ops, oracle: Ops) -> None:
    x, weight = torch.randn(3, 8).half(), torch.randn(8).half()
    assert torch.equal(
        ops.rms_norm(x, weight, 1e-6, "down_then_scale"), oracle.rms_norm(x, weight, 1e-6, "down_then_scale")
    )
    mixed = torch.randn(3, 8).bfloat16()
    assert ops.rms_norm(mixed, weight.float(), 1e-6, "scale_then_down").dtype == torch.bfloat16
    assert torch.equal(ops.gated(x, "silu"), oracle.gated(x, "silu"))

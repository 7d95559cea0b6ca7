"""Weights of 4 bits in groups of 32, 64 or 128 values of a row, each with a scale in bfloat16, and with a zero point where
asked. The scale of a group is the one, of a few tried, that leaves the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.reference import QuantizedLinear, QuantizedWeights
from quire.kernels.table import Ops
from quire.quant.int8 import BLOCK

SIZES = (128, 64, 32)
MIDDLE = 8  # what stands for zero where there are no zero points
# What the largest value of a group is divided by. Without zero points it comes to lie at -8, where there is one step more
# than on the other side, or is clipped a little so that the many small ones are finer.
DIVISORS = (8.0, 7.5, 8.6, 9.3)
SHRINKS = (1.0, 0.93, 0.86)  # shares of the range from the smallest to the largest, with zero points


class Int4:
    """The WeightFormat of 4 bits. `group` None takes the largest size that divides the width, else the smallest."""

    def __init__(self, ops: Ops, group: int | None = None, zero_points: bool = False) -> None:
        self._ops = ops
        self._group = group
        self._zero_points = zero_points
        self.apply = ops.quantized_linear

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Half a byte for each value; for each group two bytes, and one more with zero points."""
        group = group_for(inputs, self._group)
        return outputs * -(-inputs // group) * (group // 2 + 2 + self._zero_points)

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
        """Round and pack weight [N, K] and bias [N]."""
        weights = round_weight(weight, group_for(weight.shape[1], self._group), self._zero_points)
        return self._ops.pack_quantized(weights, bias, weight.dtype)


def group_for(inputs: int, wanted: int | None) -> int:
    """The group size for rows of this width: the wanted one, else the largest that divides it, else the smallest."""
    return wanted or next((size for size in SIZES if inputs % size == 0), SIZES[-1])


def restore(weights: QuantizedWeights) -> torch.Tensor:
    """4-bit weights as float32 [N, K]."""
    zeros = MIDDLE if weights.zeros is None else weights.zeros.float().repeat_interleave(weights.group, 1)
    k = weights.values.shape[1]
    centred = weights.values - (zeros if isinstance(zeros, int) else zeros[:, :k])
    return centred * weights.scales.repeat_interleave(weights.group, 1)[:, :k]


def round_weight(weight: torch.Tensor, group: int, zero_points: bool) -> QuantizedWeights:
    """weight [N, K] in groups along K. The last group of a row may be short."""
    n, k = weight.shape
    groups = -(-k // group)
    values = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, groups, device=weight.device)
    zeros = torch.empty(n, groups, dtype=torch.uint8, device=weight.device) if zero_points else None
    step = max(1, BLOCK // 4 // k)
    for start in range(0, n, step):
        rows = weight[start : start + step].float()
        if k % group:
            rows = torch.nn.functional.pad(rows, (0, groups * group - k))
        best = _round_groups(rows.view(-1, groups, group), zero_points)
        values[start : start + step] = best.values.view(-1, groups * group)[:, :k]
        scales[start : start + step] = best.scales[..., 0]
        if zeros is not None:
            zeros[start : start + step] = best.zeros[..., 0]
    return QuantizedWeights(4, group, values, scales, zeros)


@dataclass(slots=True)
class _Rounded:
    """Groups [..., group] as values, their scales and zero points [..., 1], and what is lost [..., 1]."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    loss: torch.Tensor


def _round_groups(x: torch.Tensor, zero_points: bool) -> _Rounded:
    """The best of the tries, for each group by itself."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    best: _Rounded | None = None
    for trial in SHRINKS if zero_points else DIVISORS:
        if zero_points:
            scale = _storable((high - low) * trial / 15.0)
            zero = (-low * trial / _safe(scale)).round().clamp(0, 15)
        else:
            largest = torch.where(high >= -low, high, low)
            scale = _storable(largest / -trial)
            zero = torch.full_like(scale, MIDDLE)
        tried = _rounded(x, scale, zero)
        # The scale that fits these values best; where it gives a still better rounding, that is taken.
        centred = tried.values - zero
        fitted = (x * centred).sum(-1, keepdim=True) / centred.square().sum(-1, keepdim=True).clamp(min=1)
        for found in (tried, _rounded(x, _storable(fitted), zero)):
            best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _rounded(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> _Rounded:
    values = (x / _safe(scale)).round_().add_(zero).clamp_(0, 15)
    loss = (values - zero).mul_(scale).sub_(x).square_().sum(-1, keepdim=True)
    return _Rounded(values, scale, zero, loss)


def _better(one: _Rounded, other: _Rounded) -> _Rounded:
    wins = other.loss < one.loss
    return _Rounded(
        torch.where(wins, other.values, one.values),
        torch.where(wins, other.scales, one.scales),
        torch.where(wins, other.zeros, one.zeros),
        torch.where(wins, other.loss, one.loss),
    )


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float()


def _safe(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale != 0, scale, 1.0)

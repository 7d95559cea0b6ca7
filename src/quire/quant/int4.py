"""Weights of 4 bits in groups of 32, 64 or 128 values of a row, each with a scale in bfloat16, and with a zero point where
asked. The scale of a group is the one, of a few tried, that leaves the least squared error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.reference import SMALLEST, QuantizedLinear, QuantizedWeights
from quire.kernels.table import Ops
from quire.quant.int8 import BLOCK

SIZES = (128, 64, 32)
MIDDLE = 8  # what stands for zero where there are no zero points
# What the largest value of a group is divided by. Without zero points it comes to lie at -8, where there is one step more
# than on the other side, or is clipped a little so that the many small ones are finer.
DIVISORS = (8.0, 7.5, 8.6, 9.3)
SHRINKS = (1.0, 0.92, 0.84)  # shares of the range from the smallest to the largest, with zero points


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
        x = rows.view(-1, groups, group)
        best = _best_grid(x, zero_points)
        whole = _centred(x, best).add_(best.zero)
        values[start : start + step] = whole.view(-1, groups * group)[:, :k]
        scales[start : start + step] = best.scale[..., 0]
        if zeros is not None:
            zeros[start : start + step] = best.zero[..., 0]
    return QuantizedWeights(4, group, values, scales, zeros)


@dataclass(slots=True)
class _Grid:
    """What the values of each group [..., group] are rounded to: (0..15 less the zero point) times the scale, [..., 1]."""

    scale: torch.Tensor
    zero: torch.Tensor


def _best_grid(x: torch.Tensor, zero_points: bool) -> _Grid:
    """The best of the tries for each group [..., group] by itself.

    A try gives whole numbers c; with A the sum of x * c and B that of c * c, the scale A / B fits them best, and a scale s
    loses s * s * B - 2 * s * A beside what all of them lose.
    """
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    largest = torch.where(high >= -low, high, low)
    best, least = _Grid(torch.zeros_like(low), torch.full_like(low, MIDDLE)), torch.zeros_like(low)
    for trial in SHRINKS if zero_points else DIVISORS:
        scale = (high - low) * (trial / 15.0) if zero_points else largest / -trial
        zero = (low * -trial / _safe(scale)).round_().clamp_(0, 15) if zero_points else best.zero
        centred = _centred(x, _Grid(scale, zero))
        a, b = (x * centred).sum(-1, keepdim=True), centred.square_().sum(-1, keepdim=True)
        fitted = _storable(a / b.clamp(min=1))
        loss = fitted * (fitted * b - 2 * a)
        better = loss < least
        best = _Grid(torch.where(better, fitted, best.scale), torch.where(better, zero, best.zero))
        least = torch.minimum(loss, least)
    return best


def _centred(x: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """The numbers -zero..15 - zero nearest to x / scale."""
    return torch.clamp((x * (1.0 / _safe(grid.scale))).round_(), -grid.zero, 15 - grid.zero)


def _storable(scale: torch.Tensor) -> torch.Tensor:
    return scale.bfloat16().float()


def _safe(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() > SMALLEST, scale, 1.0)

"""How a weight becomes small integers: the meaning of `round_linear`, and its oracle. Memory before speed.

8 bits have one scale per output, 4 bits one for each group of a row. The scale of a 4-bit group is the one, of a few
tried, that leaves the least squared error; csrc/packing.cpp gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quire.kernels.weights import SMALLEST, QuantizedWeights

BLOCK = 1 << 20  # values that are rounded at a time, so that loading needs little memory beside the weight
MIDDLE = 8  # what stands for zero where there are no zero points
# What the largest value of a group is divided by. Without zero points it comes to lie at -8, where there is one step more
# than on the other side, or is clipped a little so that the many small ones are finer.
DIVISORS = (8.0, 7.5, 8.6, 9.3)
SHRINKS = (1.0, 0.92, 0.84)  # shares of the range from the smallest to the largest, with zero points
SUM_LANES = 16  # sums of a group are taken in so many lanes, each in ascending order


def round_to_bytes(weight: torch.Tensor) -> QuantizedWeights:
    """weight [N, K] in 8 bits, with the largest value of each row at 127."""
    n, k = weight.shape
    values = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    scales = torch.empty(n, 1, device=weight.device)
    step = max(1, BLOCK // k)
    for start in range(0, n, step):
        rows = weight[start : start + step].float()
        scale = rows.abs().amax(-1, keepdim=True) / 127.0
        scales[start : start + step] = scale
        values[start : start + step] = (rows / torch.where(scale > 0, scale, 1.0)).round_()
    return QuantizedWeights(8, 0, values, scales)


def round_to_nibbles(weight: torch.Tensor, group: int, zero_points: bool) -> QuantizedWeights:
    """weight [N, K] in 4 bits, in groups along K. The last group of a row may be short."""
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


def restored(weights: QuantizedWeights) -> torch.Tensor:
    """Quantized weights as float32 [N, K]."""
    if weights.bits == 8:
        return weights.values.float() * weights.scales
    zeros = MIDDLE if weights.zeros is None else weights.zeros.float().repeat_interleave(weights.group, 1)
    k = weights.values.shape[1]
    centred = weights.values - (zeros if isinstance(zeros, int) else zeros[:, :k])
    return centred * weights.scales.repeat_interleave(weights.group, 1)[:, :k]


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
        a, b = _sum(x * centred), _sum(centred.square_())
        fitted = (a / b.clamp(min=1)).bfloat16().float()
        loss = fitted * (fitted * b - 2 * a)
        better = loss < least
        best = _Grid(torch.where(better, fitted, best.scale), torch.where(better, zero, best.zero))
        least = torch.minimum(loss, least)
    return best


def _sum(x: torch.Tensor) -> torch.Tensor:
    """The sum of each group [..., group] -> [..., 1], in a fixed order: lanes first, then the lanes by halves."""
    lanes = x.unflatten(-1, (-1, SUM_LANES))
    total = lanes[..., 0, :]
    for step in range(1, lanes.shape[-2]):
        total = total + lanes[..., step, :]
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total


def _centred(x: torch.Tensor, grid: _Grid) -> torch.Tensor:
    """The numbers -zero..15 - zero nearest to x / scale."""
    return torch.clamp((x * (1.0 / _safe(grid.scale))).round_(), -grid.zero, 15 - grid.zero)


def _safe(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() > SMALLEST, scale, 1.0)

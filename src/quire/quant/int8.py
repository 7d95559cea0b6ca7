"""Weights of 8 bits: one scale per output, zero in the middle. Activations are rounded row by row as they come."""

from __future__ import annotations

import torch

from quire.kernels.reference import QuantizedLinear, QuantizedWeights
from quire.kernels.table import Ops

BLOCK = 1 << 20  # values that are rounded at a time, so that loading needs little memory beside the weight


class Int8:
    """The WeightFormat of 8 bits."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.apply = ops.quantized_linear

    def nbytes(self, outputs: int, inputs: int) -> int:
        """A byte for each value and a float32 for each output."""
        return outputs * (inputs + 4)

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None) -> QuantizedLinear:
        """Round and pack weight [N, K] and bias [N]."""
        return self._ops.pack_quantized(round_weight(weight), bias, weight.dtype)


def restore(weights: QuantizedWeights) -> torch.Tensor:
    """8-bit weights as float32 [N, K]."""
    return weights.values.float() * weights.scales


def round_weight(weight: torch.Tensor) -> QuantizedWeights:
    """weight [N, K] with its largest value of each row at 127."""
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

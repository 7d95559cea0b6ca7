"""Weights of 4 bits in groups of 32, 64 or 128 values of a row, each with a scale in bfloat16, and with a zero point where
asked. How they are rounded is said in kernels/rounding.py.
"""

from __future__ import annotations

import torch

from quire.kernels.table import Ops
from quire.kernels.weights import Parts, QuantizedLinear

SIZES = (128, 64, 32)


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

    def load(self, weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> QuantizedLinear:
        """Round and pack weight [N, K], or its parts, and bias [N]."""
        inputs = weight.shape[1] if isinstance(weight, torch.Tensor) else weight[0].shape[1]
        return self._ops.round_linear(weight, bias, dtype, 4, group_for(inputs, self._group), self._zero_points)


def group_for(inputs: int, wanted: int | None) -> int:
    """The group size for rows of this width: the wanted one, else the largest that divides it, else the smallest."""
    return wanted or next((size for size in SIZES if inputs % size == 0), SIZES[-1])

"""Weights of 8 bits: one scale per output, zero in the middle. Activations are rounded row by row as they come."""

from __future__ import annotations

import torch

from quire.kernels.table import Ops
from quire.kernels.weights import Parts, QuantizedLinear


class Int8:
    """The WeightFormat of 8 bits."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops
        self.apply = ops.quantized_linear

    def nbytes(self, outputs: int, inputs: int) -> int:
        """A byte for each value and a float32 for each output."""
        return outputs * (inputs + 4)

    def load(self, weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> QuantizedLinear:
        """Round and pack weight [N, K], or its parts, and bias [N]."""
        return self._ops.round_linear(weight, bias, dtype, 8, 0, False)

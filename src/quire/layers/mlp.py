"""The gated feed-forward block: two merged projections, an activation, one projection back. Knows nothing of models."""

from __future__ import annotations

import torch
from torch import nn

from quire.kernels.table import Ops
from quire.layers.linear import Linear


class GatedMLP(nn.Module):
    """down(activation(gate x) * up x), with gate and up merged in one product."""

    def __init__(
        self,
        ops: Ops,
        size: int,
        inner: int,
        activation: str,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.gate_up = Linear(ops, size, (inner, inner), bias, dtype, device)
        self.down = Linear(ops, inner, (size,), bias, dtype, device)
        self.activation = activation
        self._gated = ops.gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, size] -> [T, size]."""
        return self.down.forward(self._gated(self.gate_up.forward(x), self.activation))

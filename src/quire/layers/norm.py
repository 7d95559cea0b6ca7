"""RMSNorm over this device's ops, with or without the residual sum that precedes it. Knows nothing of models."""

from __future__ import annotations

import torch
from torch import nn

from quire.kernels.reference import NormStyle
from quire.kernels.table import Ops
from quire.layers.target import Target


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension. `style` says where the cast happens: see kernels/reference.py."""

    def __init__(
        self, ops: Ops, size: int, eps: float, style: NormStyle, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.eps = eps
        self.style: NormStyle = style
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self._norm = ops.rms_norm
        self._add_norm = ops.add_rms_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype."""
        return self._norm(x, self.weight, self.eps, self.style)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm of x + residual, x + residual), both in x's dtype."""
        return self._add_norm(x, residual, self.weight, self.eps, self.style)

    def weight_target(self) -> Target:
        """Where the weight [size] goes."""
        return Target(tuple(self.weight.shape), self.weight.dtype, self._load)

    def _load(self, tensor: torch.Tensor) -> None:
        self.weight.copy_(tensor)

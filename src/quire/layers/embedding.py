"""The table that turns token ids into vectors. It may stay in the mapped weight file: only rows in use are read."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from quire.layers.target import Target


class Embedding(nn.Module):
    """ids [T] -> vectors [T, size]."""

    def __init__(self, vocab_size: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.empty((vocab_size, size), dtype=dtype, device="meta")
        self._device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] -> [T, size]."""
        return F.embedding(ids, self.weight)

    def weight_target(self) -> Target:
        """Where the table [vocab_size, size] goes; a tied output matrix shares what is kept."""
        return Target(tuple(self.weight.shape), self.weight.dtype, self._load)

    def _load(self, tensor: torch.Tensor) -> torch.Tensor:
        self.weight = tensor.to(device=self._device, dtype=self.weight.dtype)
        return self.weight

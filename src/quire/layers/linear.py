"""Linear: one matrix product whose weight may come as several siblings of the checkpoint (q, k and v; gate and up).

The weight lives only in packed form. Siblings wait as they came, mostly as views of the weight file, and are packed
together when the last one is there: loading needs the model's weights plus one matrix, never a second copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from quire.kernels.table import Ops
from quire.kernels.weights import PackedLinear
from quire.layers.target import Target
from quire.quant.checkpoints import StoredWeight


class Linear(nn.Module):
    """y = x W^T + b for x [..., K]. `sizes` are the output widths of the merged siblings, in order; N is their sum."""

    def __init__(
        self,
        ops: Ops,
        in_features: int,
        sizes: Sequence[int],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.sizes = tuple(sizes)
        self.out_features = sum(sizes)
        self.has_bias = bias
        self.dtype = dtype
        self.device = torch.device(device)
        self.packed: PackedLinear | None = None
        self._ops = ops
        self._product = ops.linear
        self._waiting: dict[tuple[str, int], Any] = {}  # what has come, until the last one has
        parts = len(self.sizes)
        self._missing = {("weight", i) for i in range(parts)} | ({("bias", i) for i in range(parts)} if bias else set())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N], in x's dtype."""
        return self._product(x, self.packed)

    def load_weight(self, tensor: torch.Tensor | StoredWeight) -> None:
        """Take the whole weight [N, K]."""
        for index, part in enumerate(tensor.split(self.sizes)):
            self._place("weight", index, part)

    def load_shard(self, index: int, tensor: torch.Tensor | StoredWeight) -> None:
        """Take sibling `index`'s weight [sizes[index], K]."""
        self._place("weight", index, tensor)

    def load_bias(self, tensor: torch.Tensor) -> None:
        """Take the whole bias [N]."""
        for index, part in enumerate(tensor.split(self.sizes)):
            self._place("bias", index, part)

    def load_bias_shard(self, index: int, tensor: torch.Tensor) -> None:
        """Take sibling `index`'s bias [sizes[index]]."""
        self._place("bias", index, tensor)

    def weight_target(self, index: int | None = None) -> Target:
        """Where sibling `index`'s weight goes, or the whole weight for None."""
        if index is None:
            return Target((self.out_features, self.in_features), self.dtype, self.load_weight)
        return Target((self.sizes[index], self.in_features), self.dtype, partial(self.load_shard, index))

    def bias_target(self, index: int | None = None) -> Target:
        """Where sibling `index`'s bias goes, or the whole bias for None."""
        if index is None:
            return Target((self.out_features,), self.dtype, self.load_bias)
        return Target((self.sizes[index],), self.dtype, partial(self.load_bias_shard, index))

    def fill_bias_shard(self, index: int) -> None:
        """Give a sibling that has no bias of its own zeros, when it is merged with one that has."""
        self._place("bias", index, torch.zeros(self.sizes[index], dtype=self.dtype))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, sizes={self.sizes}, bias={self.has_bias}, dtype={self.dtype}"

    def _place(self, kind: str, index: int, tensor: torch.Tensor | StoredWeight) -> None:
        assert (kind, index) in self._missing, f"{kind} {index} given twice or not expected"
        self._waiting[kind, index] = tensor.to(self.device)  # on a CPU the view of the file itself
        self._missing.discard((kind, index))
        if not self._missing:
            parts = range(len(self.sizes))
            bias = torch.cat([self._waiting["bias", index] for index in parts]) if self.has_bias else None
            self.packed = self._ops.pack_linear([self._waiting["weight", index] for index in parts], bias, self.dtype)
            self._waiting.clear()

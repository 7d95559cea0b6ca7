"""LatentProjection: the matrices of latent attention, moved from keys and values to queries and results.

A position keeps one latent for all heads, and the part of its key that carries the position:

    score    q . W_k latent + r . rope            =  [W_k^T q | r] . [latent | rope]
    result   sum of weights * (W_v latent)        =  W_v (sum of weights * latent)

It knows nothing of caches or models. The matrices keep their dtype, also where other linears are quantized: they are
small, and what they multiply goes through a softmax.
"""

from __future__ import annotations

import torch
from torch import nn

from quire.kernels.rounding import restored
from quire.kernels.table import Ops
from quire.kernels.weights import PackedLinear
from quire.layers.target import Target
from quire.quant.checkpoints import StoredWeight
from quire.quant.format import full_ops

ROWS = 16  # the rows of a head's matrix are filled up to a multiple of these


class LatentProjection(nn.Module):
    """Stands for the linear [heads * (key_dim + value_dim), rank] that makes each head's key and value of a latent.

    `key_dim` is the part of a key that comes from the latent.
    """

    def __init__(
        self, ops: Ops, heads: int, rank: int, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rank = rank
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.dtype = dtype
        self.device = device
        self._ops = full_ops(ops)
        self._product = self._ops.heads_linear
        self._keys: PackedLinear | None = None
        self._values: PackedLinear | None = None

    def query(self, query: torch.Tensor) -> torch.Tensor:
        """query [T, heads, key_dim + rope] -> [T, heads, rank + rope], to be compared with [latent | rope]."""
        rope = query.shape[2] - self.key_dim
        out = query.new_empty(query.shape[0], self.heads, self.rank + rope)
        self._product(query[..., : self.key_dim], self._keys, self.heads, self.rank, out[..., : self.rank])
        out[..., self.rank :].copy_(query[..., self.key_dim :])
        return out

    def result(self, mixed: torch.Tensor) -> torch.Tensor:
        """Weighted latents [T, heads, rank] -> [T, heads, value_dim]."""
        return self._product(mixed, self._values, self.heads, self.value_dim)

    def weight_target(self) -> Target:
        """Where the linear's weight goes."""
        return Target((self.heads * (self.key_dim + self.value_dim), self.rank), self.dtype, self.load_weight)

    def load_weight(self, tensor: torch.Tensor | StoredWeight) -> None:
        """Take the weight [heads * (key_dim + value_dim), rank]; one that is stored with few bits is widened."""
        if isinstance(tensor, StoredWeight):
            tensor = restored(tensor.unpack())
        weight = tensor.detach().to(self.device, self.dtype).view(self.heads, -1, self.rank)
        keys, values = weight.split([self.key_dim, self.value_dim], 1)
        self._keys = self._packed(keys.transpose(1, 2))
        self._values = self._packed(values)

    def _packed(self, matrices: torch.Tensor) -> PackedLinear:
        """matrices [heads, N, K] below one another."""
        heads, rows, columns = matrices.shape
        filled = matrices.new_zeros(heads, -(-rows // ROWS) * ROWS, columns)
        filled[:, :rows] = matrices
        return self._ops.pack_linear(filled.view(-1, columns), None, self.dtype)

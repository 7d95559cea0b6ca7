"""Matrix products on CUDA: cuBLAS through PyTorch, weights kept as they are.

cuBLAS chooses its kernel by the number of rows, so a row's last bits may depend on how many stand beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from quire.kernels.reference import PackedLinear


def linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype, summed in float32."""
    return F.linear(x, packed.data, packed.bias)


def heads_linear(
    x: torch.Tensor, packed: PackedLinear, heads: int, width: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See kernels/reference.py."""
    weight = packed.data.view(heads, -1, packed.in_features)[:, :width]
    found = torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
    return found if out is None else out.copy_(found)


def stack_experts(up: Sequence[PackedLinear], down: Sequence[PackedLinear], activation: str) -> None:
    """There is no one call for experts: one product for each of them, see layers/moe.py."""

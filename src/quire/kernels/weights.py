"""What the weights of a linear are, once packed: messages between those who load a model and the backends' ops.

It holds no computation. kernels/reference.py says what the ops do with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

SMALLEST = 1e-30  # values whose largest is below this are rounded to 0: 127 / largest would not be safe

# A weight [N, K], or several to be taken for one: N is the sum of theirs.
Parts: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


@dataclass(slots=True)
class PackedLinear:
    """The weights of one linear in the layout of the backend that packed them; only that backend reads `data`."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    data: torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True)
class QuantizedWeights:
    """A weight [N, K] as small integers: value times scale is the weight, after the zero point is taken away.

    8 bits: values -127..127, one scale per output. 4 bits: values 0..15, a scale that bfloat16 can hold for each output
    and each `group` values of k (a multiple of 32; the last group may be shorter), and a zero point 0..255 for each, or
    none, which means 8.
    """

    bits: Literal[8, 4]
    group: int  # 0 for 8 bits
    values: torch.Tensor  # int8 [N, K]
    scales: torch.Tensor  # float32 [N, groups]
    zeros: torch.Tensor | None = None  # uint8 [N, groups]


@dataclass(slots=True)
class QuantizedLinear:
    """Quantized weights in the layout of the backend that packed them; only that backend reads `data`.

    `dtype` is that of the weight that was quantized, of the bias and of the results.
    """

    out_features: int
    in_features: int
    dtype: torch.dtype
    data: QuantizedWeights | torch.Tensor
    bias: torch.Tensor | None


@dataclass(slots=True)
class KeptLinear:
    """A packed linear taken apart, so that it can be kept in a file. `bits` 0 is a PackedLinear, others are quantized."""

    out_features: int
    in_features: int
    dtype: torch.dtype
    bits: int
    group: int
    zero_points: bool
    data: torch.Tensor  # uint8 [bytes], in the layout that the backend's `packed_layout` names
    bias: torch.Tensor | None  # [N] in dtype


def joined(weight: Parts, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight as one tensor [N, K], in `dtype` or as it is."""
    parts = [weight] if isinstance(weight, torch.Tensor) else list(weight)
    parts = [part.detach() if dtype is None else part.detach().to(dtype) for part in parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts)

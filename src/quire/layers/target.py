"""Target: where one named weight of a checkpoint goes.

The loader only sees targets; whether a weight becomes a plain parameter, one slice of a merged matrix or a quantized
block is known to the layer that made the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """A place for one weight: the shape it must have, the dtype it is kept in, and the function that takes it.

    `load` is called exactly once, with a tensor of `shape` in any floating dtype that may be a view of a mapped file, or
    for a linear's weight a StoredWeight of that shape, see quant/checkpoints.py:
    it keeps its own copy, or the view itself where the bytes can stay as they are. It may return the tensor that it
    kept, for a tied target to share; None means that nothing readable was kept.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[Any], torch.Tensor | None]

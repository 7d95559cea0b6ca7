"""MaskSpec: the structure of a mask that a model asked for, instead of the mask tensor.

Transformers composes a mask from small functions; their closures say which window, chunk or blocks were meant. A layer
receives the spec in place of the tensor, so the probe sees which mask belongs to which layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function, eager_mask

from quire.errors import UnsupportedModelError

OWN_MASK = "the model computes with the mask itself instead of leaving it to the attention interface"


@dataclass(frozen=True, slots=True, eq=False)
class MaskSpec:
    """`custom` names whatever is not causal, window or chunk: such a mask must not be run as if it were plain."""

    function: Callable[..., Any]
    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    custom: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether causal, window and chunk say all of it."""
        return self.causal and not self.custom

    def to(self, *_: Any, **__: Any) -> MaskSpec:
        """Models move and cast masks; a spec has no device."""
        return self

    def __getitem__(self, _: Any) -> MaskSpec:
        """Models crop masks to the key length; a spec has no extent."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Whoever asks for the mask's shape or dtype is about to compute with it."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnsupportedModelError(OWN_MASK)

    def __radd__(self, _: Any) -> Any:
        raise UnsupportedModelError(OWN_MASK)

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise UnsupportedModelError(OWN_MASK)

    def tensor(self, start: int, count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """The additive mask [1, 1, count, start + count] of `count` new positions after `start` known ones."""
        return eager_mask(
            batch_size=1,
            q_length=count,
            kv_length=start + count,
            q_offset=start,
            kv_offset=0,
            mask_function=self.function,
            attention_mask=None,
            dtype=dtype,
            allow_is_causal_skip=False,
            device=device,
        )


def mask_spec(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Any = None,
    local_size: int | None = None,
    **_: Any,
) -> MaskSpec:
    """What Transformers calls to build a mask; the signature is the library's. Returns the spec, reads no sizes."""
    found = _Found()
    found.walk(mask_function)
    if found.window is None and found.chunk is None:
        found.window = local_size
    return MaskSpec(mask_function, found.causal, found.window, found.chunk, tuple(found.custom))


class _Found:
    """Collects the parts of one mask function, which the library nests in closures."""

    def __init__(self) -> None:
        self.causal = False
        self.window: int | None = None
        self.chunk: int | None = None
        self.custom: list[str] = []

    def walk(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__qualname__", str(function))
        held = _closure(function)
        if name.startswith("and_masks"):
            for part in held["mask_functions"]:
                self.walk(part)
        elif name.startswith("sliding_window_overlay"):
            self.window = held["sliding_window"]
        elif name.startswith("chunked_overlay"):
            self.chunk = held["chunk_size"]
        elif name == "causal_mask_function":
            self.causal = True
        elif name.startswith("or_masks"):
            self._walk_union(held["mask_functions"])
        else:
            self.custom.append(name)

    def _walk_union(self, parts: Any) -> None:
        """A union with blocks that no position belongs to is its first part; any other union is custom."""
        self.walk(parts[0])
        for part in parts[1:]:
            if getattr(part, "__qualname__", "").startswith("blockwise_overlay"):
                blocks = _closure(part)["block_sequence_ids"]
                if blocks.is_meta or not bool((blocks >= 0).any()):
                    continue
            self.custom.append(getattr(part, "__qualname__", str(part)))


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None)
    if not cells:
        return {}
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))

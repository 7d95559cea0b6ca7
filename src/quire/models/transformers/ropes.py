"""Rotary modules whose frequencies depend on how long the sequence is (dynamic, longrope), computed row by row.

The library takes the longest position of the whole call. On a packed row that would let one request change another's
answer, and chunks change their own. Here the length that counts for a row is its prompt's, or its own position plus
one when that is more: what the library does for a request alone and unchunked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quire.layers.batch import Batch
from quire.models.transformers.interface import current_batch


def length_ropes(model: nn.Module) -> tuple[str, ...]:
    """Names of the rotary modules whose frequencies depend on the length of the sequence."""
    return tuple(name for name, module in model.named_modules() if any(map(_depends, _types(module).values())))


def _types(module: nn.Module) -> dict[str | None, str]:
    """The rope type of a rotary module, per layer type where it has several; empty for other modules."""
    found = getattr(module, "rope_type", None)
    if isinstance(found, str):
        return {None: found}
    return dict(found) if isinstance(found, dict) else {}


def _depends(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


class LengthRope:
    """Stands in for the forward of such a module: rows are grouped by the frequencies that they need."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._run = module.forward
        self._types = _types(module)

    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        run = self._run if layer_type is None else lambda x, positions: self._run(x, positions, layer_type)
        rope_type = self._types[layer_type]
        if not _depends(rope_type):
            return run(x, position_ids)
        threshold = self._threshold(rope_type, layer_type)
        lengths = row_lengths(current_batch.get())
        self._reset(layer_type)
        if int(lengths.max()) <= threshold:
            return run(x, position_ids)
        parts = []
        for length in lengths.clamp(min=threshold).unique().tolist():
            if rope_type == "longrope" and length > threshold:
                rows = (lengths > threshold).nonzero()[:, 0]  # one other set of frequencies, whatever the length
            elif length > threshold:
                rows = (lengths == length).nonzero()[:, 0]
            else:
                rows = (lengths <= threshold).nonzero()[:, 0]
            # One more position, the last of that length, tells the library which frequencies to take.
            last = position_ids.new_full((*position_ids.shape[:-1], 1), length - 1)
            positions = torch.cat([position_ids.index_select(-1, rows), last], -1)
            self._reset(layer_type)
            parts.append((rows, run(x, positions)))
            if rope_type == "longrope" and length > threshold:
                break
        return _scatter(parts, position_ids.shape[-1])

    def _threshold(self, rope_type: str, layer_type: str | None) -> int:
        """The longest sequence that has the original frequencies."""
        if "dynamic" in rope_type:
            return self._module.original_max_seq_len
        parameters = self._module.config.rope_parameters
        parameters = parameters if layer_type is None else parameters[layer_type]
        return parameters["original_max_position_embeddings"]

    def _reset(self, layer_type: str | None) -> None:
        """Forget the longest sequence seen so far, which the library remembers in the module."""
        prefix = "" if layer_type is None else f"{layer_type}_"
        original = getattr(self._module, f"{prefix}original_inv_freq")
        inverse = getattr(self._module, f"{prefix}inv_freq")
        if inverse.shape == original.shape:
            inverse.copy_(original)
        if hasattr(self._module, "max_seq_len_cached"):
            setattr(self._module, f"{prefix}max_seq_len_cached", self._module.original_max_seq_len)


def row_lengths(batch: Batch) -> torch.Tensor:
    """For each row [T] the length that its frequencies depend on."""
    lengths = batch.lengths if batch.prompt_lengths is None else batch.prompt_lengths
    counts = (batch.starts[1:] - batch.starts[:-1]).long()
    return torch.maximum(lengths.long().repeat_interleave(counts), batch.positions + 1)


def _scatter(parts: list[tuple[torch.Tensor, Any]], rows: int) -> Any:
    """Join outputs [1, n + 1, ...] of groups of rows, whose last entry is surplus, to [1, rows, ...]."""
    first = parts[0][1]
    if isinstance(first, tuple):
        return tuple(_scatter([(place, output[i]) for place, output in parts], rows) for i in range(len(first)))
    whole = first.new_empty(first.shape[0], rows, *first.shape[2:])
    for place, output in parts:
        whole[:, place] = output[:, :-1]
    return whole

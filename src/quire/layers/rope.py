"""Rotary position embedding: the cosines and sines of a step's positions, shared by all layers.

How the frequencies follow from a model's config is not known here. Frequencies that depend on a sequence's length
(dynamic, longrope) are chosen per row from that sequence alone, so that batch mates and chunks change nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from quire.layers.batch import Batch


@dataclass(frozen=True, slots=True)
class Frequencies:
    """The R/2 inverse frequencies of the rotated dimensions, and the factor laid on cosines and sines.

    For sequences longer than `threshold` positions, `beyond(length)` gives the frequencies instead; the length of a
    row is its prompt's, or its own position plus one when that is more.
    """

    inverse: torch.Tensor  # float32 [R/2]
    scaling: float = 1.0
    threshold: int | None = None
    beyond: Callable[[int], torch.Tensor] | None = None


class Rotary:
    """Makes cos and sin [T, R] in the model's dtype. For "half" each angle appears R/2 apart, else side by side."""

    def __init__(
        self, frequencies: Frequencies, style: Literal["half", "interleaved"], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.frequencies = frequencies
        self.style = style
        self._dtype = dtype
        self._inverse = frequencies.inverse.to(device)

    def tables(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos [T, R], sin [T, R]) of the step's positions."""
        cos, sin = self._angles(batch.positions, self._inverse)
        if self.frequencies.threshold is not None:
            self._replace_beyond(batch, self.frequencies.threshold, cos, sin)
        return cos, sin

    def _replace_beyond(self, batch: Batch, threshold: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Overwrite the rows whose sequence is longer than the threshold."""
        assert batch.prompt_lengths is not None, "frequencies that depend on the length need the prompts' lengths"
        prompts = batch.prompt_lengths.tolist()
        for s, (length, prompt) in enumerate(zip(batch.lengths_host, prompts, strict=True)):
            if max(length, prompt) <= threshold:
                continue
            first, last = batch.starts_host[s], batch.starts_host[s + 1]
            start = length - (last - first)
            in_prompt = min(max(prompt - start, 0), last - first)
            if in_prompt and prompt > threshold:
                self._write(cos, sin, first, start, in_prompt, prompt)
            for row in range(first + in_prompt, last):
                position = start + row - first
                if position + 1 > threshold:
                    self._write(cos, sin, row, position, 1, position + 1)

    def _write(self, cos: torch.Tensor, sin: torch.Tensor, row: int, position: int, count: int, length: int) -> None:
        assert self.frequencies.beyond is not None
        positions = torch.arange(position, position + count, device=cos.device)
        inverse = self.frequencies.beyond(length).to(cos.device)
        cos[row : row + count], sin[row : row + count] = self._angles(positions, inverse)

    def _angles(self, positions: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None].float() * inverse[None, :].float()
        both = torch.cat((angles, angles), -1) if self.style == "half" else angles.repeat_interleave(2, -1)
        scaling = self.frequencies.scaling
        return (both.cos() * scaling).to(self._dtype), (both.sin() * scaling).to(self._dtype)

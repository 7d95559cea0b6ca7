"""Logits processors: the operator's own steps, found as plugins when the engine starts, asked for by requests.

A processor is a function of the request's parameters that returns None, or what is done to the scores of this request.
A plugin that fails takes down the request that asked for it and no other.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence

import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission
from quire.errors import ConfigError
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots

GROUP = "quire.logits_processors"  # of entry points
NEVER = float("-inf")

# (prompt, output so far, scores float32 [V]) -> scores; the given ones may be changed in place and returned.
RowProcessor = Callable[[list[int], list[int], torch.Tensor], torch.Tensor]
LogitsProcessor = Callable[[SamplingParams], RowProcessor | None]


def find_processors(paths: Sequence[str]) -> tuple[LogitsProcessor, ...]:
    """Those that packages announce, then those of the option, "module:name" each. ConfigError names what is wrong."""
    entries = {entry.name: entry.value for entry in sorted(importlib.metadata.entry_points(group=GROUP))}
    loaded = []
    for name, path in (*entries.items(), *zip(paths, paths, strict=True)):
        try:
            processor = _imported(path)
        except Exception as error:
            raise ConfigError(
                f"The logits processor {name!r} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        loaded.append(processor)
    return tuple(loaded)


def _imported(path: str) -> LogitsProcessor:
    module, _, name = path.partition(":")
    if not name:
        module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not callable(found):
        raise TypeError(f"it is {type(found).__name__}, which cannot be called")
    return found


class Processors:
    """The plugins' steps, in the order in which they were found."""

    def __init__(self, slots: Slots, device: Device, processors: Sequence[LogitsProcessor]) -> None:
        self._slots = slots
        self._processors = processors
        self._rows: dict[int, list[RowProcessor]] = {}

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Ask each plugin what it does to this request. What it raises fails the request."""
        wanted = [row for row in (processor(params) for processor in self._processors) if row is not None]
        self._rows[new.slot] = wanted
        return bool(wanted)

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Let them change the scores; a row whose plugin fails is left without any token."""
        for row in using:
            slot, end = int(rows.slots_host[row]), int(rows.positions_host[row])
            tokens, first = self._slots.tokens[slot, :end].tolist(), int(self._slots.prompt_lens[slot])
            try:
                scores = logits[row].clone()
                for process in self._rows[slot]:
                    scores = process(tokens[:first], tokens[first:], scores)
                logits[row] = scores
            except Exception as error:  # whatever a plugin does, it must not reach the neighbours
                logits[row] = NEVER
                self._slots.errors[slot] = f"a logits processor failed: {type(error).__name__}: {error}"

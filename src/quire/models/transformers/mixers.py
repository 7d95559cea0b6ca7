"""Recurrent mixers on paged state: decode rows of all sequences in one call, prompt chunks sequence by sequence.

The mixer's own forward runs unchanged; it meets a cache of the library that holds copies of the states on the pages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DummyLayer, LinearAttentionLayer

from quire.errors import UnsupportedModelError
from quire.layers.batch import Batch
from quire.layers.spec import LayerSpec
from quire.layers.state import read_states, write_states
from quire.models.transformers.interface import BATCH_ARGUMENT, current_batch
from quire.models.transformers.report import MixerPlan


class StepSplit:
    """Which sequences of a step decode one token and which bring a chunk. Worked out once per step for all mixers."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.sequences: torch.Tensor | None = None  # int64 [n]: the decoding ones
        self.rows: torch.Tensor | None = None  # int64 [n]: their rows
        self.chunks: list[tuple[int, bool]] = []  # (sequence, whether it has a past)
        self.all_decode = False

    def update(self, batch: Batch) -> None:
        """Sort the sequences of this step; nothing to do when it is the step already seen."""
        if self.batch is batch:
            return
        self.batch = batch
        decoding: list[int] = []
        self.chunks = []
        for s, length in enumerate(batch.lengths_host):
            count = batch.starts_host[s + 1] - batch.starts_host[s]
            if count == 1 and length > 1:
                decoding.append(s)
            else:
                self.chunks.append((s, length > count))
        self.all_decode = not self.chunks
        device = batch.token_ids.device
        self.sequences = torch.tensor(decoding, device=device) if decoding else None
        self.rows = torch.tensor([batch.starts_host[s] for s in decoding], device=device) if decoding else None


class Mixer:
    """Stands in for one mixer's forward. The states live in batch.caches; nothing is kept between steps."""

    def __init__(self, module: nn.Module, plan: MixerPlan, spec: LayerSpec, split: StepSplit) -> None:
        self._run = module.forward
        self._index = plan.index
        self._group = spec.group
        self._layer = plan.layer
        self._names = [state.name.split(".") for state in spec.states]
        self._states = max(int(number) for _, number in self._names) + 1
        self._split = split
        self._stepwise = plan.stepwise
        self._outputs = plan.outputs
        names = list(inspect.signature(module.forward).parameters)
        self._row_positions = frozenset(i for i, name in enumerate(names) if name in plan.row_arguments)
        self._row_names = frozenset(plan.row_arguments)
        self._cache = Cache(layers=[DummyLayer() for _ in range(plan.layer + 1)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        batch = kwargs.pop(BATCH_ARGUMENT, None)
        if batch is None:
            batch = current_batch.get()
        split = self._split
        split.update(batch)
        tensors = batch.caches[self._index]
        pages = batch.groups[self._group].tables[:, 0].long()
        if split.all_decode:
            outputs = self._decode(args, kwargs, tensors, pages[split.sequences], None)
            return self._wrap([None if output is None else output[None] for output in outputs])
        parts: list[tuple[Any, list[Any]]] = []  # (rows, their outputs [rows, ...])
        if split.rows is not None:
            parts.append((split.rows, self._decode(args, kwargs, tensors, pages[split.sequences], split.rows)))
        for s, has_past in split.chunks:
            low, high = batch.starts_host[s], batch.starts_host[s + 1]
            parts.append((slice(low, high), self._chunk(args, kwargs, tensors, pages[s : s + 1], low, high, has_past)))
        return self._wrap(_scatter(parts, len(batch.token_ids)))

    def _wrap(self, outputs: list[Any]) -> Any:
        return outputs[0] if self._outputs is None else tuple(outputs)

    def _decode(
        self, args: Any, kwargs: Any, tensors: list[torch.Tensor], pages: torch.Tensor, rows: torch.Tensor | None
    ) -> list[Any]:
        """One token of each sequence: the rows become the batch dimension. Returns outputs [n, ...]."""

        def pick(x: torch.Tensor) -> torch.Tensor:
            return (x[0] if rows is None else x[0].index_select(0, rows))[:, None]

        outputs = self._call(args, kwargs, pick, tensors, pages, has_past=True)
        return [None if output is None else output[:, 0] for output in outputs]

    def _chunk(
        self,
        args: Any,
        kwargs: Any,
        tensors: list[torch.Tensor],
        page: torch.Tensor,
        low: int,
        high: int,
        has_past: bool,
    ) -> list[Any]:
        """Rows low..high of one sequence. Returns outputs [high - low, ...]."""
        if has_past and self._stepwise:
            steps = [self._call(args, kwargs, _rows(i, i + 1), tensors, page, has_past) for i in range(low, high)]
            outputs = [None if same[0] is None else torch.cat(same, 1) for same in zip(*steps, strict=True)]
        else:
            outputs = self._call(args, kwargs, _rows(low, high), tensors, page, has_past)
        return [None if output is None else output[0] for output in outputs]

    def _call(
        self,
        args: Any,
        kwargs: Any,
        pick: Callable[[torch.Tensor], torch.Tensor],
        tensors: list[torch.Tensor],
        pages: torch.Tensor,
        has_past: bool,
    ) -> list[Any]:
        """The mixer's own forward on some rows, with the states of their sequences read before and written after."""
        layer = LinearAttentionLayer(number_of_states=self._states)
        if has_past:
            self._fill(layer, read_states(tensors, pages))
        self._cache.layers[self._layer] = layer
        chosen = [self._choose(i in self._row_positions, value, pick) for i, value in enumerate(args)]
        named = {name: self._choose(name in self._row_names, value, pick) for name, value in kwargs.items()}
        output = self._run(*chosen, **named)
        write_states(tensors, pages, [getattr(layer, f"{kind}_states")[int(n)] for kind, n in self._names])
        if self._outputs is None:
            return [output]
        return [part if along else None for part, along in zip(output, self._outputs, strict=True)]

    def _choose(self, is_row: bool, value: Any, pick: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        if isinstance(value, Cache):
            return self._cache
        if not is_row or value is None:
            return value
        if isinstance(value, tuple | list):
            return type(value)(pick(part) for part in value)
        return pick(value)

    def _fill(self, layer: LinearAttentionLayer, states: list[torch.Tensor]) -> None:
        """Make the layer look as if it had computed these states itself."""
        for (kind, number), state in zip(self._names, states, strict=True):
            n = int(number)
            getattr(layer, f"{kind}_states")[n] = state
            getattr(layer, f"is_{kind}_states_initialized")[n] = True
            layer.has_previous_state[n] = True
            if kind == "conv":
                layer.conv_kernel_size[n] = state.shape[-1]
                layer.dtype, layer.device = state.dtype, state.device


def _scatter(parts: list[tuple[Any, list[Any]]], rows: int) -> list[Any]:
    """Outputs of some rows each -> whole outputs [1, rows, ...]."""
    whole: list[Any] = []
    for i, sample in enumerate(parts[0][1]):
        if sample is None:
            whole.append(None)
            continue
        target = sample.new_empty(rows, *sample.shape[1:])
        for place, outputs in parts:
            target[place] = outputs[i]
        whole.append(target[None])
    return whole


def stray_state(*_: Any, **__: Any) -> None:
    """What the packed cache answers when a module that the probe did not find asks for recurrent state."""
    raise UnsupportedModelError("A module asked for recurrent state that the probe did not see on the tiny twin.")


def _rows(low: int, high: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Takes rows low..high of a packed tensor [1, T, ...]."""
    return lambda x: x[:, low:high]

"""The slow but general ways: attention modules one sequence at a time (tier B), or the whole model so (tier C).

Past keys, values and states stay in caches of the library, one per request slot, outside the pages; they are dropped
when the request leaves and made anew when it starts over.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)

from quire.layers.batch import Batch
from quire.layers.spec import ModelLayout
from quire.models.transformers.interface import BATCH_ARGUMENT, current_batch
from quire.models.transformers.masks import MaskSpec
from quire.models.transformers.report import ProbeReport, SequentialPlan

CARRIED = ("past_key_values", "cache_params", "state", "mems")  # what a model may return to be given back next time


def private_cache(config: Any, full_length: bool = True) -> DynamicCache:
    """An empty cache of the library for one sequence; with `full_length`, window layers keep all positions."""
    cache = DynamicCache(config=config)
    for i, layer in enumerate(cache.layers if full_length else []):
        if type(layer) is DynamicSlidingWindowLayer:
            cache.layers[i] = DynamicLayer()
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            cache.layers[i] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return cache


class PrivateCaches:
    """One cache per request slot. TransformersModel.forward calls `begin` before each step."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._by_slot: dict[int, DynamicCache] = {}

    def begin(self, batch: Batch) -> None:
        """Give a fresh cache to each sequence of the step that starts from its first position."""
        for s, slot in enumerate(batch.rows_host):
            if batch.lengths_host[s] == batch.starts_host[s + 1] - batch.starts_host[s]:
                self._by_slot[slot] = private_cache(self._config)

    def of(self, slot: int) -> DynamicCache:
        return self._by_slot[slot]

    def release(self, slot: int) -> None:
        self._by_slot.pop(slot, None)


class SequentialModule:
    """Stands in for the forward of one module: its own code, once per sequence, on the sequence's private cache."""

    def __init__(self, module: nn.Module, plan: SequentialPlan, caches: PrivateCaches) -> None:
        self._run = module.forward
        self._caches = caches
        names = list(inspect.signature(module.forward).parameters)
        self._row_positions = frozenset(i for i, name in enumerate(names) if name in plan.row_arguments)
        self._row_names = frozenset(plan.row_arguments)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop(BATCH_ARGUMENT, None)
        batch = current_batch.get()
        outputs, counts = [], []
        for s, slot in enumerate(batch.rows_host):
            span = _Span(batch.starts_host[s], batch.starts_host[s + 1], batch.lengths_host[s], self._caches.of(slot))
            chosen = [span.choose(i in self._row_positions, value) for i, value in enumerate(args)]
            named = {name: span.choose(name in self._row_names, value) for name, value in kwargs.items()}
            outputs.append(self._run(*chosen, **named))
            counts.append(span.high - span.low)
        return _join(outputs, counts)


class _Span:
    """Rows low..high of the packed row: one sequence that is `length` long after the step."""

    __slots__ = ("cache", "high", "length", "low")

    def __init__(self, low: int, high: int, length: int, cache: Cache) -> None:
        self.low, self.high, self.length, self.cache = low, high, length, cache

    def choose(self, is_row: bool, value: Any) -> Any:
        """What this sequence gets in place of an argument that was made for the whole packed row."""
        if isinstance(value, Cache):
            return self.cache
        if isinstance(value, MaskSpec):
            count = self.high - self.low
            return value.tensor(self.length - count, count, torch.get_default_dtype(), torch.device("cpu"))
        if not is_row or value is None:
            return value
        if isinstance(value, tuple | list):
            return type(value)(part[:, self.low : self.high] for part in value)
        return value[:, self.low : self.high]


def _join(outputs: list[Any], counts: list[int]) -> Any:
    """Outputs of the sequences along the packed row; parts of a tuple that do not run along positions become None."""
    first = outputs[0]
    if isinstance(first, tuple):
        return tuple(_join([output[i] for output in outputs], counts) for i in range(len(first)))
    if torch.is_tensor(first) and all(o.dim() >= 2 and o.shape[1] == n for o, n in zip(outputs, counts, strict=True)):
        return torch.cat(outputs, 1)
    return None


class SequentialModel:
    """A ServedModel of tier C: each sequence through the whole model on its own."""

    layout: ModelLayout

    def __init__(self, model: nn.Module, report: ProbeReport) -> None:
        self.layout = report.layout
        self.hf_config = model.config
        self.model = model
        self._mode = report.mode
        self._arguments = frozenset(report.arguments)
        self._cache_argument = report.cache_argument
        self._carried: dict[int, dict[str, Any]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._generations: dict[int, Generation] = {}
        self._carried_names = [name for name in CARRIED if name in forward_parameters(model)]

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits [R, V] of batch.logit_rows; see ServedModel."""
        wanted = batch.logit_rows.tolist()
        prompts = batch.lengths if batch.prompt_lengths is None else batch.prompt_lengths
        parts = []
        with torch.no_grad():
            for s, (slot, prompt) in enumerate(zip(batch.rows_host, prompts.tolist(), strict=True)):
                low, high = batch.starts_host[s], batch.starts_host[s + 1]
                start = batch.lengths_host[s] - (high - low)
                if start == 0:
                    self.release(slot)
                rows = [row - low for row in wanted if low <= row < high]
                tokens = batch.token_ids[low:high]
                pieces = self._pieces(start, high - low, prompt)
                if self._mode in ("generate", "recompute"):
                    parts += self._generate(slot, start, tokens.tolist(), pieces, rows)
                else:
                    positions = batch.positions[low:high]
                    steps = [self._advance(slot, tokens[a:b], positions[a:b]) for a, b in pieces]
                    parts.append(torch.cat(steps)[rows])
        # A step of prompts that are not at their end yet wants no logits at all.
        return torch.cat(parts) if parts else torch.empty(0, self.layout.vocab_size)

    def release(self, slot: int) -> None:
        """Drop what is kept for the request in this row."""
        self._carried.pop(slot, None)
        self._tokens.pop(slot, None)
        self._generations.pop(slot, None)

    def _pieces(self, start: int, count: int, prompt: int) -> list[tuple[int, int]]:
        """The parts of a span that the model computes at once, counted from its beginning.

        Where prompts stay whole, a request that starts over goes through its prompt at once and through what it has
        generated token by token, as it did before: such a model answers otherwise when all comes together.
        """
        if self.layout.chunked_prefill:
            return [(0, count)]
        first = max(min(prompt - start, count), 0)
        return [(0, first)] * (first > 0) + [(n, n + 1) for n in range(first, count)]

    def _advance(self, slot: int, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The next positions of one sequence -> logits [count, V]."""
        carried = self._carried.get(slot)
        arguments: dict[str, Any] = {"input_ids": tokens[None], **(carried or {})}
        if carried is None and self._mode == "cache" and self._cache_argument is not None:
            arguments[self._cache_argument] = private_cache(self.hf_config, full_length=False)
        if "position_ids" in self._arguments:
            arguments["position_ids"] = positions[None]
        if "use_cache" in self._arguments:
            arguments["use_cache"] = True
        output = self.model(**arguments)
        returned = {name: getattr(output, name, None) for name in self._carried_names}
        self._carried[slot] = {name: value for name, value in returned.items() if value is not None}
        return logits_of(output)

    def _generate(
        self, slot: int, start: int, tokens: list[int], pieces: list[tuple[int, int]], rows: list[int]
    ) -> list[torch.Tensor]:
        """The logits [1, V] of each wanted row: of the request's own generation where that passes it, else of a new one."""
        known = self._tokens.setdefault(slot, [])
        known[start:] = tokens
        answers = {}
        if self._mode == "generate":
            running = self._generations.setdefault(slot, Generation(self.model, self._cache_argument))
            answers = {last - 1: running.step(known[: start + last]) for _, last in pieces}
        missing = [row for row in rows if row not in answers]
        answers |= {row: Generation(self.model, keeps=False).step(known[: start + row + 1]) for row in missing}
        return [answers[row] for row in rows]


class Generation:
    """One sequence as the library's `generate` drives it: each step prepared, and followed up, by the model's own methods.

    Where it keeps nothing of a step for the next one, it is good for one step.
    """

    def __init__(self, model: Any, cache_argument: str | None = None, keeps: bool = True) -> None:
        self._model = model
        self._keeps = keeps
        self._cache = {cache_argument: private_cache(model.config, full_length=False)} if cache_argument else {}
        self._arguments: dict[str, Any] = {}

    def step(self, tokens: list[int]) -> torch.Tensor:
        """The logits [1, V] behind all tokens so far: those of a prompt, then one more each time."""
        ids = torch.tensor([tokens])
        first = not self._arguments
        if first:
            self._arguments = {"attention_mask": torch.ones_like(ids), "use_cache": self._keeps, **self._cache}
            if "position_ids" in forward_parameters(self._model):
                self._arguments["position_ids"] = torch.arange(len(tokens))[None]
        inputs = self._model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=1 if self._keeps and not first else None,
            is_first_iteration=first,
            **self._arguments,
        )
        output = self._model(**inputs, return_dict=True)
        self._arguments = self._model._update_model_kwargs_for_generation(output, self._arguments)
        return logits_of(output)[-1:]


def logits_of(output: Any) -> torch.Tensor:
    """Logits [T, V] of what a model's forward returned for one sequence."""
    return (output.logits if hasattr(output, "logits") else output[0])[0]


def forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of the model's forward, as its author wrote it."""
    return dict(inspect.signature(inspect.unwrap(type(model).forward)).parameters)

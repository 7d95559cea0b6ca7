"""TransformersModel: the library's own modeling code on one packed row, with paged attention and paged state.

Built from a model object and the probe's report. It decides nothing: the report says which module makes which call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from quire.kernels.programs import NotRecordableError, Opaque, without_step
from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.layers.latent import LatentProjection
from quire.layers.spec import ModelLayout
from quire.models.transformers.fallback import PrivateCaches, SequentialModule
from quire.models.transformers.hidden_states import AroundBody, Tapped, layers_of
from quire.models.transformers.interface import (
    BATCH_ARGUMENT,
    PAGED,
    SPEC,
    CallSequence,
    LayerCall,
    current_batch,
)
from quire.models.transformers.mixers import Mixer, StepSplit, stray_state
from quire.models.transformers.report import CallPlan, ProbeReport, class_key
from quire.models.transformers.ropes import LengthRope


class PassThroughCache(DynamicCache):
    """What the model believes to be its cache: new keys and values pass through, because pages hold the old ones.

    It reports no past, so that no model derives a position or a mask from it; positions come as arguments. A single layer
    that asks for its own past adds the numbers of its rows to that, for their positions (llama4): it gets what gives these.
    """

    positions: torch.Tensor | None = None  # [T] of the step

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
        return key, value

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        if layer_idx is None or self.positions is None:
            return 0
        return self.positions - torch.arange(len(self.positions), device=self.positions.device)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = stray_state
    update_indexer = stray_state


class TransformersModel:
    """A ServedModel of tier A or A+mixer (or B, where some modules run per sequence)."""

    layout: ModelLayout

    def __init__(self, model: nn.Module, report: ProbeReport, ops: Ops) -> None:
        self.layout = report.layout
        self.hf_config = model.config
        self.model = model
        self._sequences: list[CallSequence] = []
        self._through_context = not report.batch_argument
        self._select_rows = "logits_to_keep" not in report.arguments
        self._keep_rows = not self._select_rows
        self._positions = "position_ids" in report.arguments
        self._fixed: dict[str, Any] = {}
        self._around: AroundBody | None = None
        self._cache = PassThroughCache(config=model.config)
        if report.cache_argument is not None:
            self._fixed[report.cache_argument] = self._cache
        if "use_cache" in report.arguments:
            self._fixed["use_cache"] = True
        self._attach_calls(report, ops)
        self._attach_mixers(report)
        self._private: PrivateCaches | None = None
        if report.sequential:
            self._private = PrivateCaches(model.config)
            self._attach_sequential(report, self._private)
        for module in model.modules():
            if hasattr(module, "warn_if_padding_and_no_attention_mask"):
                module.__dict__["warn_if_padding_and_no_attention_mask"] = _no_padding
        for name in report.ropes:
            rope = model.get_submodule(name)
            rope.__dict__["forward"] = LengthRope(rope)
        set_attention(model, SPEC if report.sequential else PAGED)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits [R, V] of batch.logit_rows; see ServedModel."""
        arguments: dict[str, Any] = {"input_ids": batch.token_ids[None]}
        if self._keep_rows:
            arguments["logits_to_keep"] = batch.logit_rows
        output = self._run(self.model, arguments, batch)
        logits = output.logits[0] if hasattr(output, "logits") else output[0][0]
        return logits.index_select(0, batch.logit_rows) if self._select_rows else logits

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """See OpenModel."""
        return self.model.get_input_embeddings()(ids)

    def states(self, batch: Batch, rows: torch.Tensor | None = None, taps: Sequence[int] = ()) -> torch.Tensor:
        """See OpenModel."""
        with Tapped(layers_of(self.model) if taps else [], taps) as read:
            hidden = self._run(self.model.base_model, {"input_ids": batch.token_ids[None]}, batch)[0][0]
        if taps:
            return torch.cat([hidden, *(read[tap] for tap in taps)], dim=-1)
        return hidden if rows is None else hidden.index_select(0, rows)

    def states_of(self, embedded: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The last states [T, size] of a step whose positions begin with `embedded` [T, size], not with their tokens."""
        return self._run(self.model.base_model, {"inputs_embeds": embedded[None]}, batch)[0][0]

    @torch.no_grad()
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """See OpenModel: the library's own code around the model's body."""
        if self._around is None:
            self._around = AroundBody(self.model)
        return self._around.score(states)

    def _run(self, module: nn.Module, own: dict[str, Any], batch: Batch) -> Any:
        """The library's forward of the model or of its body, in a step."""
        arguments = {**self._fixed, **own}
        if self._positions:
            arguments["position_ids"] = batch.positions[None]
        self._cache.positions = batch.positions
        for calls in self._sequences:
            calls.restart()
        if self._private is not None:
            self._private.begin(batch)
        with torch.no_grad():
            if self._through_context:
                token = current_batch.set(batch)
                try:
                    return module(**arguments)
                finally:
                    current_batch.reset(token)
            arguments[BATCH_ARGUMENT] = batch
            return module(**arguments)

    def opaque(self) -> list[Opaque]:
        """Mixers, and experts without a call for all of them, look at numbers while they run. Raises NotRecordableError for
        tier B."""
        if self._private is not None:
            raise NotRecordableError("some of its modules run one sequence at a time")
        found = []
        for module in self.model.modules():
            attached = module.__dict__
            if "quire_experts" in attached:
                if attached["quire_experts"].stack is not None:
                    continue
                found.append(Opaque(attached, "quire_experts", without_step(attached["quire_experts"])))
            elif isinstance(attached.get("forward"), Mixer):
                found.append(Opaque(attached, "forward", _within_step(attached["forward"])))
        return found

    def release(self, slot: int) -> None:
        """Drop the private cache of tier B; nothing else is kept outside the caches of the batch."""
        if self._private is not None:
            self._private.release(slot)

    def _attach_calls(self, report: ProbeReport, ops: Ops) -> None:
        by_module: dict[str, list[LayerCall]] = {}
        for plan in report.calls:
            by_module.setdefault(plan.module, []).append(self._call(plan, report, ops))
        for name, calls in by_module.items():
            answer = calls[0] if len(calls) == 1 else CallSequence(calls)
            if isinstance(answer, CallSequence):
                self._sequences.append(answer)
            self.model.get_submodule(name).__dict__["quire_call"] = answer

    def _call(self, plan: CallPlan, report: ProbeReport, ops: Ops) -> LayerCall:
        spec = self.layout.layers[plan.index]
        if not spec.shared:
            return LayerCall(ops, spec, plan.index)
        module = self.model.get_submodule(plan.module)
        projection = module.get_submodule(report.rewrite.latent[class_key(module)])
        assert isinstance(projection, LatentProjection)
        return LayerCall(ops, spec, plan.index, projection)

    def _attach_mixers(self, report: ProbeReport) -> None:
        split = StepSplit()
        for plan in report.mixers:
            module = self.model.get_submodule(plan.module)
            module.__dict__["forward"] = Mixer(module, plan, self.layout.layers[plan.index], split)

    def _attach_sequential(self, report: ProbeReport, private: PrivateCaches) -> None:
        for plan in report.sequential:
            module = self.model.get_submodule(plan.module)
            module.__dict__["forward"] = SequentialModule(module, plan, private)


def _no_padding(*_: Any) -> None:
    """In place of a search for padding tokens in every step: a packed row has none."""


def _within_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """An opaque function from one that finds the step in the context."""

    def call(step: Batch, *args: Any, **kwargs: Any) -> Any:
        token = current_batch.set(step)
        try:
            return function(*args, **kwargs)
        finally:
            current_batch.reset(token)

    return call


def set_attention(model: nn.Module, name: str) -> None:
    """Let every config that a module of the model reads name this attention implementation."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation = name

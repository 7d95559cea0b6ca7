"""Chooses the tier of a model: tries each way of serving it on the tiny twin and takes the first that proves equal.

Equal means: teacher-forced logits of several sequences, packed together in odd chunks on shuffled pages that start as
NaN, are those of the unmodified twin run on each sequence alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quire.errors import UnsupportedModelError
from quire.kernels.table import Ops
from quire.layers.spec import LayerSpec, ModelLayout
from quire.models.probing.reference import (
    SINGLE,
    TOLERANCE,
    Reference,
    cache_argument,
    takes,
    takes_anything,
    whole,
)
from quire.models.served import ServedModel
from quire.models.transformers.fallback import SequentialModel
from quire.models.transformers.interface import BATCH_ARGUMENT
from quire.models.transformers.model import TransformersModel, set_attention
from quire.models.transformers.report import CallPlan, MixerPlan, ProbeReport, SequentialMode, SequentialPlan
from quire.models.transformers.ropes import length_ropes
from quire.models.twin.observe import ROWS, ModelObserver, Observation
from quire.models.twin.shrink import twin_model
from quire.models.twin.trial import PagedLoop, Sequence

logger = logging.getLogger(__name__)

DEFAULT_ATTENTION = "sdpa"  # of the library, for models that have it
ATTENTIONS_DISAGREE = "the library's default attention, which is followed, gives other answers"
CHUNKS = (3, 7, 5, 2)
KNOWN_ARGUMENTS = ("position_ids", "use_cache", "logits_to_keep")
ROPE_NOTE = "no prefix cache: its rotary frequencies depend on the length of the whole prompt"
OTHERWISE = {
    "cache": "the library's cache gives other answers than a whole forward",
    "generate": "the library's generate gives other answers than a whole forward",
}
ON_A_CACHE: tuple[SequentialMode, ...] = ("cache", "own_cache")
OF_GENERATE: tuple[SequentialMode, ...] = ("generate", "recompute")  # ways of tier C that prepare a step as it does


@dataclass(frozen=True, slots=True)
class Decision:
    """A way of serving that proved equal on the twin, and how far it was from the reference."""

    report: ProbeReport
    difference: float
    seen: Observation


class Decider:
    """Tries the tiers on the twin of one config. `refused` collects why the better ones did not hold."""

    def __init__(self, model_class: type, twin_config: Any, ops: Ops) -> None:
        self._class = model_class
        self._config = twin_config
        self._ops = ops
        self.refused: list[str] = []
        self.attention = ""  # the library's own that the answers follow, where it is not its plain one
        self.reference = Reference.make(self.twin())
        if self._default_attention_differs():
            self._refuse("eager attention", ATTENTIONS_DISAGREE)
            self.attention = DEFAULT_ATTENTION
            self.reference = Reference.make(self.twin())

    def twin(self) -> nn.Module:
        """A fresh twin; all of them have the same weights."""
        model = twin_model(self._class, self._config)
        if self.attention:
            set_attention(model, self.attention)
        return model

    def decide(self) -> Decision:
        """The best tier that holds. Raises UnsupportedModelError when none does."""
        if self.reference.source != "forward":
            return self.decide_sequential_model(OTHERWISE[self.reference.source])
        for attempt in (self._packed, self._sequential_attention, self._sequential_model):
            decision = attempt()
            if decision is not None:
                return decision
        raise self._unsupported()

    def decide_sequential_model(self, cause: str) -> Decision:
        """Tier C, for a cause that lies outside the twin. Raises UnsupportedModelError when it does not hold either."""
        self._refuse("paged attention", cause)
        decision = self._sequential_model()
        if decision is None:
            raise self._unsupported()
        return decision

    def _default_attention_differs(self) -> bool:
        """Whether the library's default attention gives other answers than its plain one."""
        model, tokens = self.twin(), self.reference.sequences[-1]
        if self.reference.source != "forward" or not getattr(model, "_supports_sdpa", False):
            return False
        set_attention(model, DEFAULT_ATTENTION)
        try:
            with torch.no_grad():
                found = whole(model, tokens)
        except Exception:  # it says that it has such an attention, and has none
            return False
        difference = float((found - self.reference.logits[-1]).abs().max())
        return difference > 10 * TOLERANCE * self.reference.scale

    def trial(self, report: ProbeReport, prepare: Callable[[nn.Module], None] | None = None) -> float:
        """Serve a fresh twin by the report, after `prepare` has changed its modules; the largest difference."""
        model = self.twin()
        if prepare is not None:
            prepare(model)
        served = serve(model, report, self._ops)
        return measure(served, self.reference, self._ops, all_rows=report.mode not in OF_GENERATE)

    def _packed(self) -> Decision | None:
        """Tiers A and A+mixer."""
        model = self.twin()
        try:
            observer = ModelObserver(model, model.config, with_linears=True)
            seen = observer.run(observed_arguments(model, observer))
        except Exception as error:  # whatever the model's code raises means that this tier does not hold
            return self._refuse("paged attention", _cause(error))
        if observer.problems:
            return self._refuse("paged attention", describe(model, observer.problems))
        if not seen.attention and not seen.states:
            return self._refuse(
                "paged attention", "no module calls the attention interface or keeps state in the cache"
            )
        cause = "the answers differ"
        for stepwise in (False, True) if seen.states else (False,):
            report = packed_report(model, seen, stepwise)
            difference = self._try(report)
            if isinstance(difference, float) and self._equal(difference):
                return Decision(report, difference, seen)
            cause = difference if isinstance(difference, str) else f"logits differ by {difference:.2g}"
        return self._refuse("paged attention", cause)

    def _sequential_attention(self) -> Decision | None:
        """Tier B."""
        model = self.twin()
        try:
            observer = ModelObserver(model, model.config, with_linears=True)
            seen = observer.run(observed_arguments(model, observer), implementation="eager")
        except Exception as error:
            return self._refuse("attention per sequence", _cause(error))
        users = outermost(seen.cache_users)
        if not users or "" in users:
            return self._refuse("attention per sequence", "no module inside the model keeps keys in the cache")
        report = sequential_report(model, seen, users, self._why())
        difference = self._try(report)
        if isinstance(difference, float) and self._equal(difference):
            return Decision(report, difference, seen)
        cause = difference if isinstance(difference, str) else f"logits differ by {difference:.2g}"
        return self._refuse("attention per sequence", cause)

    def _sequential_model(self) -> Decision | None:
        """Tier C: on the library's cache, on the model's own, as its generate does, all of it again for each token."""
        model = self.twin()
        seen = self._observe_cache(model)
        layers = counted_layers(seen, model)
        ways: list[tuple[bool, SequentialMode]] = [(False, "generate"), (True, "recompute")]
        if self.reference.source != "generate":
            ways = [(chunked, mode) for chunked in (True, False) for mode in ON_A_CACHE] + ways
        cause = ""
        for chunked, mode in ways:
            why = self._why() + ([f"model per sequence: {cause}."] if cause and mode in OF_GENERATE else [])
            report = replace(model_report(model, layers, mode, chunked, why), attention=self.attention)
            difference = self._try(report)
            if isinstance(difference, float) and self._equal(difference):
                return Decision(report, difference, seen)
            cause = difference if isinstance(difference, str) else f"logits differ by {difference:.2g}"
        return self._refuse("model per sequence", cause)

    def _observe_cache(self, model: nn.Module) -> Observation:
        observer = ModelObserver(model, model.config, with_linears=True)
        try:
            return observer.run(observed_arguments(model, observer), implementation="eager")
        except Exception:  # then memory cannot be counted; a token still is
            return observer.seen

    def _try(self, report: ProbeReport) -> float | str:
        """The difference, or what was raised."""
        try:
            return self.trial(report)
        except Exception as error:
            return _cause(error)

    def _equal(self, difference: float) -> bool:
        return difference <= TOLERANCE * self.reference.scale

    def _why(self) -> list[str]:
        return list(self.refused)

    def _unsupported(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._class.__name__} is not served, because it would give other answers than the library does. Tried on a "
            f"tiny model of its config: {' '.join(self.refused)} Run it with the library's own generate, or register a "
            "native class for it with ModelRegistry.register_model."
        )

    def _refuse(self, way: str, cause: str) -> None:
        self.refused.append(f"{way}: {cause}.")


def serve(model: nn.Module, report: ProbeReport, ops: Ops) -> ServedModel:
    """The served model of a report. The model's modules are changed in place."""
    if report.layout.tier == "C":
        if report.attention:
            set_attention(model, report.attention)
        return SequentialModel(model, report)
    return TransformersModel(model, report, ops)


def measure(served: ServedModel, reference: Reference, ops: Ops, all_rows: bool = True) -> float:
    """Run the reference's sequences together in odd chunks; the largest difference of a logit (nan counts as inf).

    Without `all_rows` only the last row of each chunk is computed and compared.
    """
    loop = PagedLoop(served, ops)
    running = [loop.start(slot, tokens) for slot, tokens in enumerate(reference.sequences)]
    largest = 0.0
    turn = 0
    while any(sequence.computed < len(sequence.tokens) for sequence in running):
        work = []
        for i, sequence in enumerate(running):
            left = len(sequence.tokens) - sequence.computed
            if left and turn >= i:  # later sequences join later
                work.append((sequence, _count(served.layout, sequence, left, turn, i)))
        work = work[::-1] if turn % 2 else work
        for (sequence, _), logits in zip(work, loop.step(work, all_rows), strict=True):
            expected = reference.logits[sequence.slot][sequence.computed - len(logits) : sequence.computed]
            known = ~expected.isnan().any(-1)
            difference = float((logits - expected)[known].abs().max()) if known.any() else 0.0
            largest = max(largest, difference if difference == difference else float("inf"))
        turn += 1
    return largest


def _count(layout: ModelLayout, sequence: Sequence, left: int, turn: int, i: int) -> int:
    """Odd chunks with single tokens between; where prompts stay whole, a prompt and then single tokens."""
    if not layout.chunked_prefill:
        return left - SINGLE if sequence.computed == 0 else 1
    if sequence.computed > 0 and turn % 3 == 2:
        return 1
    return min(left, CHUNKS[(turn + i) % len(CHUNKS)])


def observed_arguments(model: nn.Module, observer: ModelObserver, device: str = "cpu") -> dict[str, Any]:
    """The arguments of the observed forward: one row of ROWS positions, two of them asked for."""
    positions = torch.arange(ROWS, device=device)[None]
    arguments: dict[str, Any] = {"input_ids": positions + 3}
    offered = {"position_ids": positions, "use_cache": True, "logits_to_keep": torch.tensor([3, 5], device=device)}
    arguments.update({name: value for name, value in offered.items() if takes(model, name)})
    cache = cache_argument(model)
    if cache is not None:
        arguments[cache] = observer.cache
    if takes_anything(model):
        arguments[BATCH_ARGUMENT] = ROWS
    return arguments


def _arguments(model: nn.Module, seen: Observation | None) -> tuple[str, ...]:
    """Known arguments that the forward takes; logits_to_keep only where it was seen to select rows."""
    names = [name for name in KNOWN_ARGUMENTS if takes(model, name)]
    if "logits_to_keep" in names and (seen is None or seen.logit_rows != 2):
        names.remove("logits_to_keep")
    return tuple(names)


def packed_report(model: nn.Module, seen: Observation, stepwise: bool) -> ProbeReport:
    """Tier A or A+mixer from what was observed, on the twin or on the full-size model."""
    layers = [_attention_layer(call) for call in seen.attention]
    calls = tuple(CallPlan(call.module, index) for index, call in enumerate(seen.attention))
    mixers = []
    for use in seen.states:
        mixers.append(MixerPlan(use.module, len(layers), use.layer, use.row_arguments, use.outputs, stepwise))
        layers.append(LayerSpec(use.module, "state", states=tuple(use.states)))
    notes = ["recurrent mixers continue a prompt token by token: their code takes no initial state"] if stepwise else []
    ropes = length_ropes(model)
    notes += [ROPE_NOTE] if ropes else []
    layout = _layout(model, layers, "A+mixer" if mixers else "A", notes)
    return ProbeReport(
        layout=replace(layout, prefix_caching=not ropes),
        arguments=_arguments(model, seen),
        cache_argument=cache_argument(model),
        batch_argument=seen.batch_arrives and not mixers and not ropes and takes_anything(model),
        calls=calls,
        mixers=tuple(mixers),
        ropes=ropes,
    )


def sequential_report(model: nn.Module, seen: Observation, users: list[str], why: list[str]) -> ProbeReport:
    """Tier B: `users` run per sequence on private caches."""
    plans = tuple(SequentialPlan(name, seen.row_arguments.get(name, ())) for name in users)
    layout = _layout(model, counted_layers(seen, model), "B", why)
    return ProbeReport(
        layout=replace(layout, prefix_caching=False),
        arguments=_arguments(model, seen),
        cache_argument=cache_argument(model),
        sequential=plans,
        ropes=length_ropes(model),
    )


def model_report(model: nn.Module, layers: list[LayerSpec], mode: Any, chunked: bool, why: list[str]) -> ProbeReport:
    """Tier C."""
    layout = _layout(model, layers, "C", why)
    return ProbeReport(
        layout=replace(
            layout, prefix_caching=False, chunked_prefill=chunked and not length_ropes(model), batched=False
        ),
        arguments=_arguments(model, None),
        cache_argument=cache_argument(model),
        mode=mode,
    )


def counted_layers(seen: Observation, model: nn.Module) -> list[LayerSpec]:
    """Layers for the page pool where keys live in private caches: pages count their memory, nothing is stored there."""
    layers = [
        LayerSpec(
            f"{update.module}#{i}", "attention", update.kv_heads, update.kv_heads, update.key_dim, update.value_dim
        )
        for i, update in enumerate(seen.updates)
    ]
    return layers or [LayerSpec("tokens", "attention", 1, 1, 8, 8)]


def outermost(names: list[str]) -> list[str]:
    """The names that lie in no other of the names."""
    return [name for name in names if not any(name.startswith(other + ".") for other in names)]


def _attention_layer(call: Any) -> LayerSpec:
    return LayerSpec(
        name=call.module if call.call == 0 else f"{call.module}#{call.call}",
        heads=call.heads,
        kv_heads=call.kv_heads,
        key_dim=call.key_dim,
        value_dim=call.value_dim,
        scale=call.scale,
        window=call.window,
        chunk=call.chunk,
        softcap=call.softcap,
        sinks=call.sinks,
        shares=call.shares,
    )


def _layout(model: nn.Module, layers: list[LayerSpec], tier: Any, notes: list[str]) -> ModelLayout:
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    vocabulary = head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size
    hidden = getattr(config, "hidden_size", None) or embedding.weight.shape[-1]
    return ModelLayout(tuple(group_layers(layers)), vocabulary, hidden, tier, notes=tuple(notes))


def group_layers(layers: list[LayerSpec]) -> list[LayerSpec]:
    """Give layers that live equally long the same page tables: full attention, each window size, recurrent state."""

    def key(layer: LayerSpec) -> tuple[int, int]:
        owner = layer if layer.shares is None else layers[layer.shares]
        if owner.kind == "state":
            return (2, 0)
        return (1, owner.window) if owner.window is not None else (0, 0)

    numbers = {kind: n for n, kind in enumerate(sorted({key(layer) for layer in layers}))}
    return [replace(layer, group=numbers[key(layer)]) for layer in layers]


def describe(model: nn.Module, problems: dict[str, str]) -> str:
    """Problems by class instead of by module: "LlamaAttention attends in both directions"."""
    found = {f"{type(model.get_submodule(name)).__name__} {problem}" for name, problem in problems.items()}
    return "; ".join(sorted(found))


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split()).removesuffix(".")
    return text if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text[:160]}"

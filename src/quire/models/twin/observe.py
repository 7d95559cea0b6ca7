"""Run a model once under observation and write down what it does; decide nothing.

Seen are: calls of the attention interface (with masks and shared keys), modules that keep state in the cache, linear
layers that read the same tensor, weights that are read outside their own layer. Works on the twin and, for the layout,
on the full-size model without weights.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from quire.layers.spec import StateSpec
from quire.models.transformers.interface import BATCH_ARGUMENT, NOISE, SPEC, current_observer
from quire.models.transformers.masks import MaskSpec
from quire.models.transformers.report import class_key

ROWS = 13  # positions of the observed step: unlike any size of a twin, so that a dimension of 13 means positions


@dataclass(slots=True)
class AttentionCall:
    """One call of the interface. `problem` says why the paged op must not answer it."""

    module: str
    call: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shares: int | None = None
    problem: str | None = None


@dataclass(slots=True)
class StateUse:
    """A module that keeps recurrent state: which layer of the cache, which states, which arguments run along positions.

    `outputs` tells for each part of a returned tuple whether it runs along positions; None for a bare tensor.
    """

    module: str
    layer: int
    states: list[StateSpec] = field(default_factory=list)
    row_arguments: tuple[str, ...] = ()
    outputs: tuple[bool, ...] | None = None


@dataclass(slots=True)
class CacheUpdate:
    """Keys and values given to the cache by a module, whether or not attention followed through the interface."""

    module: str
    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class Observation:
    """What one run showed, in the order in which it happened."""

    attention: list[AttentionCall] = field(default_factory=list)
    states: list[StateUse] = field(default_factory=list)
    updates: list[CacheUpdate] = field(default_factory=list)
    cache_users: list[str] = field(default_factory=list)  # modules that touched the cache or the interface
    row_arguments: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of each cache user
    outputs: dict[str, tuple[bool, ...] | None] = field(default_factory=dict)
    siblings: list[tuple[str, ...]] = field(default_factory=list)  # linears of one parent that read one tensor
    linear_calls: Counter[str] = field(default_factory=Counter)
    weight_reads: set[str] = field(default_factory=set)  # linears whose weight is read from outside
    batch_arrives: bool = True  # the keyword argument reached every call of the interface and every mixer
    logit_rows: int = 0
    mirrors: dict[str, bool] = field(default_factory=dict)  # class -> it always gave a tensor shaped like its first
    user_classes: set[str] = field(default_factory=set)  # classes of cache_users


class WatchedCache(DynamicCache):
    """A real cache for states; keys and values pass through, as they will on pages."""

    def __init__(self, config: Any, observer: ModelObserver) -> None:
        super().__init__(config=config)
        self.observer = observer

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        self.observer.updated(key, value)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        self.observer.stateful(layer_idx, "conv", state_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, **others: Any) -> Any:
        self.observer.stateful(layer_idx, "conv", state_idx)
        return super().update_conv_state(states, layer_idx, state_idx=state_idx, **others)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        self.observer.stateful(layer_idx, "recurrent", state_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    def update_recurrent_state(self, states: torch.Tensor, layer_idx: int, state_idx: int = 0, **others: Any) -> Any:
        self.observer.stateful(layer_idx, "recurrent", state_idx)
        return super().update_recurrent_state(states, layer_idx, state_idx=state_idx, **others)

    def update_indexer(self, states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        self.observer.touch("keeps the keys of a sparse-attention indexer in the cache")
        return states


class _WatchedLinear(nn.Linear):
    """Stands in for nn.Linear while the twin is observed: tells when its weight is read by anybody else."""

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and not self.__dict__.get("quire_inside"):
            self.__dict__["quire_reads"].add(self.__dict__["quire_name"])
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.__dict__["quire_inside"] = True
        try:
            return super().forward(x)
        finally:
            self.__dict__["quire_inside"] = False


class ModelObserver:
    """Listens to one run. `problems` holds what module did something that paging cannot express, and what."""

    def __init__(self, model: nn.Module, config: Any, with_linears: bool) -> None:
        self.model = model
        self.seen = Observation()
        self.problems: dict[str, str] = {}
        self.cache = WatchedCache(config, self)
        self._names = {module: name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self._calls: Counter[str] = Counter()
        self._owners: dict[tuple[int, int], int] = {}  # ids of key and value -> index of the call that brought them
        self._alive: list[torch.Tensor] = []  # keeps tensors alive, so that an id means one tensor
        self._readers: dict[tuple[str, int], list[str]] = {}
        self._touched: dict[str, dict[tuple[str, int], int]] = {}
        self._with_linears = with_linears

    def run(self, arguments: dict[str, Any], implementation: str = SPEC) -> Observation:
        """One forward; with SPEC the model's masks are specs and the observer answers the attention interface.

        Exceptions of the model come through.
        """
        token = current_observer.set(self)
        try:
            with self._hooks(), _implementation(self.model, implementation), torch.no_grad():
                output = self.model(**arguments)
        finally:
            current_observer.reset(token)
        logits = output.logits if hasattr(output, "logits") else output[0]
        self.seen.logit_rows = logits.shape[1] if logits.dim() == 3 else 0
        self._collect_states()
        self._collect_siblings()
        return self.seen

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        scaling: Any,
        others: dict[str, Any],
    ) -> torch.Tensor:
        """Note a call of the interface and answer with zeros [1, T, H, Dv]."""
        name = self._names[module]
        self._note_user(name)
        if BATCH_ARGUMENT not in others:
            self.seen.batch_arrives = False
        spec = mask if isinstance(mask, MaskSpec) else None
        call = AttentionCall(
            module=name,
            call=self._calls[name],
            heads=query.shape[1],
            kv_heads=key.shape[1],
            key_dim=query.shape[-1],
            value_dim=value.shape[-1],
            scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
            window=spec.window if spec else others.get("sliding_window"),
            chunk=spec.chunk if spec else None,
            softcap=others.get("softcap"),
            sinks=others.get("s_aux") is not None,
            shares=self._owners.get((id(key), id(value))),
            problem=_problem(module, query, key, value, mask, scaling, others),
        )
        self._calls[name] += 1
        self._owners.setdefault((id(key), id(value)), len(self.seen.attention))
        self._alive += [key, value]
        self.seen.attention.append(call)
        if call.problem:
            self.problems.setdefault(name, call.problem)
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])

    def updated(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """A module gave keys and values [1, Hkv, T, D] to the cache."""
        name = self._stack[-1]
        self._note_user(name)
        self.seen.updates.append(CacheUpdate(name, key.shape[1], key.shape[-1], value.shape[-1]))

    def stateful(self, layer: int, kind: str, index: int) -> None:
        """A module read or wrote a recurrent state."""
        name = self._stack[-1]
        self._note_user(name)
        self._touched.setdefault(name, {})[(kind, index)] = layer

    def touch(self, problem: str) -> None:
        """A module did something with the cache that pages cannot hold."""
        name = self._stack[-1]
        self._note_user(name)
        self.problems.setdefault(name, problem)

    def _note_user(self, name: str) -> None:
        if name not in self.seen.cache_users:
            self.seen.cache_users.append(name)
            self.seen.user_classes.add(class_key(self.model.get_submodule(name)))

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for module, name in self._names.items():
            handles.append(module.register_forward_pre_hook(self._entering(module, name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(module, name), always_call=True))
            if self._with_linears and type(module) is nn.Linear:
                module.__dict__.update(quire_name=name, quire_reads=self.seen.weight_reads, quire_inside=False)
                module.__class__ = _WatchedLinear
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module in self._names:
                if isinstance(module, _WatchedLinear):
                    module.__class__ = nn.Linear
                    for attribute in ("quire_name", "quire_reads", "quire_inside"):
                        del module.__dict__[attribute]

    def _entering(self, module: nn.Module, name: str) -> Any:
        watched = self._with_linears and type(module) is nn.Linear
        names = _parameter_names(module)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append(name)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            self.seen.row_arguments[name] = tuple(key for key, value in given.items() if _runs_along_rows(value))
            if watched and args and torch.is_tensor(args[0]):
                self._note_reader(name, args[0])

        return hook

    def _leaving(self, module: nn.Module, name: str) -> Any:
        key = class_key(module)

        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._stack.pop()
            mirrors = bool(args) and torch.is_tensor(args[0]) and torch.is_tensor(output)
            mirrors = mirrors and args[0].shape == output.shape and args[0].dtype == output.dtype
            self.seen.mirrors[key] = mirrors and self.seen.mirrors.get(key, True)
            is_tuple = isinstance(output, tuple)
            self.seen.outputs[name] = tuple(_runs_along_rows(part) for part in output) if is_tuple else None

        return hook

    def _note_reader(self, name: str, tensor: torch.Tensor) -> None:
        self._alive.append(tensor)
        self.seen.linear_calls[name] += 1
        readers = self._readers.setdefault((name.rpartition(".")[0], id(tensor)), [])
        if name not in readers:
            readers.append(name)

    def _collect_states(self) -> None:
        for name, touched in self._touched.items():
            use = StateUse(name, next(iter(touched.values())))
            for kind, index in touched:
                held = getattr(self.cache.layers[use.layer], f"{kind}_states")[index]
                if held is not None:
                    use.states.append(StateSpec(f"{kind}.{index}", tuple(held.shape[1:]), held.dtype))
            use.row_arguments = self.seen.row_arguments.get(name, ())
            use.outputs = self.seen.outputs.get(name)
            if use.states:
                self.seen.states.append(use)

    def _collect_siblings(self) -> None:
        found = [tuple(readers) for readers in self._readers.values() if len(readers) > 1]
        self.seen.siblings = list(dict.fromkeys(found))


@contextlib.contextmanager
def _implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Every config that a module of the model reads names this attention implementation inside the block."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = name
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _parameter_names(module: nn.Module) -> list[str]:
    try:
        return list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return []


def _runs_along_rows(value: Any) -> bool:
    """Whether an argument, or all tensors of a tuple, have the step's positions as their second dimension."""
    if isinstance(value, tuple | list) and value:
        return all(_runs_along_rows(part) for part in value)
    return torch.is_tensor(value) and value.dim() >= 2 and value.shape[0] == 1 and value.shape[1] == ROWS


def _problem(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scaling: Any,
    others: dict[str, Any],
) -> str | None:
    """Why the paged op must not answer this call, or None."""
    known = NOISE | {"sliding_window", "softcap", "s_aux"}
    unknown = [name for name, given in others.items() if name not in known and given is not None]
    if unknown:
        return f"passes {', '.join(sorted(unknown))} to the attention interface"
    if torch.is_tensor(scaling):
        return "has a scale that is computed in each step"
    rows = ROWS
    if query.dim() != 4 or query.shape[0] != 1 or query.shape[2] != rows:
        return f"attends with queries of shape {tuple(query.shape)} for {rows} positions"
    if key.shape[2] != rows or value.shape[2] != rows:
        return f"attends to {key.shape[2]} keys for {rows} positions (compressed or cross attention)"
    if key.shape[1] % value.shape[1]:
        return f"has {key.shape[1]} key heads and {value.shape[1]} value heads"
    if isinstance(mask, MaskSpec):
        return None if mask.plain else f"asks for a mask that is not causal, window or chunk: {', '.join(mask.custom)}"
    if mask is not None:
        return "makes a mask tensor of its own"
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return "attends in both directions"
    return None

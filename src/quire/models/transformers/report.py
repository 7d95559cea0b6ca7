"""ProbeReport: what the probe decided about a model, complete enough to build it without probing again.

Plain data, written to and read from JSON. It knows neither how things were found out nor how they are carried out.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from quire.layers.spec import LayerSpec, ModelLayout, StateSpec

FORMAT = 1  # raised when the meaning of a field changes, so that remembered reports are made anew

SequentialMode = Literal["cache", "own_cache", "generate", "recompute"]


def class_key(module: nn.Module) -> str:
    """The class of a module, as plans name it."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


@dataclass(frozen=True, slots=True)
class CallPlan:
    """One call of the attention interface: which module makes it, and the layer of the layout that answers."""

    module: str
    index: int


@dataclass(frozen=True, slots=True)
class MixerPlan:
    """A recurrent mixer: decode rows run as one batch, chunks one by one; `stepwise` when it cannot continue by chunks."""

    module: str
    index: int
    layer: int  # the layer number by which the module addresses the cache
    row_arguments: tuple[str, ...]
    outputs: tuple[bool, ...] | None  # for a returned tuple: which parts run along positions
    stepwise: bool = False


@dataclass(frozen=True, slots=True)
class SequentialPlan:
    """A module that runs one sequence at a time on a private cache of the library (tier B)."""

    module: str
    row_arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RewritePlan:
    """Replacements by class (module.qualname), each proved equal on the twin."""

    merged: dict[str, list[list[str]]] = field(default_factory=dict)  # parent class -> groups of child names
    linears: list[str] = field(default_factory=list)  # parent class + "." + child name
    norms: dict[str, dict[str, Any]] = field(default_factory=dict)
    gated: dict[str, dict[str, Any]] = field(default_factory=dict)
    rotary: dict[str, str] = field(default_factory=dict)  # attention class -> style
    experts: list[str] = field(default_factory=list)
    products: list[str] = field(default_factory=list)  # classes that multiply with a parameter of their own: routers
    latent: dict[str, str] = field(
        default_factory=dict
    )  # attention class -> its linear from latents to keys and values


@dataclass(frozen=True, slots=True)
class ProbeReport:
    """The decision: the layout, and for tiers A and B how each module is served, for tier C how a sequence is stepped."""

    layout: ModelLayout
    arguments: tuple[str, ...] = ()  # of the model's forward: which of the known ones it takes
    cache_argument: str | None = None
    batch_argument: bool = False  # the step travels through **kwargs; otherwise through the context variable
    calls: tuple[CallPlan, ...] = ()
    mixers: tuple[MixerPlan, ...] = ()
    sequential: tuple[SequentialPlan, ...] = ()
    mode: SequentialMode = "cache"
    attention: str = ""  # tier C: the library's own that is used, where it is not its plain one
    ropes: tuple[str, ...] = ()  # rotary modules whose frequencies depend on the length of the sequence
    rewrite: RewritePlan = field(default_factory=RewritePlan)

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=lambda value: str(value).removeprefix("torch."), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ProbeReport:
        """The inverse of to_json. Raises KeyError, TypeError or ValueError for anything else."""
        values = json.loads(text)
        layout = values.pop("layout")
        layout["layers"] = tuple(_layer(layer) for layer in layout["layers"])
        layout["notes"] = tuple(layout["notes"])
        mixers = tuple(MixerPlan(**_tuples(mixer)) for mixer in values.pop("mixers"))
        sequential = tuple(SequentialPlan(**_tuples(plan)) for plan in values.pop("sequential"))
        return cls(
            layout=ModelLayout(**layout),
            arguments=tuple(values.pop("arguments")),
            calls=tuple(CallPlan(**call) for call in values.pop("calls")),
            mixers=mixers,
            sequential=sequential,
            ropes=tuple(values.pop("ropes")),
            rewrite=RewritePlan(**values.pop("rewrite")),
            **values,
        )


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the plans have tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _layer(values: dict[str, Any]) -> LayerSpec:
    states = tuple(
        StateSpec(state["name"], tuple(state["shape"]), getattr(torch, state["dtype"])) for state in values["states"]
    )
    return LayerSpec(**{**values, "states": states})

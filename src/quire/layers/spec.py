"""LayerSpec: what one cache-carrying layer of a model needs, as observed by the probe and nothing else.

Produced by models/, read by worker/ (memory, page tables) and by layers/attention.py (the call itself).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One recurrent tensor of a state layer, per request, without the batch dimension."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One call of the attention function (kind "attention") or one recurrent mixer (kind "state").

    `shares` is the index of an earlier layer whose keys and values this one reads instead of writing its own.
    `window` counts positions: a query at p sees keys in (p - window, p]. `chunk` splits positions into blocks that do
    not see each other. `group` is the index of the layer's page-table group. `shared`: one latent for all heads is kept
    of a position, its first value_dim numbers are the value too; see layers/latent.py.
    """

    name: str
    kind: Literal["attention", "state"] = "attention"
    heads: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    scale: float = 1.0
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shares: int | None = None
    shared: bool = False
    states: tuple[StateSpec, ...] = ()
    group: int = 0


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Everything the rest of quire needs to know about a model's memory and abilities."""

    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    tier: Literal["native", "A", "A+mixer", "B", "C"]
    chunked_prefill: bool = True  # false: a prompt must be computed in one span
    prefix_caching: bool = True
    batched: bool = True  # false: tier C, one request at a time through the model
    notes: tuple[str, ...] = ()  # why something is slow or was left alone, for the log

    @property
    def takes_back(self) -> bool:
        """Whether a wrong guess can be taken out again: not of a recurrent state, nor of a cache of the library."""
        return self.tier in ("native", "A") and all(layer.kind != "state" for layer in self.layers)

"""What quire registers with Transformers' attention interface, and how one call of it finds its layer and its step.

Three names: "quire" (paged, at run time; no mask is built), "quire_spec" (masks become MaskSpec; attention modules run
one sequence at a time, or are being observed). A model opts in by the names in its config; nothing of the library changes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from quire.errors import UnsupportedModelError
from quire.kernels.table import Ops
from quire.layers.attention import attend
from quire.layers.batch import Batch
from quire.layers.latent import LatentProjection
from quire.layers.spec import LayerSpec
from quire.models.transformers.masks import mask_spec

PAGED = "quire"
SPEC = "quire_spec"
IN_MASKS = {"sliding_window"}  # what a mask that was asked for says already
CHOSEN = "indices"  # by which a model names the only keys that each row may look at
BATCH_ARGUMENT = "quire_batch"  # the keyword argument that carries the step through a model's **kwargs

# Keyword arguments that reach the interface and mean nothing to attention.
NOISE = {
    "cache_params",
    "cache_position",
    "dropout",
    "encoder_hidden_states",
    "head_mask",
    "is_causal",
    "labels",
    "layer_head_mask",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
    BATCH_ARGUMENT,
}

# Set and reset by TransformersModel.forward alone, for models whose **kwargs do not reach every layer.
current_batch: ContextVar[Batch] = ContextVar("quire_batch")

# Set by ModelObserver.run alone: who listens to the calls of the model being observed.
current_observer: ContextVar[Any] = ContextVar("quire_observer", default=None)


class LayerCall:
    """One call of the attention interface by one module, resolved once: everything but the tensors and the step.

    With a `projection` the layer keeps latents: it takes the place of every head's keys and values.
    """

    __slots__ = ("index", "ops", "projection", "spec")

    def __init__(self, ops: Ops, spec: LayerSpec, index: int, projection: LatentProjection | None = None) -> None:
        self.ops = ops
        self.spec = spec
        self.index = index
        self.projection = projection

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: Batch,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """The library's layouts query [1, H, T, Dk], key [1, Hkv, T, Dk], value [1, Hkv, T, Dv] -> [1, T, H, Dv].

        With latents key is [1, 1, T, rank + rope], and values are a part of it.
        """
        queries, keys, values = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
        if self.projection is not None:
            queries = self.projection.query(queries)
            mixed = attend(self.ops, self.spec, self.index, queries, keys, keys, batch, sinks)
            return self.projection.result(mixed)[None]
        if values.shape[1] != keys.shape[1]:  # value heads that are shared by several key heads
            values = values.repeat_interleave(keys.shape[1] // values.shape[1], 1)
        return attend(self.ops, self.spec, self.index, queries, keys, values, batch, sinks)[None]


class CallSequence:
    """The calls of a module that uses the interface several times per step, in order. `restart` precedes each step."""

    __slots__ = ("calls", "next")

    def __init__(self, calls: list[LayerCall]) -> None:
        self.calls = calls
        self.next = 0

    def restart(self) -> None:
        self.next = 0

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        batch: Batch,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        call = self.calls[self.next]
        self.next += 1
        return call(query, key, value, batch, sinks)


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    quire_batch: Batch | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a served model. Scale, window and softcap were fixed by the probe and are not read."""
    for name in others:
        if name not in NOISE and others[name] is not None:
            raise unknown_argument(module, name)
    batch = quire_batch if quire_batch is not None else current_batch.get()
    return module.quire_call(query, key, value, batch, s_aux), None


def spec_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, Any]:
    """While a model is observed the observer answers; in a module that runs per sequence the library's own code does."""
    observer = current_observer.get()
    if observer is not None:
        return observer.attention(module, query, key, value, attention_mask, scaling, others), None
    eager = eager_attention(module)
    others.pop(BATCH_ARGUMENT, None)
    chosen = others.pop(CHOSEN, None)
    if chosen is not None:
        attention_mask = among(chosen, key.shape[2], attention_mask)
    named = inspect.signature(eager).parameters
    for name in others:
        if name not in named and name not in NOISE | IN_MASKS and others[name] is not None:
            raise unknown_argument(module, name)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return eager(module, query, key, value, attention_mask, scaling=scaling, **{"dropout": 0.0, **others})


def among(chosen: torch.Tensor, keys: int, mask: torch.Tensor) -> torch.Tensor:
    """An additive mask [B, 1, T, keys] that leaves only the chosen keys [B, T, count] of each row.

    Models with an index over their keys do this themselves for the library's own attentions, and leave it to all others.
    """
    left_out = torch.ones(*chosen.shape[:2], keys, dtype=torch.bool).scatter(-1, chosen.long(), False)
    return mask.masked_fill(left_out[:, None], torch.finfo(mask.dtype).min)


def eager_attention(module: nn.Module) -> Callable[..., Any]:
    """The plain attention function of the file that defines this module."""
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__}: its file has no plain attention to run per sequence.")
    return function


def unknown_argument(module: nn.Module, name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(module).__name__} passes {name!r} to the attention interface; ignoring it could change the answer, "
        "so it is not taken."
    )


AttentionInterface.register(PAGED, paged_attention)  # and no mask function: masks are None
AttentionInterface.register(SPEC, spec_attention)
AttentionMaskInterface.register(SPEC, mask_spec)

"""NextLayer: one more decoder layer that reads the next token beside a model's last hidden state, and guesses on.

EAGLE heads come in a checkpoint of their own, MTP layers in that of the model. What their names and parts are is data:
see STYLES. Embedding and output matrix are the model's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, takewhile
from typing import Protocol

import torch

from quire.errors import CheckpointError, UnsupportedModelError
from quire.kernels.programs import Opaque
from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.layers.rope import Rotary
from quire.layers.spec import ModelLayout
from quire.layers.target import Target
from quire.models.files.headers import weight_headers
from quire.models.files.hub import ModelFiles
from quire.models.native.decoder import FAMILIES, Layer, native_layout, opaque_experts, shape_of
from quire.models.native.frequencies import frequencies_of
from quire.models.programs.recorded import Recordable
from quire.models.speculation.open_model import OpenModel
from quire.models.weights.checkpoint import Checkpoint
from quire.models.weights.load import LoadRules, load_into


@dataclass(frozen=True, slots=True)
class Style:
    """How a checkpoint names the parts; names are relative to `prefix`, in which {layers} is the model's number of them."""

    prefix: str
    join: str  # the linear that brings embedding and state back to one size
    layer: str
    embedding_first: bool = True
    embedding_norm: str | None = None
    state_norm: str | None = None
    last_norm: str | None = None
    passes_normed: bool = True  # what the next guess reads is behind the last norm, not before it


EAGLE = Style("", "fc", "layers.0.")
MTP_STYLES = (
    Style("mtp.", "fc", "layers.0.", True, "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
    Style("model.mtp_layers.0.", "input_proj", "", False, "token_layernorm", "hidden_layernorm", "final_layernorm"),
    Style("model.layers.{layers}.", "eh_proj", "", True, "enorm", "hnorm", "shared_head.norm", False),
)

NUMBERED = re.compile(r"(.*\.)(\d+)\.")
FURTHER = re.compile(r"layers\.[1-9]")


def mtp_style(files: ModelFiles) -> Style | None:
    """The style of the MTP layer that a model's checkpoint has, if it has one."""
    names = weight_headers(files)
    for style in MTP_STYLES:
        prefix = style.prefix.format(layers=files.text_config.num_hidden_layers)
        if f"{prefix}{style.join}.weight" in names:
            return replace(style, prefix=prefix)
    return None


def mtp_layers(files: ModelFiles, style: Style) -> int:
    """How many such layers the checkpoint has, one behind the other; the first one is used."""
    found = NUMBERED.fullmatch(f"{style.prefix}{style.layer}")
    assert found is not None, "MTP layers are numbered"
    begin = found[1]
    numbers = {name[len(begin) :].split(".")[0] for name in weight_headers(files) if name.startswith(begin)}
    return sum(1 for _ in takewhile(numbers.__contains__, map(str, count(int(found[2])))))


def next_layout(files: ModelFiles) -> ModelLayout:
    """The layout of such a layer, from the config that describes it. Raises UnsupportedModelError."""
    if files.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"The guessing layer of {files.name} is one of a {files.architecture}; quire computes those of "
            f"{', '.join(FAMILIES)}. Leave out the method, or guess with ngram, suffix or draft_model."
        )
    layout = native_layout(files.architecture, files.config)
    return replace(layout, layers=(replace(layout.layers[-1], group=0),))


@dataclass(frozen=True, slots=True)
class LoneLayer:
    """The last of the layers that a config describes, alone, before its weights are read."""

    layout: ModelLayout
    size: int  # of what it reads and returns
    layer: Layer
    rotary: Rotary
    norm: Callable[[], RMSNorm]  # makes one more, as its own are


def lone_layer(files: ModelFiles, dtype: torch.dtype, device: torch.device, ops: Ops) -> LoneLayer:
    """Such a layer with keys and values of its own. Raises UnsupportedModelError."""
    layout, shape = next_layout(files), shape_of(files.architecture, files.config)
    last = len(shape.windows) - 1
    shape = replace(shape, experts=shape.experts[last:], windows=shape.windows[last:])
    return LoneLayer(
        layout,
        shape.size,
        Layer(ops, shape, layout.layers[0], 0, dtype, device),
        Rotary(frequencies_of(files.config, shape.head_dim), "half", dtype, device),
        partial(RMSNorm, ops, shape.size, shape.eps, "down_then_scale", dtype, device),
    )


class Head(Recordable, Protocol):
    """A layer that guesses on; `layout` is that of its own keys and values.

    forward(batch) reads batch.states beside the token behind each position. It returns for batch.logit_rows what the next
    position reads in place of the model's states, [R, size]; where score() reads something else, that stands behind it,
    [R, 2 * size].
    """

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model shows, [T, its size or more], as the layer reads it: [T, size]."""
        ...

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """The last `size` numbers of forward()'s rows, [R, size] -> logits [R, V] of the model's tokens."""
        ...


class NextLayer:
    """A Head of one of the native families, loaded. `files` hold its weights and describe it."""

    def __init__(
        self, files: ModelFiles, style: Style, model: OpenModel, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        own = lone_layer(files, dtype, device, ops)
        self.layout, self._layer, self._rotary = own.layout, own.layer, own.rotary
        self.hf_config = files.config
        self.model = model
        self._style = style
        checkpoint = Checkpoint(files)
        names = {name.removeprefix(style.prefix) for name in checkpoint.headers if name.startswith(style.prefix)}
        self._join = Linear(ops, 2 * own.size, (own.size,), f"{style.join}.bias" in names, dtype, device)
        self._norms: dict[str, RMSNorm] = {
            name: own.norm() for name in (style.embedding_norm, style.state_norm, style.last_norm) if name is not None
        }
        # EAGLE's first layer reads its input as it is.
        self._input_norm = f"{style.layer}input_layernorm.weight" in names
        load_into(self._targets(), _weights(checkpoint, style), LoadRules(origin=checkpoint.where))

    def _targets(self) -> dict[str, Target]:
        style = self._style
        found = {f"{style.layer}{name}": target for name, target in self._layer.targets().items()}
        if not self._input_norm:
            del found[f"{style.layer}input_layernorm.weight"]
        found[f"{style.join}.weight"] = self._join.weight_target()
        if self._join.has_bias:
            found[f"{style.join}.bias"] = self._join.bias_target()
        found.update({f"{name}.weight": norm.weight_target() for name, norm in self._norms.items()})
        return found

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head: the model's last states are read as they are."""
        return hidden

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """See Head."""
        return self.model.score(states)

    def opaque(self) -> list[Opaque]:
        """See models/programs/recorded.py."""
        return opaque_experts([self._layer])

    def release(self, slot: int) -> None:
        """Nothing is kept outside the caches."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See Head."""
        style, layer = self._style, self._layer
        assert batch.states is not None, "a head reads states"
        parts = [self._normed(style.embedding_norm, self.model.embed(batch.token_ids))]
        parts.insert(1 if style.embedding_first else 0, self._normed(style.state_norm, batch.states))
        residual = self._join.forward(torch.cat(parts, dim=-1))
        cos, sin = self._rotary.tables(batch)
        hidden = layer.attend(layer.input_norm.forward(residual) if self._input_norm else residual, cos, sin, batch)
        hidden, residual = (part.index_select(0, batch.logit_rows) for part in (hidden, residual))
        hidden, residual = layer.post_norm.add(hidden, residual)
        hidden = layer.mlp.forward(hidden)
        if style.last_norm is None:
            return hidden + residual
        normed, whole = self._norms[style.last_norm].add(hidden, residual)
        return normed if style.passes_normed else torch.cat((whole, normed), dim=-1)

    def _normed(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        return x if name is None else self._norms[name].forward(x)


def _weights(checkpoint: Checkpoint, style: Style) -> Iterator[tuple[str, torch.Tensor]]:
    """The layer's own tensors, no further layers'; an embedding or an output matrix beside them is the model's again."""
    found = 0
    for name in checkpoint.headers:
        own = name.removeprefix(style.prefix)
        if (
            name.startswith(style.prefix)
            and own.split(".")[0] not in ("embed_tokens", "lm_head")
            and "head.head" not in own
            and not FURTHER.match(own)
        ):
            found += 1
            yield own, checkpoint.read(name)
            checkpoint.forget(name)
    if not found:
        raise CheckpointError(f"{checkpoint.files.folder} has no weights whose names begin with {style.prefix!r}.")

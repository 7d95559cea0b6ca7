"""FusedLayer: an EAGLE-3 head. It reads what three layers of the model read, guesses with a vocabulary and an output matrix
of its own, and may have an embedding of its own, too.

In the published format and in that of the speculators library, which differ in names and in where the config has what.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from quire.errors import ConfigError
from quire.kernels.programs import Opaque
from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.target import Target
from quire.models.files.hub import ModelFiles
from quire.models.speculation.nextlayer import lone_layer
from quire.models.speculation.open_model import OpenModel
from quire.models.weights.checkpoint import Checkpoint
from quire.models.weights.load import LoadRules, load_into

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}  # what its one layer is, whatever the config says
INNER_CONFIG = "transformer_layer_config"  # where speculators' configs have the layer's own
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
OWN_NORM = re.compile(r"(midlayer|layers\.0)\.hidden_norm\.weight$")
OTHER_NAMES = re.compile(r"^(model\.)?(midlayer\.)?")


def is_fused(files: ModelFiles) -> bool:
    """Whether this is an EAGLE-3 head: EAGLE's has no norm for states."""
    return any(OWN_NORM.search(name) for name in Checkpoint(files).headers)


def layer_overrides(files: ModelFiles) -> dict[str, Any]:
    """What must be laid over the head's config so that it describes a Llama of one layer."""
    return {**files.raw_config.get(INNER_CONFIG, {}), **LLAMA, "num_hidden_layers": 1}


def fused_taps(files: ModelFiles, layers: int) -> tuple[int, ...]:
    """Which of the model's layers the head reads along with; without a word in the config, a low, a middle, a high one.

    `eagle_config` counts layers by what they bring, the config itself by what they read. Raises ConfigError.
    """
    raw = files.raw_config
    inner = (raw.get("eagle_config") or {}).get(LAYER_IDS)
    found = raw.get(LAYER_IDS) or ([number + 1 for number in inner] if inner else None)
    if found is None:
        found = [min(2, layers - 1), layers // 2, max(0, layers - 3)]
    if any(not 0 <= number < layers for number in found):
        raise ConfigError(
            f"The EAGLE-3 head in {files.folder} reads along with the layers {found}, and the model has {layers}: it was "
            f"made for another model. Correct {LAYER_IDS} in its config."
        )
    return tuple(found)


class FusedLayer:
    """A Head, loaded: `fc` makes one state of the three, a layer of doubled input reads it beside the embedding."""

    def __init__(
        self, files: ModelFiles, model: OpenModel, taps: int, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        own = lone_layer(files, dtype, device, ops)
        self.layout, self._layer, self._rotary = own.layout, own.layer, own.rotary
        self.hf_config = files.config
        self._model = model
        self._vocabulary = model.layout.vocab_size
        self._norm_first = bool(files.raw_config.get("norm_before_residual", INNER_CONFIG in files.raw_config))
        checkpoint = Checkpoint(files)
        names = {_own_name(name): name for name in checkpoint.headers}
        self._fuse = Linear(ops, taps * model.layout.hidden_size, (own.size,), "fc.bias" in names, dtype, device)
        inner = own.layer.qkv
        own.layer.qkv = Linear(ops, 2 * own.size, inner.sizes, inner.has_bias, dtype, device)
        self._state_norm, self._last_norm = own.norm(), own.norm()
        targets = self._targets()
        self._embedding = None
        if "embed_tokens.weight" in names:
            rows = checkpoint.headers[names["embed_tokens.weight"]].shape[0]
            self._embedding = Embedding(rows, own.size, dtype, device)
            targets["embed_tokens.weight"] = self._embedding.weight_target()
        self._output = self._tokens = None
        if "lm_head.weight" in names:
            rows = checkpoint.headers[names["lm_head.weight"]].shape[0]
            self._output = Linear(ops, own.size, (rows,), False, dtype, device)
            targets["lm_head.weight"] = self._output.weight_target()
            if "d2t" in names:
                # The differences between the model's token ids and the head's own.
                self._tokens = (checkpoint.read(names["d2t"]).to(torch.int64) + torch.arange(rows)).to(device)
        wanted = ((short, checkpoint.read(name)) for short, name in names.items() if short not in ("d2t", "t2d"))
        load_into(targets, wanted, LoadRules(origin=lambda short: checkpoint.where(names[short])))

    def _targets(self) -> dict[str, Target]:
        found = {f"layers.0.{name}": target for name, target in self._layer.targets().items()}
        found["layers.0.hidden_norm.weight"] = self._state_norm.weight_target()
        found["norm.weight"] = self._last_norm.weight_target()
        found["fc.weight"] = self._fuse.weight_target()
        if self._fuse.has_bias:
            found["fc.bias"] = self._fuse.bias_target()
        return found

    @torch.no_grad()
    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head: what three layers read, [T, 3 * the model's size]."""
        return self._fuse.forward(hidden)

    def opaque(self) -> list[Opaque]:
        """Nothing in it looks at numbers."""
        return []

    def release(self, slot: int) -> None:
        """Nothing is kept outside the caches."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See Head."""
        layer, embedding, states = self._layer, self._embedding, batch.states
        assert states is not None, "a head reads states"
        embedded = self._model.embed(batch.token_ids) if embedding is None else embedding.forward(batch.token_ids)
        normed = self._state_norm.forward(states)
        residual = normed if self._norm_first else states
        cos, sin = self._rotary.tables(batch)
        both = torch.cat((layer.input_norm.forward(embedded), normed), dim=-1)
        hidden = layer.attend(both, cos, sin, batch).index_select(0, batch.logit_rows)
        hidden, residual = layer.post_norm.add(hidden, residual.index_select(0, batch.logit_rows))
        scored, whole = self._last_norm.add(layer.mlp.forward(hidden), residual)
        return torch.cat((whole, scored), dim=-1)

    @torch.no_grad()
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """See Head: tokens that the head's vocabulary lacks are never guessed."""
        if self._output is None:
            return self._model.score(states)
        logits = self._output.forward(states)
        if self._tokens is None:
            return logits
        whole = logits.new_full((logits.shape[0], self._vocabulary), float("-inf"))
        return whole.index_copy_(1, self._tokens, logits)


def _own_name(name: str) -> str:
    """A checkpoint's name as the speculators library has it."""
    return OTHER_NAMES.sub(lambda match: "layers.0." if match[2] else "", name)

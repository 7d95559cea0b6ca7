"""LibraryLayer: an MTP layer of a family that runs through the Transformers library, such as DeepSeek-V3 and GLM-4-MoE.

It is a model of one layer, of the same class as the model itself, probed and rewritten like any other: the joined state
stands in place of its embedding, and the layer's own norm in place of its last one. It has no output matrix.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quire.kernels.programs import Opaque
from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.layers.linear import Linear
from quire.layers.norm import RMSNorm
from quire.layers.spec import ModelLayout
from quire.models.assemble import build_transformers
from quire.models.files.headers import weight_headers
from quire.models.files.hub import ModelFiles
from quire.models.probing.probe import probe
from quire.models.speculation.nextlayer import Style
from quire.models.speculation.open_model import OpenModel
from quire.models.transformers.hidden_states import Tapped
from quire.models.transformers.model import TransformersModel
from quire.models.weights.checkpoint import Checkpoint
from quire.models.weights.load import LoadRules, load_into

FIRST_DENSE = "first_k_dense_replace"  # a layer behind the last one is never one of the first, which have no experts


def library_layout(files: ModelFiles, style: Style, dtype: torch.dtype) -> ModelLayout:
    """The layout of the MTP layer of a model. Raises UnsupportedModelError where no such layer can be served."""
    return probe(_one_layer(files, style), dtype).layout


class LibraryLayer:
    """A Head, loaded from the model's own `files`."""

    def __init__(
        self, files: ModelFiles, style: Style, model: OpenModel, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        assert style.embedding_norm and style.state_norm, "only such styles lie behind a model's last layer"
        inner = _one_layer(files, style)
        report = probe(inner, dtype)
        self.layout = report.layout
        self.hf_config = files.config
        self._model = model
        served = build_transformers(inner, report, 0, dtype, device, ops, _without_tables)
        assert isinstance(served, TransformersModel), "find_heads has looked at its tier"
        self._inner = served
        self._norm = served.model.get_decoder().norm
        size, eps = self.layout.hidden_size, files.text_config.rms_norm_eps
        self._join = Linear(ops, 2 * size, (size,), False, dtype, device)
        self._embedding_norm, self._state_norm = (
            RMSNorm(ops, size, eps, "down_then_scale", dtype, device) for _ in range(2)
        )
        targets = {
            f"{style.join}.weight": self._join.weight_target(),
            f"{style.embedding_norm}.weight": self._embedding_norm.weight_target(),
            f"{style.state_norm}.weight": self._state_norm.weight_target(),
        }
        checkpoint = Checkpoint(files)
        read = ((name, checkpoint.read(f"{style.prefix}{name}")) for name in targets)
        load_into(targets, read, LoadRules(origin=lambda name: checkpoint.where(f"{style.prefix}{name}")))

    def take(self, hidden: torch.Tensor) -> torch.Tensor:
        """See Head: the model's last states are read as they are."""
        return hidden

    def opaque(self) -> list[Opaque]:
        """See models/programs/recorded.py."""
        return self._inner.opaque()

    def release(self, slot: int) -> None:
        """Nothing is kept outside the caches."""

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """See Head."""
        assert batch.states is not None, "a head reads states"
        embedded = self._embedding_norm.forward(self._model.embed(batch.token_ids))
        joined = self._join.forward(torch.cat((embedded, self._state_norm.forward(batch.states)), dim=-1))
        with Tapped([self._norm], [0]) as read:
            scored = self._inner.states_of(joined, batch)
        return torch.cat((read[0], scored), dim=-1).index_select(0, batch.logit_rows)

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """See Head: the model's output matrix, of which the layer's own is a copy."""
        return self._model.score(states)


def _one_layer(files: ModelFiles, style: Style) -> ModelFiles:
    """The layer as a model of its own: the config cut down, the weights under the names of a first layer."""
    config = copy.deepcopy(files.library_config)
    text = config.get_text_config()
    layers = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[-1:])
    text.num_hidden_layers = 1
    if hasattr(text, FIRST_DENSE):
        setattr(text, FIRST_DENSE, 0)
    own = {f"{style.last_norm}.weight": "model.norm.weight"}
    aside = (style.join, style.embedding_norm, style.state_norm, "embed_tokens", "shared_head.head")
    headers = {}
    for name, header in weight_headers(replace(files, scheme=None)).items():
        inner = name.removeprefix(style.prefix)
        if name != inner and not inner.startswith(tuple(f"{part}." for part in aside)):
            headers[own.get(inner, f"model.layers.0.{inner}")] = header
    return replace(files, config=config, headers=headers)


def _without_tables(model: Any) -> None:
    """What the layer does not have: neither words nor scores of its own."""
    model.get_decoder().embed_tokens = nn.Identity()
    model.lm_head = nn.Identity()

"""The small model that guesses what a larger one will say: which it is, and whether the two can work together.

Reads configs, no weights.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass, replace

import torch

from quire.config import ModelOptions
from quire.errors import ConfigError
from quire.layers.spec import ModelLayout
from quire.models.build import layout_of
from quire.models.hub import ModelFiles, find_model


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model found on this machine; `options` are those it is loaded with."""

    files: ModelFiles
    options: ModelOptions
    layout: ModelLayout
    longest: int  # positions that it can read


def find_draft(
    model: str | None, target: ModelFiles, layout: ModelLayout, options: ModelOptions, dtype: torch.dtype,
    download: bool,
) -> DraftModel:  # fmt: skip
    """Find the draft model for `target`, which has `layout` and was found by `options`.

    `model` is a folder or a hub id; None takes the bundled draft for the bundled model. Raises ConfigError for a pair
    that cannot work together, ModelError as find_model.
    """
    if model is None:
        if options.model is not None:
            raise ConfigError(
                f"The method draft_model needs a small model that guesses for {target.name}: name one with --spec-model."
            )
        model = str(importlib.resources.files("quire").joinpath("bundled", "draft"))
    wanted = replace(
        options,
        model=model,
        tokenizer=None,
        revision=None,
        tokenizer_revision=None,
        hf_overrides={},
        quantization=None,
        served_model_name=(),
        override_generation_config={},
    )
    files = find_model(wanted, download)
    found = layout_of(files, wanted.model_impl, dtype)
    sizes = [one.text_config.vocab_size for one in (files, target)]
    if sizes[0] > layout.vocab_size:
        raise ConfigError(
            f"The draft model {files.name} knows {sizes[0]} tokens, and {target.name} {sizes[1]}: they do not share a "
            "tokenizer. Name a draft model of the same family with --spec-model."
        )
    if not (found.batched and found.chunked_prefill) or any(layer.kind == "state" for layer in found.layers):
        raise ConfigError(
            f"The draft model {files.name} cannot guess: its state cannot be taken back to an earlier position. Name one "
            "with attention layers only."
        )
    return DraftModel(files, wanted, found, getattr(files.text_config, "max_position_embeddings", 2048))

"""What guesses for a model: a small model, heads, or a further layer; which it is, and whether the two can work together.

Reads configs and the names of weights, no weights.
"""

from __future__ import annotations

import importlib.resources
import logging
from dataclasses import dataclass, replace

import torch

from quire.config import ModelOptions, Speculation
from quire.errors import ConfigError
from quire.layers.spec import ModelLayout
from quire.models.build import layout_of
from quire.models.files.hub import ModelFiles, find_model
from quire.models.native.decoder import FAMILIES
from quire.models.speculation.eagle3 import LLAMA, fused_taps, is_fused, layer_overrides
from quire.models.speculation.nextlayer import EAGLE, Style, mtp_layers, mtp_style, next_layout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DraftModel:
    """What guesses, found on this machine; `options` are those it is loaded with.

    `layout` is that of its own layers: none for Medusa heads, one for EAGLE heads and MTP layers.
    """

    files: ModelFiles
    options: ModelOptions
    layout: ModelLayout
    longest: int  # positions that it can read
    style: Style | None = None  # of the layer, for eagle and mtp
    taps: tuple[int, ...] = ()  # the model's layers that an EAGLE-3 head reads along with


def find_guesser(
    speculation: Speculation | None, target: ModelFiles, layout: ModelLayout, options: ModelOptions, dtype: torch.dtype,
    download: bool,
) -> DraftModel | None:  # fmt: skip
    """The model, heads or layer that guesses for `target`, where the method has one; see find_draft and find_heads."""
    if speculation is None or speculation.method in ("ngram", "suffix"):
        return None
    if speculation.method == "draft_model":
        return find_draft(speculation.model, target, layout, options, dtype, download)
    return find_heads(speculation.method, speculation.model, target, layout, options, dtype, download)


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
    wanted = _options(options, model)
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


def find_heads(
    method: str, model: str | None, target: ModelFiles, layout: ModelLayout, options: ModelOptions, dtype: torch.dtype,
    download: bool,
) -> DraftModel:  # fmt: skip
    """Find Medusa heads, an EAGLE head or an MTP layer for `target`, which has `layout` and was found by `options`.

    Without `model` an MTP layer is looked for in the target's own checkpoint, and the bundled model has an EAGLE head.
    Raises ConfigError and ModelError as find_draft.
    """
    if layout.tier not in ("native", "A"):
        raise ConfigError(
            f"The method {method} goes on from hidden states, which quire does not see in {target.name}: it is served in "
            f"tier {layout.tier}, through whole modules of the Transformers library. Take ngram, suffix or draft_model."
        )
    if method == "eagle" and model is None and options.model is None:
        model = str(importlib.resources.files("quire").joinpath("bundled", "eagle"))
    if model is None and method != "mtp":
        raise ConfigError(f"The method {method} needs heads trained for {target.name}: name their folder as the model.")
    if method == "medusa":
        # Its config describes no model of its own.
        wanted = replace(_heads_options(options, str(model)), hf_overrides=LLAMA)
        return DraftModel(find_model(wanted, download), wanted, replace(layout, layers=()), 1 << 31)
    if method == "eagle":
        return _find_eagle(str(model), target, layout, options, download)
    wanted = options if model is None else _heads_options(options, model)
    files = target if model is None else find_model(wanted, download)
    style = mtp_style(files)
    if style is None:
        raise ConfigError(
            f"The checkpoint of {files.name} has no MTP layer (names like mtp.fc.weight or model.layers.N.eh_proj.weight). "
            "Take another method, or name the folder that has it."
        )
    layers = mtp_layers(files, style)
    if layers > 1:
        logger.info(
            "%s has %d MTP layers. The first one, %s%s*, guesses every token from its own states; the others are not read.",
            files.name, layers, style.prefix, style.layer,
        )  # fmt: skip
    if files.architecture not in FAMILIES and style.prefix.startswith("model.layers."):
        # Imported here, with the Transformers library: it takes seconds, and native models do without.
        from quire.models.speculation.nextlibrary import library_layout

        found = library_layout(files, style, dtype)
        if found.tier != "A":
            raise ConfigError(
                f"The MTP layer of {files.name} can be served in tier {found.tier} only, which cannot take back a wrong "
                "guess. Take ngram, suffix or draft_model."
            )
    else:
        found = next_layout(files)
    return _fitting(DraftModel(files, wanted, found, _longest(files), style), target, layout)


def _find_eagle(
    model: str, target: ModelFiles, layout: ModelLayout, options: ModelOptions, download: bool
) -> DraftModel:
    """An EAGLE head, or an EAGLE-3 head, whose config may have the layer's own inside."""
    wanted = _heads_options(options, model)
    fused = replace(wanted, hf_overrides=LLAMA)
    files = find_model(fused, download)
    if not is_fused(files):
        files = find_model(wanted, download)
        return _fitting(DraftModel(files, wanted, next_layout(files), _longest(files), EAGLE), target, layout)
    fused = replace(fused, hf_overrides=layer_overrides(files))
    files = find_model(fused, download)
    found = replace(next_layout(files), vocab_size=layout.vocab_size)
    taps = fused_taps(files, target.text_config.num_hidden_layers)
    return DraftModel(files, fused, found, _longest(files), taps=taps)


def _fitting(found: DraftModel, target: ModelFiles, layout: ModelLayout) -> DraftModel:
    """The layer with the model's vocabulary. Raises ConfigError where it cannot read the model's states."""
    if found.layout.hidden_size != layout.hidden_size:
        raise ConfigError(
            f"{found.files.name} goes on from states of {found.layout.hidden_size} numbers, and those of {target.name} "
            f"have {layout.hidden_size}: it was made for another model."
        )
    return replace(found, layout=replace(found.layout, vocab_size=layout.vocab_size))


def _longest(files: ModelFiles) -> int:
    return getattr(files.text_config, "max_position_embeddings", 2048)


def _heads_options(options: ModelOptions, model: str) -> ModelOptions:
    """As _options; heads are read from their files even where the model has random weights."""
    found = _options(options, model)
    return replace(found, load_format="auto") if found.load_format == "dummy" else found


def _options(options: ModelOptions, model: str) -> ModelOptions:
    """The target's options, without what is said of the target alone."""
    return replace(
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

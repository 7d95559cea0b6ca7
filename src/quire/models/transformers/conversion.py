"""Loads a checkpoint into a Transformers model built on meta, by that library's own rules for names and layouts.

The rules (renamings, merges of expert lists, splits) are the library's; the loop is ours: one target at a time, so
that loading needs the weights plus one target. Knows targets, so modules may have been replaced before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from quire.errors import CheckpointError, ModelError
from quire.kernels.rounding import restored
from quire.layers.target import Target
from quire.models.files.hub import ModelFiles
from quire.models.native.decoder import spare_layers
from quire.models.weights.checkpoint import Checkpoint
from quire.models.weights.load import LEFTOVERS, Filler, LoadReport, LoadRules, dummy_weights
from quire.quant.checkpoints import StoredWeight

SMALL_BYTES = 1 << 20  # below this a copy is cheaper than keeping a piece of the file mapped


def model_targets(model: Any, dtype: torch.dtype, device: torch.device) -> dict[str, Target]:
    """A target for every persistent tensor of a Transformers model on meta, by its state_dict name.

    Call it before modules are replaced, and put the replacements' own targets over these. `dtype` is the one the model
    was built in; parameters that the library wants in float32 get it.
    """
    wide = [re.escape(pattern).replace(r"\*", r"[^.]+") for pattern in model._get_dtype_plan(dtype)]
    keep_wide = re.compile("|".join(rf"(?:^|\.){pattern}(?:\.|$)" for pattern in wide) or r"(?!)")
    targets = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        kept = torch.float32 if tensor.is_floating_point() and keep_wide.search(name) else tensor.dtype
        load = partial(_set_tensor, model.get_submodule(owner), leaf, kept, device)
        targets[name] = Target(tuple(tensor.shape), kept, load)
    return targets


def _set_tensor(
    module: nn.Module, leaf: str, dtype: torch.dtype, device: torch.device, tensor: torch.Tensor | StoredWeight
) -> torch.Tensor:
    """Put a tensor where the module has a parameter or buffer of that name; returns what tied ones are to share."""
    if isinstance(tensor, StoredWeight):  # of a linear that the library keeps: nothing but plain weights will do
        tensor = restored(tensor.unpack())
    if isinstance(tensor, nn.Parameter) and tensor.dtype is dtype and leaf in module._parameters:
        module._parameters[leaf] = tensor
        return tensor
    stored = tensor.detach().to(device=device, dtype=dtype).contiguous()
    if stored.data_ptr() == tensor.data_ptr() and stored.numel() * stored.element_size() < SMALL_BYTES:
        stored = stored.clone()
    if leaf in module._buffers:
        module._buffers[leaf] = stored
        return stored
    parameter = module._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
    parameter._is_hf_initialized = True
    return parameter


def load_transformers(
    model: Any, targets: Mapping[str, Target], files: ModelFiles, device: torch.device, seed: int
) -> LoadReport:
    """Fill every target, tie what is tied, and re-create what no checkpoint holds (rotary tables, masks).

    Raises CheckpointError naming file and tensor. Afterwards no tensor of the model is on meta.
    """
    checkpoint = Checkpoint(files)
    rules = LoadRules(
        ignored=(
            *LEFTOVERS,
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *spare_layers(checkpoint.headers, getattr(files.text_config, "num_hidden_layers", 0)),
        ),
        tied=dict(model.all_tied_weights_keys),
        optional=_may_be_missing(model, targets),
        origin=checkpoint.where,
    )
    filler = Filler(targets, rules)
    if files.weight_format == "dummy":
        own = {name: target for name, target in targets.items() if name not in rules.tied}
        for name, tensor in dummy_weights(own, seed):
            filler.give(name, tensor, name)
    else:
        _stream(model, checkpoint, filler)
    report = filler.finish()
    checkpoint.sweep()
    _complete(model, device)
    return report


def _may_be_missing(model: Any, targets: Mapping[str, Target]) -> frozenset[str]:
    """Names that a checkpoint may lack: buffers, which are computed, and what the library says so of."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")
    buffers = {name for name, _ in model.named_buffers()}
    return frozenset(name for name in targets if name in buffers or allowed.search(name))


# ---------------------------------------------------------------- the library's rules


@dataclass(slots=True)
class _Recipe:
    """How one target is made: the checkpoint's names, and the rule that turns their tensors into targets."""

    rule: WeightConverter | None
    sources: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)


def _stream(model: Any, checkpoint: Checkpoint, filler: Filler) -> None:
    for target, recipe in _recipes(model, checkpoint, filler).items():
        if recipe.rule is None:
            for source in recipe.sources:
                filler.give(target, checkpoint.read(source), source)
        else:
            for name, tensor in _converted(model, checkpoint, target, recipe).items():
                filler.give(name, tensor, recipe.sources[0])
        for source in recipe.sources:
            checkpoint.forget(source)


def _recipes(model: Any, checkpoint: Checkpoint, filler: Filler) -> dict[str, _Recipe]:
    """Sort the checkpoint's names under the targets they make; names without one are handed to the filler."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    targets = dict(filler.targets)
    recipes: dict[str, _Recipe] = {}
    for source in sorted(checkpoint.headers, key=dot_natural_key):
        target, pattern = rename_source_key(source, renamings, converters, prefix, targets)
        if target not in targets and source in targets:
            target, pattern = source, None
        if target not in targets:
            filler.reject(source)
            continue
        if target not in recipes:
            # Each target has its own copy: a rule collects the tensors of what it is making.
            recipes[target] = _Recipe(deepcopy(by_pattern[pattern]) if pattern is not None else None)
        recipes[target].sources.append(source)
        recipes[target].patterns.append(pattern or source)
    return recipes


def _converted(model: Any, checkpoint: Checkpoint, target: str, recipe: _Recipe) -> dict[str, torch.Tensor]:
    """Run a rule over its tensors: target name -> tensor."""
    rule = recipe.rule
    assert rule is not None
    for source, pattern in zip(recipe.sources, recipe.patterns, strict=True):
        # The library takes a function in place of a future: the tensor is read when the rule runs.
        rule.add_tensor(target, source, pattern, partial(_read_plain, checkpoint, source))
    try:
        made = rule.convert(target, model=model, config=model.config, hf_quantizer=None, loading_info=None)
    except CheckpointError:
        raise
    except Exception as error:  # the library's operations raise whatever torch raises
        first = recipe.sources[0]
        raise CheckpointError(
            f"{len(recipe.sources)} tensors of the checkpoint ({first!r} in {checkpoint.where(first)}, ...) cannot be "
            f"made into {target!r}: {error}. The weights and config.json do not belong together."
        ) from error
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def _read_plain(checkpoint: Checkpoint, source: str) -> torch.Tensor:
    """A tensor that the library may cut and join."""
    tensor = checkpoint.read(source)
    if isinstance(tensor, StoredWeight):
        raise CheckpointError(
            f"The quantized weight {source!r} must be joined with others for this model's code, which is possible for "
            "unquantized weights only. Use the model's unquantized repository with --quantization int8 or int4."
        )
    return tensor


# ---------------------------------------------------------------- what no checkpoint holds


def _complete(model: Any, device: torch.device) -> None:
    """Give real memory to what is still on meta, and let the library compute it: buffers, and optional parameters."""
    made: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module in model.modules():
        fresh = [(module, leaf, _unset_like(tensor, device)) for leaf, tensor in _on_meta(module)]
        # The library initializes a module only without this mark; its loaded parameters carry their own.
        module._is_hf_initialized = not fresh
        for _, leaf, tensor in fresh:
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        made += fresh
    if not made:
        return
    with torch.no_grad():
        model.initialize_weights()
    waiting = {id(module) for module, leaf, _ in made if _is_unset(getattr(module, leaf))}
    if waiting:
        # Some models fill the buffers of their layers from the module around them.
        for module in model.modules():
            module._is_hf_initialized = not any(id(inner) in waiting for inner in module.modules())
        with torch.no_grad():
            model.initialize_weights()
    for module, leaf, _ in made:
        if _is_unset(getattr(module, leaf)):
            raise ModelError(
                f"The tensor {leaf!r} of {type(module).__name__} is in no checkpoint, and the model's code does not "
                "compute it when weights are loaded. Update transformers, or report this model."
            )


def _on_meta(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    own = [*module._parameters.items(), *module._buffers.items()]
    return [(leaf, tensor) for leaf, tensor in own if tensor is not None and tensor.is_meta]


def _unset_like(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Memory filled with a value that no initialization leaves behind."""
    if tensor.is_floating_point():
        return torch.full(tensor.shape, torch.nan, dtype=tensor.dtype, device=device)
    if tensor.dtype is torch.bool:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    return torch.full(tensor.shape, torch.iinfo(tensor.dtype).min, dtype=tensor.dtype, device=device)


def _is_unset(tensor: torch.Tensor) -> bool:
    if tensor.is_meta:
        return True
    if tensor.numel() == 0 or tensor.dtype is torch.bool:
        return False
    if tensor.is_floating_point():
        return bool(tensor.isnan().any())
    return bool((tensor == torch.iinfo(tensor.dtype).min).any())

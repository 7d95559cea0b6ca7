"""build_model and layout_of: a model ready to serve, and what it needs in memory, by the path that runs it.

Imports the Transformers path only when it is taken: it brings seconds of imports that a native model does without.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from quire.config import ModelOptions
from quire.kernels.table import Ops
from quire.layers.spec import ModelLayout
from quire.models.files.hub import ModelFiles, OnShare
from quire.models.registry import ModelRegistry, select_impl
from quire.models.served import ServedModel
from quire.models.weights.packed_cache import packed_cache
from quire.quant.checkpoints import stored_ops
from quire.quant.format import quantized_ops


def layout_of(files: ModelFiles, model_impl: str = "auto", dtype: torch.dtype | None = None) -> ModelLayout:
    """What a model's layers need in memory, without reading weights. `dtype` is the one it will run in."""
    if select_impl(files, model_impl) == "native":
        layout: ModelLayout = ModelRegistry.resolve(files.architecture).layout_of(files)
        return layout
    from quire.models.probing.probe import probe

    return probe(files, dtype).layout


def build_model(
    files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device, ops: Ops,
    on_share: OnShare | None = None,
) -> ServedModel:  # fmt: skip
    """Load a model, its linears in the format that options.quantization names, or as the checkpoint stores them.

    `on_share` hears what share of the weights has been taken so far, after each tensor.
    Raises ModelError: nothing runs it, or its weights are missing, corrupt or not its own.
    """
    ops = quantized_ops(ops, files.rounding) if files.scheme is None else stored_ops(ops)
    impl = select_impl(files, options.model_impl)
    files = replace(files, on_share=on_share)
    cache = packed_cache(files, options, impl, dtype, ops)
    if cache is not None:
        ops, files = cache.ops, replace(files, read_ahead=not cache.hit)
    served: ServedModel
    if impl == "native":
        served = ModelRegistry.resolve(files.architecture)(files, dtype, device, ops)
        served.load(files, options.seed)  # type: ignore[attr-defined]
    else:
        from quire.models.assemble import build_transformers
        from quire.models.probing.probe import probe

        served = build_transformers(files, probe(files, dtype), options.seed, dtype, device, ops)
    if cache is not None:
        cache.finish()
    return served

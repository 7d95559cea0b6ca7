"""What the weights of a model take: how many parameters there are, and the bytes they need once loaded.

Read from the headers of the weight files, or from the config where there are none. Reads no weights.
"""

from __future__ import annotations

import math

import torch

from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.layers.spec import ModelLayout
from quire.models.files.headers import weight_headers
from quire.models.files.hub import ModelFiles
from quire.models.files.native_config import NativeConfig
from quire.models.native.decoder import native_shapes
from quire.quant.checkpoints import stored_bytes
from quire.quant.format import ROUTERS, format_of, head_format

EXPANDS = "kv_b_proj"  # the linear from latents to keys and values; where latents are kept it is never rounded
SAMPLE = 4096  # width of the matrix whose bytes stand for those of matrices of unknown shape


def weight_bytes(
    files: ModelFiles, layout: ModelLayout, dtype: torch.dtype, stored: torch.dtype, method: str | None = None
) -> int:
    """Bytes of the weights once loaded in `dtype`, their linears as `method` says. `stored` is the checkpoint's dtype.

    A tied output matrix is packed for its own product, so it counts beside the embedding.
    """
    shapes = weight_shapes(files)
    stored_ones = _stored_linears(files)
    table = layout.vocab_size * layout.hidden_size
    head = table * head_bytes(method, dtype) if files.text_config.tie_word_embeddings else 0
    if not shapes:
        count = count_parameters(files, stored)
        return int((count - table) * bytes_per_weight(method, dtype) + table * dtype.itemsize + head)
    total = head
    latents = any(layer.shared for layer in layout.layers)
    for name, shape in shapes.items():
        count, parts = math.prod(shape), name.split(".")
        if latents and parts[-2:-1] == [EXPANDS]:
            total += count * dtype.itemsize
            continue
        if name in stored_ones:
            total += stored_ones[name]
            continue
        if len(parts) > 1 and parts[-2] == "lm_head":
            total += count * head_bytes(method, dtype)
        elif method is None or files.scheme is not None or not _is_linear(shape, parts, layout):
            total += count * dtype.itemsize
        else:
            total += format_of(ops_of(reference), method).nbytes(math.prod(shape[:-1]), shape[-1])
    return int(total)


def _stored_linears(files: ModelFiles) -> dict[str, int]:
    """Name -> bytes once packed, of the linears that the checkpoint has quantized."""
    if files.scheme is None:
        return {}
    return {
        name: stored_bytes(files.scheme, {last: part.shape for last, part in header.parts.items()})
        for name, header in weight_headers(files).items()
        if header.parts is not None
    }


def bytes_per_weight(method: str | None, dtype: torch.dtype) -> float:
    """Bytes of one value of a usual linear."""
    if method is None:
        return dtype.itemsize
    return format_of(ops_of(reference), method).nbytes(SAMPLE, SAMPLE) / SAMPLE**2


def head_bytes(method: str | None, dtype: torch.dtype) -> float:
    """Bytes of one value of the output matrix."""
    kind = None if method is None else head_format(ops_of(reference), method)
    return dtype.itemsize if kind is None else kind.nbytes(SAMPLE, SAMPLE) / SAMPLE**2


def _is_linear(shape: tuple[int, ...], parts: list[str], layout: ModelLayout) -> bool:
    """Whether a weight of this name and shape belongs to a linear that is quantized: a matrix, or stacked ones."""
    if len(parts) > 1 and parts[-2] in ROUTERS:
        return False
    return shape[0] != layout.vocab_size and (len(shape) == 2 or (len(shape) == 3 and "experts" in parts))


def weight_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight; empty where only reading the weights would tell (.bin and .pt files)."""
    if files.weight_format == "safetensors":
        return {name: header.shape for name, header in weight_headers(files).items()}
    if files.weight_format == "pt":
        return {}
    if isinstance(files.config, NativeConfig):
        return native_shapes(files)
    # Imported here: transformers takes seconds, and only a model without weight files needs it at this point.
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(files.config, trust_remote_code=files.trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def count_parameters(files: ModelFiles, stored: torch.dtype) -> int:
    """Parameters by the headers of the weight files; by their size and `stored` dtype for .bin, by the config for dummy
    weights."""
    if files.weight_format == "pt":
        return sum(path.stat().st_size for path in files.weights) // stored.itemsize
    return sum(math.prod(shape) for shape in weight_shapes(files).values())

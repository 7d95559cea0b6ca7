"""The tiny twin: a config of the same class and flags with every size shrunk, and a model of it with random weights.

What the probe learns on the twin must hold for the real model, so flags, layer kinds, activations and the relations
between head counts survive; widths, depth and vocabulary do not. The twin knows nothing of paging.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quire.models.twin.sizes import ONE_MEANS_NONE, OVERRIDES, SIZES, ZERO_MEANS_NONE

VOCAB = 99
HEADS = 4
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
KV_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "swa_num_key_value_heads",
    "n_kv_heads",
    "num_global_key_value_heads",
)
MOST_LAYERS = 6
NESTED = ("hidden_size", "d_model", "num_hidden_layers", "model_type", "vocab_size")
LENGTH_ROPES = ("dynamic", "longrope")  # beyond their original length they follow rules of their own; see ropes.py
SHORT = 8  # an original length that the texts which are tried exceed
DROPPED = ("torch_dtype", "dtype", "transformers_version", "architectures", "quantization_config")
SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrink(config: Any) -> Any:
    """A tiny config of the same class. Raises whatever the config class raises when the result contradicts itself."""
    values = shrink_values(config.to_dict())
    values.pop("model_type", None)
    _lay_over(values, OVERRIDES.get(config.model_type, {}))
    return type(config)(**values)


def shrink_values(values: dict[str, Any]) -> dict[str, Any]:
    """The same for a config's plain dict, sub-configs included."""
    small: dict[str, Any] = {}
    heads = values.get("num_attention_heads") or values.get("n_head") or HEADS
    for name, value in values.items():
        if name in DROPPED:
            continue
        if isinstance(value, dict) and any(key in value for key in NESTED):
            small[name] = shrink_values(value)
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            small[name] = _shrink_rope(value)
        else:
            small[name] = _shrink_field(name, value, heads)
    _shrink_depth(small, values)
    return small


def _shrink_field(name: str, value: Any, heads: Any) -> Any:
    """One plain field: sizes from the table, key-value heads in proportion, token ids inside the vocabulary."""
    if name in KV_HEADS and isinstance(value, int):
        if value == 1:
            return 1
        return HEADS if isinstance(heads, int) and value >= heads else HEADS // 2
    if isinstance(value, int) and not isinstance(value, bool):
        if name in SIZES:
            absent = (value == 0 and name in ZERO_MEANS_NONE) or (value == 1 and name in ONE_MEANS_NONE)
            return value if absent else SIZES[name]
        if name.endswith(("_token_id", "_token_index", "token_idx")):
            return SPECIAL_TOKENS.get(name, 90 + sum(name.encode()) % 8)
    if name == "eos_token_id" and isinstance(value, list):
        return SPECIAL_TOKENS[name]
    return value


def _shrink_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Rope parameters for a head of 8 dimensions and a short original context; nested per layer type in some models."""
    small: dict[str, Any] = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            small[name] = _shrink_rope(value)
        elif name == "mrope_section" and isinstance(value, list):
            small[name] = [2, 1, 1]
        elif name in ("long_factor", "short_factor") and isinstance(value, list):
            small[name] = value[:1] * 2 + value[-1:] * 2
        elif name == "original_max_position_embeddings" and isinstance(value, int):
            length = rope.get("rope_type") in LENGTH_ROPES
            small[name] = SIZES[name] if length else SHORT
        else:
            small[name] = value
    return small


def _shrink_depth(small: dict[str, Any], values: dict[str, Any]) -> None:
    """Keep one layer of each kind: entries of all per-layer lists that first show a new combination, at most six."""
    count_name = next((name for name in LAYER_COUNTS if isinstance(small.get(name), int)), None)
    depth = values.get(count_name) if count_name else None
    if count_name is None or not depth:
        return
    lists = [name for name, value in small.items() if isinstance(value, list) and len(value) == depth]
    per_layer = values.get("per_layer_config")
    per_layer = {int(key): value for key, value in per_layer.items()} if isinstance(per_layer, dict) else {}
    if not lists and not per_layer:
        return
    kinds: dict[str, int] = {}
    for i in range(depth):
        own = sorted((per_layer.get(i) or {}).items(), key=str)
        kinds.setdefault(repr([small[name][i] for name in lists]) + repr(own), i)
    firsts = list(kinds.values())[:MOST_LAYERS]
    layers = sorted(firsts + [firsts[i % len(firsts)] for i in range(3 - len(firsts))])
    small[count_name] = len(layers)
    for name in lists:
        small[name] = [small[name][i] for i in layers]
    if per_layer:
        small["per_layer_config"] = {n: shrink_values(per_layer[i]) for n, i in enumerate(layers) if i in per_layer}


def _lay_over(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict) and not name.startswith("rope"):
            _lay_over(values[name], value)
        else:
            values[name] = value


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters have this dtype inside the block, as when Transformers builds a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build(model_class: type, config: Any, dtype: torch.dtype, device: str = "cpu") -> nn.Module:
    """An instance in eval mode with the library's plain attention; on "meta" it has no weights.

    The implementation names in the config are read by every forward, so they can be changed afterwards.
    """
    if hasattr(config, "is_decoder"):
        config.is_decoder = True  # encoders of the bert kind generate only when told to
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device(device), default_dtype(dtype):
        return model_class(config).eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Weights spread so that attention is not flat and tokens differ: matrices by fan-in, vectors around their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                if "embed" in name.lower() or "wte" in name:
                    spread = 0.5
                elif "router" in name or "gate.weight" in name:
                    spread = 1.0
                else:
                    spread = parameter.shape[-1] ** -0.5
                parameter.copy_(noise * spread)
            else:
                start = parameter.detach().float()
                if not torch.isfinite(start).all() or start.abs().max() > 1e4:
                    start = torch.zeros_like(start)
                parameter.copy_(start + 0.1 * noise)


def twin_model(model_class: type, config: Any) -> nn.Module:
    """The twin of a real config, in float32 on the CPU, with seeded random weights."""
    torch.manual_seed(0)
    model = build(model_class, config, torch.float32)
    model.float()
    randomize(model)
    return model

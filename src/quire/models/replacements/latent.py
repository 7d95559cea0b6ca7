"""Latent attention in the library's models: which attention modules have it, and what their layers keep then.

The library's code expands the latents of all positions into keys and values of every head in a method of its own,
`expand_kv`. Where that is one linear and a copy, the latents themselves can be kept; see layers/latent.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quire.models.transformers.report import ProbeReport, class_key
from quire.models.twin.observe import Observation

EXPAND = "expand_kv"
ROWS = 3


@dataclass(frozen=True, slots=True)
class LatentSizes:
    """Of one attention module: a key is key_dim numbers made from a latent of `rank`, then `rope` copied ones."""

    heads: int
    rank: int
    key_dim: int
    rope: int
    value_dim: int


def propose_latent(model: nn.Module, seen: Observation) -> dict[str, str]:
    """Attention class -> name of its linear from latents to keys and values, where the method is nothing else."""
    found: dict[str, str] = {}
    for call in seen.attention:
        module = model.get_submodule(call.module)
        name = _linear_of(module) if call.shares is None and call.kv_heads == call.heads else None
        if name is not None:
            found[class_key(module)] = name
    return found


def _linear_of(module: nn.Module) -> str | None:
    expand = getattr(module, EXPAND, None)
    if expand is None:
        return None
    linears = [name for name, child in module.named_children() if type(child) is nn.Linear and child.bias is None]
    return next((name for name in linears if _expands(module, expand, name)), None)


def _expands(module: nn.Module, expand: Callable[..., Any], name: str) -> bool:
    """Whether keys are [first part of the linear | rope] and values its second part, for every head."""
    try:
        sizes = latent_sizes(module, name)
        generator = torch.Generator().manual_seed(3)
        latents = torch.randn(1, 1, ROWS, sizes.rank, generator=generator)
        rope = torch.randn(1, 1, ROWS, sizes.rope, generator=generator)
        with torch.no_grad():
            key, value = expand(latents, rope)
            both = module.get_submodule(name)(latents[0, 0]).view(ROWS, sizes.heads, -1).transpose(0, 1)
        first, second = both.split([sizes.key_dim, sizes.value_dim], -1)
    except Exception:  # another signature or other shapes: not the method we know
        return False
    wanted = torch.cat([first, rope[0].expand(sizes.heads, -1, -1)], -1)
    return torch.allclose(key[0], wanted, atol=1e-5) and torch.allclose(value[0], second, atol=1e-5)


def latent_sizes(module: nn.Module, name: str) -> LatentSizes:
    """The sizes of a module, by its own code on one position; works on meta, too."""
    weight: Any = module.get_submodule(name).weight
    with torch.no_grad():
        key, value = getattr(module, EXPAND)(weight.new_empty(1, 1, 1, weight.shape[1]), weight.new_empty(1, 1, 1, 1))
    heads, value_dim = value.shape[1], value.shape[3]
    key_dim = weight.shape[0] // heads - value_dim
    return LatentSizes(heads, weight.shape[1], key_dim, key.shape[3] - key_dim, value_dim)


def with_latents(report: ProbeReport, model: nn.Module) -> ProbeReport:
    """The report with latents kept where its rewrite says so; the model's modules are still the library's own."""
    layers = list(report.layout.layers)
    for call in report.calls:
        module = model.get_submodule(call.module)
        name = report.rewrite.latent.get(class_key(module))
        if name is not None:
            sizes = latent_sizes(module, name)
            key_dim = sizes.rank + sizes.rope
            layers[call.index] = replace(
                layers[call.index], kv_heads=1, key_dim=key_dim, value_dim=sizes.rank, shared=True
            )
    return replace(report, layout=replace(report.layout, layers=tuple(layers)))

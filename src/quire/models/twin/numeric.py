"""Tells by numbers what a small module computes: which norm, which gated block, which rotary. Names are not trusted.

A module is fed random input and its output compared with a few templates, for norms bit by bit in bfloat16, because
only there it shows where the cast happens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from quire.kernels.reference import ACTIVATIONS, rotary
from quire.kernels.table import Ops

NORM_STYLES = ("down_then_scale", "scale_then_down", "plus_one")
GUESSED_EPS = (1e-6, 1e-5)


def rms_norm_of(module: nn.Module, ops: Ops) -> dict[str, Any] | None:
    """{"style", "eps" (attribute or number), "weight" (parameter name or None)} of an RMS norm, or None."""
    parameters = dict(module.named_parameters(recurse=False))
    if list(module.children()) or list(module.buffers()) or len(parameters) > 1:
        return None
    if any(parameter.dim() != 1 for parameter in parameters.values()):
        return None
    name, weight = next(iter(parameters.items()), (None, None))
    x = _sample((5, _width(module, weight)))
    half = copy.deepcopy(module).to(torch.bfloat16)
    for eps in _eps_candidates(module):
        value = getattr(module, eps) if isinstance(eps, str) else eps
        for style in NORM_STYLES:
            wide = ops.rms_norm(x, weight, value, style)
            if not _close(_run(module, x), wide):
                continue
            narrow = ops.rms_norm(x.bfloat16(), None if weight is None else weight.bfloat16(), value, style)
            if _same(_run(half, x.bfloat16()), narrow):
                return {"style": style, "eps": eps, "weight": name}
    return None


def is_layer_norm(module: nn.Module, ops: Ops) -> bool:
    """Whether an nn.LayerNorm over the last dimension gives the bits of our op, in float32 nearly and in bfloat16."""
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return False
    x = _sample((5, module.normalized_shape[0]))
    half = copy.deepcopy(module).to(torch.bfloat16)
    wide = ops.layer_norm(x, module.weight, module.bias, module.eps)
    narrow = ops.layer_norm(x.bfloat16(), half.weight, half.bias, module.eps)
    return _close(_run(module, x), wide) and _close(_run(half, x.bfloat16()), narrow, 1e-2)


def gated_of(module: nn.Module) -> dict[str, Any] | None:
    """{"gate_up": child names, "down", "activation", "gate_first"} of a gated block, or None.

    "gate_up" has two names for separate projections and one for a packed one.
    """
    linears = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
    if len(linears) not in (2, 3) or any(True for _ in module.parameters(recurse=False)):
        return None
    for down_name, down in linears.items():
        others = {name: child for name, child in linears.items() if name != down_name}
        first = next(iter(others.values()))
        if sum(child.out_features for child in others.values()) != 2 * down.in_features:
            continue
        if any(child.in_features != first.in_features for child in others.values()):
            continue
        found = _match_gated(module, others, down)
        if found is not None:
            return {"gate_up": list(others), "down": down_name, **found}
    return None


def _match_gated(module: nn.Module, others: dict[str, nn.Module], down: nn.Module) -> dict[str, Any] | None:
    x = _sample((1, 3, next(iter(others.values())).in_features))
    output = _run(module, x)
    if output is None:
        return None
    with torch.no_grad():
        joined = torch.cat([child(x) for child in others.values()], -1)
        first, second = joined.chunk(2, -1)
        for activation, function in ACTIVATIONS.items():
            for gate, up, gate_first in ((first, second, True), (second, first, False)):
                if _close(output, down(function(gate) * up), 1e-4):
                    return {"activation": activation, "gate_first": gate_first}
    return None


def rotary_of(function: Callable[..., Any]) -> str | None:
    """The style, "half" or "interleaved", of a function (q [1, H, T, D], k, cos [1, T, D], sin) -> (q, k), or None."""
    query, key = _sample((1, 4, 5, 8)), _sample((1, 2, 5, 8))
    angles = _sample((1, 5, 4))
    for style in ("half", "interleaved"):
        both = torch.cat((angles, angles), -1) if style == "half" else angles.repeat_interleave(2, -1)
        cos, sin = both.cos(), both.sin()
        try:
            result = function(query, key, cos, sin)
        except Exception:  # another signature or other shapes: not a function we know
            return None
        if not isinstance(result, tuple) or len(result) != 2:
            return None
        wanted = rotary(query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0], style)
        if all(_close(got, want.transpose(0, 1)[None]) for got, want in zip(result, wanted, strict=True)):
            return style
    return None


def _eps_candidates(module: nn.Module) -> list[Any]:
    """Attributes of the module that may be its epsilon, then usual values."""
    named = [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1e-2]
    return [*named, *GUESSED_EPS]


def _width(module: nn.Module, weight: torch.Tensor | None) -> int:
    return 32 if weight is None else weight.shape[0]


def _sample(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) * 3 + 0.5


def _run(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """The module's output, or None when it does not take one tensor to one tensor."""
    try:
        with torch.no_grad():
            output = module(x)
    except Exception:  # whatever it wants, it is not the kind of module we look for
        return None
    return output if torch.is_tensor(output) else None


def _close(got: torch.Tensor | None, want: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return got is not None and got.shape == want.shape and torch.allclose(got, want, atol=tolerance, rtol=tolerance)


def _same(got: torch.Tensor | None, want: torch.Tensor) -> bool:
    return got is not None and got.dtype == want.dtype and torch.equal(got, want)

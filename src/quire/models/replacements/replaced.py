"""What stands in place of a library module, or of its forward, after a rewrite. Decides nothing.

Modules keep their names and their place in the tree; a forward is replaced on the instance, so that the library's
classes stay as they are for everybody else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from quire.kernels.reference import NormStyle
from quire.kernels.table import Ops
from quire.layers.linear import Linear


class MergedLinear:
    """One product for several siblings that read the same tensor. The first one called computes it for all.

    It holds the input only until the last sibling has taken its part, so that a tensor is never mistaken for another.
    """

    __slots__ = ("input", "left", "linear", "parts")

    def __init__(self, linear: Linear) -> None:
        self.linear = linear
        self.input: torch.Tensor | None = None
        self.parts: tuple[torch.Tensor, ...] = ()
        self.left = 0

    def part(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The output of sibling `index` for input x: a view of the merged product."""
        if self.input is not x:
            self.input = x
            self.parts = self.linear.forward(x).split(self.linear.sizes, -1)
            self.left = len(self.parts)
        found = self.parts[index]
        self.left -= 1
        if self.left == 0:
            self.input = None
            self.parts = ()
        return found


class MergedView(nn.Module):
    """Stands where one of the siblings stood."""

    def __init__(self, owner: MergedLinear, index: int, original: nn.Linear) -> None:
        super().__init__()
        self.owner = owner
        self.index = index
        self.in_features = original.in_features
        self.out_features = original.out_features
        self.__dict__["forward"] = self.forward  # found without a walk over the classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., out_features]."""
        return self.owner.part(self.index, x)


class NormForward:
    """The forward of an RMS norm whose weight stays where the library keeps it."""

    __slots__ = ("eps", "norm", "parameters", "style", "weight_name")

    def __init__(self, module: nn.Module, ops: Ops, weight_name: str | None, eps: float, style: NormStyle) -> None:
        self.norm = ops.rms_norm
        self.parameters = module._parameters
        self.weight_name = weight_name
        self.eps = eps
        self.style = style

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = None if self.weight_name is None else self.parameters[self.weight_name]
        return self.norm(x, weight, self.eps, self.style)


class LayerNormForward:
    """The same for nn.LayerNorm."""

    __slots__ = ("eps", "norm", "parameters")

    def __init__(self, module: nn.LayerNorm, ops: Ops) -> None:
        self.norm = ops.layer_norm
        self.parameters = module._parameters
        self.eps = module.eps

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        return self.norm(input, self.parameters["weight"], self.parameters["bias"], self.eps)


class GatedForward:
    """The forward of a gated feed-forward block: one merged product, one activation, one product back."""

    __slots__ = ("activation", "down", "gate_first", "gate_up", "gated")

    def __init__(self, gate_up: Linear, down: Linear, ops: Ops, activation: str, gate_first: bool) -> None:
        self.gate_up = gate_up.forward
        self.down = down.forward
        self.gated = ops.gated
        self.activation = activation
        self.gate_first = gate_first

    def __call__(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return self.down(self.gated(self.gate_up(x), self.activation, self.gate_first))


class KeptLatents:
    """Stands for the method that expands latents into the keys and values of every head: they stay what they are."""

    __slots__ = ()

    def __call__(self, latents: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """latents [1, 1, T, rank], rope [1, 1, T, R] -> [1, 1, T, rank + R] as keys, the latents as values."""
        return torch.cat((latents, rope), -1), latents


class OwnProduct:
    """Stands for torch.nn.functional in a forward that multiplies with the module's own weight: there `linear` is ours, in
    whose sums a row does not depend on its company; everything else is the library's.
    """

    def __init__(self, linear: Linear) -> None:
        self._own = linear

    def __getattr__(self, name: str) -> Any:
        return getattr(functional, name)

    def linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """input [..., K] times the weight; `weight` is the library's, in the dtype that it computes in."""
        own = self._own
        if input.dtype != own.dtype or tuple(weight.shape) != (own.out_features, own.in_features):
            return functional.linear(input, weight, bias)
        out = own.forward(input)
        return out if bias is None else out + bias


class RotaryForward:
    """Stands for the library's function of the same purpose, called with heads before positions."""

    __slots__ = ("rotary", "style")

    def __init__(self, ops: Ops, style: str) -> None:
        self.rotary = ops.rotary
        self.style = style

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query [1, H, T, D], key [1, Hkv, T, D], cos and sin [1, T, R] -> the same, rotated."""
        turned, turned_key = self.rotary(query[0].transpose(0, 1), key[0].transpose(0, 1), cos[0], sin[0], self.style)
        return turned.transpose(0, 1)[None], turned_key.transpose(0, 1)[None]

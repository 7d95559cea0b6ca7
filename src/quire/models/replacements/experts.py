"""Experts of the library's mixture-of-experts models, through its experts interface, with packed weights.

The library's modules keep their routers. Blocks that are gated as ours are, plainly, take the device's one call for all of
them, where it has one; those with a gating of their own, or a norm behind, keep it, and only the products are ours.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from quire.kernels.reference import ACTIVATIONS, PackedLinear
from quire.kernels.table import Ops
from quire.layers.moe import mix
from quire.layers.target import Target

PACKED = "quire"


class PackedExperts:
    """The weights of one experts module: an up (or gate and up) and a down matrix per expert."""

    def __init__(self, module: nn.Module, ops: Ops) -> None:
        self._ops = ops
        self._transposed = module.is_transposed
        self.up: list[PackedLinear] = []
        self.down: list[PackedLinear] = []
        self._parts: dict[str, torch.Tensor] = {}
        self._dtype: torch.dtype | None = None
        self._activation = _activation_of(module)
        self.names = {name for name in (*_names(module, "up"), *_names(module, "down")) if name}
        self._up_names = _names(module, "up")
        self._down_names = _names(module, "down")

    def targets(self, module: nn.Module, prefix: str, given: dict[str, Target]) -> dict[str, Target]:
        """Targets that pack each expert as its tensors come, in place of the module's own parameters."""
        found = {}
        for name in self.names:
            old = given[f"{prefix}.{name}"]
            found[f"{prefix}.{name}"] = Target(old.shape, old.dtype, partial(self._take, name, old.dtype))
        return found

    def _take(self, name: str, dtype: torch.dtype, tensor: torch.Tensor) -> None:
        self._parts[name] = tensor
        self._dtype = dtype
        for names, packed in ((self._up_names, self.up), (self._down_names, self.down)):
            weight, bias = names
            if name in names and weight in self._parts and (not bias or bias in self._parts):
                self._pack(packed, self._parts.pop(weight), self._parts.pop(bias) if bias else None)

    def _pack(self, packed: list[PackedLinear], weights: torch.Tensor, biases: torch.Tensor | None) -> None:
        for e in range(weights.shape[0]):
            weight = weights[e].T if self._transposed else weights[e]
            packed.append(self._ops.pack_linear(weight, None if biases is None else biases[e], self._dtype))

    @cached_property
    def stack(self) -> Any:
        """All blocks for one call, or None where there is no such call. To be asked for once the weights are there."""
        return None if self._activation is None else self._ops.stack_experts(self.up, self.down, self._activation)

    def __call__(self, module: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, size], chosen [T, K], weights [T, K] -> [T, size]. An expert number past the last adds nothing."""
        if self.stack is not None:
            return self._ops.experts(x, chosen, weights, self.stack)
        return mix(x, chosen, weights, len(self.up), partial(self._block, module))

    def _block(self, module: nn.Module, number: int, rows: torch.Tensor) -> torch.Tensor:
        hidden = self._ops.linear(rows, self.up[number])
        hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
        hidden = self._ops.linear(hidden, self.down[number])
        return module.post_expert_norm(hidden) if module.has_post_expert_norm else hidden


def _activation_of(module: nn.Module) -> str | None:
    """The activation of a block that computes activation(gate) * up of halves side by side; None for any other block."""
    if not module.has_gate or module.has_post_expert_norm:
        return None
    # Large numbers, too, because some gatings are cut off there.
    both = torch.linspace(-50.0, 50.0, 2 * 211, device="cpu")[None].roll(173, 1)
    gate, up = both.chunk(2, -1)
    try:
        output = module._apply_gate(both)
    except Exception:  # it wants something else of its module: a gating that we do not know
        return None
    if not isinstance(output, torch.Tensor) or output.shape != gate.shape:
        return None
    for activation, function in ACTIVATIONS.items():
        if torch.allclose(output, function(gate) * up, rtol=1e-5, atol=1e-5):
            return activation
    return None


def _names(module: nn.Module, side: str) -> tuple[str, str]:
    """Parameter names (weight, bias) of one side; the bias name is empty where there is none."""
    weight = "down_proj" if side == "down" else "gate_up_proj" if module.has_gate else "up_proj"
    return weight, f"{weight}_bias" if module.has_bias else ""


def packed_experts(
    module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the experts interface calls; on meta it only says the shape."""
    if hidden_states.is_meta:
        return torch.empty_like(hidden_states)
    return module.quire_experts(module, hidden_states, top_k_index, top_k_weights)


def is_experts(module: Any) -> bool:
    """Whether the library dispatches this module through its experts interface."""
    return "_is_expert_parallel" in getattr(module, "__dict__", {})


def set_experts(modules: list[nn.Module]) -> None:
    """Let these experts modules use the packed experts."""
    for module in modules:
        module.config._experts_implementation = PACKED


ALL_EXPERTS_FUNCTIONS.register(PACKED, packed_experts)

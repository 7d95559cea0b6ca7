"""Experts of the library's mixture-of-experts models, through its experts interface, with packed weights.

The library's modules keep their routers and their gating; only the grouped products are ours. Rows are sorted by
expert, and each row adds its experts in the order of its own choice, so that what a row gets does not depend on others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from quire.kernels.reference import PackedLinear
from quire.kernels.table import Ops
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

    def __call__(self, module: nn.Module, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, size], chosen [T, K], weights [T, K] -> [T, size]. An expert number past the last adds nothing."""
        rows, choices = chosen.shape
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.up)).tolist()
        gathered = x.index_select(0, order // choices)
        outputs: torch.Tensor | None = None
        start = 0
        linear = self._ops.linear
        for expert, count in enumerate(counts[: len(self.up)]):
            if not count:
                continue
            hidden = linear(gathered[start : start + count], self.up[expert])
            hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
            hidden = linear(hidden, self.down[expert])
            if module.has_post_expert_norm:
                hidden = module.post_expert_norm(hidden)
            if outputs is None:
                outputs = hidden.new_zeros(rows * choices, hidden.shape[-1])
            outputs[order[start : start + count]] = hidden
            start += count
        if outputs is None:
            return torch.zeros_like(x)
        per_choice = outputs.view(rows, choices, -1)
        total = torch.zeros(rows, outputs.shape[-1], dtype=torch.float32, device=x.device)
        for choice in range(choices):
            total.addcmul_(per_choice[:, choice].float(), weights[:, choice, None].float())
        return total.to(x.dtype)


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

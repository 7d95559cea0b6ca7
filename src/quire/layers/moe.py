"""Experts: many gated feed-forward blocks, of which each row uses a few. Knows nothing of models or routers.

Where the device has one call for all of it, that is used. Elsewhere rows are sorted by expert, and each expert computes its
rows in one product. Either way each row adds its experts' outputs in the order of its own choice, so that what a row gets
does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import nn

from quire.kernels.table import Ops
from quire.layers.mlp import GatedMLP


class Experts(nn.Module):
    """`count` gated blocks of the same shape; each holds its weights packed."""

    def __init__(
        self,
        ops: Ops,
        count: int,
        size: int,
        inner: int,
        activation: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.size = size
        self._ops = ops
        self.blocks = nn.ModuleList(GatedMLP(ops, size, inner, activation, False, dtype, device) for _ in range(count))

    @cached_property
    def stack(self) -> Any:
        """All blocks for one call, or None where there is no such call. To be asked for once the weights are there."""
        found = self.blocks
        up, down = [block.gate_up.packed for block in found], [block.down.packed for block in found]
        return self._ops.stack_experts(up, down, found[0].activation)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [T, size], chosen int64 [T, K] expert of each choice, weights [T, K] -> [T, size] in x's dtype."""
        if self.stack is not None:
            return self._ops.experts(x, chosen, weights, self.stack)
        return mix(x, chosen, weights, len(self.blocks), lambda number, rows: self.blocks[number](rows))


def mix(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    count: int,
    block: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sum of weight times block(expert, rows of x), in float32. An expert number past the last adds nothing.

    x [T, size], chosen int64 [T, K], weights [T, K] -> [T, size] in x's dtype.
    """
    rows, choices = chosen.shape
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    gathered = x.index_select(0, order // choices)
    outputs = torch.zeros_like(gathered)
    start = 0
    for number, there in enumerate(torch.bincount(flat, minlength=count)[:count].tolist()):
        if there:
            outputs[order[start : start + there]] = block(number, gathered[start : start + there])
            start += there
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for choice, output in enumerate(outputs.view(rows, choices, -1).unbind(1)):
        total.addcmul_(output.float(), weights[:, choice, None].float())
    return total.to(x.dtype)


def route(logits: torch.Tensor, choices: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] -> (chosen int64 [T, K], weights [T, K] in the logits' dtype): the largest probabilities."""
    probabilities = torch.softmax(logits, dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, choices, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return chosen, weights.to(logits.dtype)

"""MedusaHeads: small heads on a model's last hidden state, of which the k-th guesses the token k places behind the next.

In the format of published checkpoints: `k.j.linear` are the blocks of head k, and `k.N.weight` its output matrix.
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F

from quire.errors import CheckpointError
from quire.kernels.table import Ops
from quire.layers.linear import Linear
from quire.layers.spec import ModelLayout
from quire.layers.target import Target
from quire.models.files.hub import ModelFiles
from quire.models.weights.checkpoint import Checkpoint, stream_weights
from quire.models.weights.load import LoadRules, load_into

PREFIX = re.compile(r"^(medusa_heads?\.)?(?=\d+\.\d+\.)")


class MedusaHeads:
    """All heads of a checkpoint. How many there are says the checkpoint: configs are known to be wrong about it."""

    def __init__(
        self, files: ModelFiles, layout: ModelLayout, dtype: torch.dtype, device: torch.device, ops: Ops
    ) -> None:
        checkpoint = Checkpoint(files)
        names = [PREFIX.sub("", name) for name in checkpoint.headers]
        matrices = [re.fullmatch(r"(\d+)\.(\d+)\.weight", name) for name in names]
        found = {int(match[1]): int(match[2]) for match in matrices if match is not None}
        if sorted(found) != list(range(len(found))) or not found:
            raise CheckpointError(
                f"The Medusa heads in {files.folder} have no names like '0.0.linear.weight' and '0.1.weight'; the first "
                f"ones there are {', '.join(names[:3])}. Name a folder with Medusa heads."
            )
        size = layout.hidden_size
        self._blocks: list[list[Linear]] = []
        self._outputs: list[Linear] = []
        targets: dict[str, Target] = {}
        for head, blocks in sorted(found.items()):
            self._blocks.append([Linear(ops, size, (size,), True, dtype, device) for _ in range(blocks)])
            self._outputs.append(Linear(ops, size, (layout.vocab_size,), False, dtype, device))
            for index, block in enumerate(self._blocks[-1]):
                targets[f"{head}.{index}.linear.weight"] = block.weight_target()
                targets[f"{head}.{index}.linear.bias"] = block.bias_target()
            targets[f"{head}.{blocks}.weight"] = self._outputs[-1].weight_target()
        rules = LoadRules(rename=lambda name: PREFIX.sub("", name), origin=checkpoint.where)
        load_into(targets, stream_weights(checkpoint), rules)

    @property
    def count(self) -> int:
        """Heads."""
        return len(self._outputs)

    @torch.no_grad()
    def forward(self, states: torch.Tensor, head: int) -> torch.Tensor:
        """Last hidden states [R, size] -> the logits [R, V] of the token `head` + 1 places behind the next one."""
        for block in self._blocks[head]:
            states = states + F.silu(block.forward(states))
        return self._outputs[head].forward(states)

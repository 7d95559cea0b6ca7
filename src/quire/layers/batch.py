"""Batch: the tensors of one step, built by worker/batch.py and passed as an argument through the model.

It lives here, below models and worker, because both name it. It is read-only for everybody; only the attention op
writes, and only into `caches` and `states`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class GroupInputs:
    """The page tables of one layer group. S is the number of sequences, T the number of positions of the step."""

    page_size: int
    tables: torch.Tensor  # int32 [S, max pages]; for a state group [S, 1]
    slots: torch.Tensor  # int64 [T]: page * page_size + offset where each position's key and value go


@dataclass(slots=True)
class Batch:
    """One step. Positions of all sequences are packed in one row of length T, sequence after sequence.

    starts and lengths exist on the host too, because planning loops read them.
    """

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    starts: torch.Tensor  # int32 [S + 1]: first row of each sequence
    lengths: torch.Tensor  # int32 [S]: positions known after this step (context + new)
    logit_rows: torch.Tensor  # int64 [R]: rows whose logits are wanted
    rows: torch.Tensor  # int64 [S]: slot of each sequence
    starts_host: list[int]
    lengths_host: list[int]
    rows_host: list[int]
    groups: list[GroupInputs]
    caches: list[Any]  # per LayerSpec: the KV cache object of kernels.new_cache, or a list of state tensors
    prompt_lengths: torch.Tensor | None = None  # int64 [S]: length of each prompt; ropes that grow with it need it
    states: torch.Tensor | None = None  # [T, size]: what a layer that guesses on reads beside the tokens

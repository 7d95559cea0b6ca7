"""Recurrent state on pages: read the states of some requests as a batch, write them back after the mixer has run.

A state layer's cache is a list of tensors [num_pages, *shape], one per StateSpec; a request owns one page of the group.
"""

from __future__ import annotations

import torch

from quire.layers.spec import LayerSpec


def new_states(spec: LayerSpec, num_pages: int, device: torch.device | str) -> list[torch.Tensor]:
    """Zeroed state tensors [num_pages, *shape] of one layer, in the order of spec.states."""
    return [torch.zeros(num_pages, *state.shape, dtype=state.dtype, device=device) for state in spec.states]


def read_states(tensors: list[torch.Tensor], pages: torch.Tensor) -> list[torch.Tensor]:
    """Copies [n, *shape] of the states on pages int64 [n]; the caller may change them in place."""
    return [tensor.index_select(0, pages) for tensor in tensors]


def write_states(tensors: list[torch.Tensor], pages: torch.Tensor, states: list[torch.Tensor]) -> None:
    """Put states [n, *shape] on pages int64 [n]."""
    for tensor, state in zip(tensors, states, strict=True):
        tensor.index_copy_(0, pages, state.to(tensor.dtype))


def copy_states(tensors: list[torch.Tensor], pairs: list[tuple[int, int]]) -> None:
    """Copy whole pages, (source, target) by (source, target): snapshots for prefix hits."""
    for source, target in pairs:
        for tensor in tensors:
            tensor[target] = tensor[source]

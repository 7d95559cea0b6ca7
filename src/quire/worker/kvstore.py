"""KVStore: the page tensors of every layer, allocated once.

Written by the attention op and the state layers, copied here; who holds which page is decided by the scheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from quire.core.plan import GroupSpec, PageCopy
from quire.errors import CapacityError
from quire.kernels.table import Ops
from quire.layers.spec import LayerSpec, ModelLayout
from quire.worker.device import Device


class KVStore:
    """`caches[i]` belongs to layer i of the layout: a KV cache, or the list of a state layer's tensors [pages, ...].

    A layer that shares another one's keys and values has that layer's cache.
    """

    def __init__(
        self, layout: ModelLayout, groups: Sequence[GroupSpec], dtype: torch.dtype, ops: Ops, device: Device
    ) -> None:
        self._layout = layout
        self._ops = ops
        self.caches: list[Any] = []
        try:
            for layer in layout.layers:
                if layer.shares is not None:
                    self.caches.append(self.caches[layer.shares])
                else:
                    self.caches.append(_allocate(layer, groups[layer.group], dtype, ops, device))
        except (RuntimeError, MemoryError) as error:
            pages = ", ".join(f"{group.num_pages} pages of {group.page_size} ({group.kind})" for group in groups)
            raise CapacityError(
                f"The memory for keys and values could not be taken: {pages} over {len(layout.layers)} layers; "
                f"allocation stopped at layer {len(self.caches)}: {error}. Lower --gpu-memory-utilization, "
                f"--kv-cache-memory-bytes or --max-model-len."
            ) from error

    def copy(self, copies: Sequence[PageCopy]) -> None:
        """Copy pages in all layers of their groups, in the given order."""
        for index, layer in enumerate(self._layout.layers):
            pairs = [(item.source, item.target) for item in copies if item.group == layer.group]
            if not pairs or layer.shares is not None:
                continue
            if layer.kind == "state":
                for state in self.caches[index]:
                    for source, target in pairs:
                        state[target] = state[source]
            else:
                self._ops.copy_pages(self.caches[index], pairs)


def _allocate(layer: LayerSpec, group: GroupSpec, dtype: torch.dtype, ops: Ops, device: Device) -> Any:
    where = device.torch_device
    if layer.kind == "state":
        return [torch.zeros(group.num_pages, *state.shape, dtype=state.dtype, device=where) for state in layer.states]
    size = (group.num_pages, group.page_size, layer.kv_heads, layer.key_dim, layer.value_dim)
    return ops.new_cache(*size, dtype, where, layer.shared)

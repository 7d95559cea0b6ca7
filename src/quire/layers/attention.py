"""The attention call of one layer: new keys and values go to pages, queries attend over the pages of their sequence.

Used by the native decoder and by the Transformers path. It knows layer specs, batches and ops; nothing of models.
"""

from __future__ import annotations

import torch

from quire.kernels.table import Ops
from quire.layers.batch import Batch
from quire.layers.spec import LayerSpec


def attend(
    ops: Ops,
    spec: LayerSpec,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: Batch,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """query [T, H, Dk], key [T, Hkv, Dk], value [T, Hkv, Dv] -> [T, H, Dv]. `index` is the layer's place in the layout.

    A layer that shares another's keys and values writes nothing and reads the owner's pages.
    """
    group = batch.groups[spec.group]
    if spec.shares is None:
        cache = batch.caches[index]
        ops.write_cache(cache, key, value, group.slots)
    else:
        cache = batch.caches[spec.shares]
    return ops.attention(
        query,
        cache,
        group.tables,
        batch.starts,
        batch.lengths,
        spec.scale,
        window=spec.window,
        chunk=spec.chunk,
        softcap=spec.softcap,
        sinks=sinks,
    )

"""ServedModel: what the worker may ask of a model, whichever path built it."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from quire.layers.batch import Batch
from quire.layers.spec import ModelLayout


@runtime_checkable
class ServedModel(Protocol):
    """A loaded model. `layout` says what memory its layers need; `hf_config` is the config it was built from."""

    layout: ModelLayout
    hf_config: Any

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the step and return the logits [R, V] of batch.logit_rows, in float32 or the model's dtype.

        Reads and writes the caches of the batch and nothing else that outlives the call.
        """
        ...

    def release(self, slot: int) -> None:
        """The request in row `slot` has left: drop what is kept for it outside the caches (nothing, for most)."""
        ...

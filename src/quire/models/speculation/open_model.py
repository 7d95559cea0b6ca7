"""OpenModel: a model that shows what is between its embedding and its output matrix, for heads that go on from there.

NativeDecoder and TransformersModel are such. It knows nothing of the heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from quire.kernels.programs import Opaque
from quire.layers.batch import Batch
from quire.models.served import ServedModel


@runtime_checkable
class OpenModel(ServedModel, Protocol):
    """A ServedModel in three parts; score(states(batch).index_select(0, batch.logit_rows)) is forward(batch)."""

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> what the first layer reads [T, size]."""
        ...

    def states(self, batch: Batch, rows: torch.Tensor | None = None, taps: Sequence[int] = ()) -> torch.Tensor:
        """Compute the step: the last hidden states [R, size] of these rows of it, or of all.

        `taps` are numbers of layers: what each of them reads is put beside the states of all rows, [T, size * n].
        """
        ...

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, size] -> logits [R, V]."""
        ...

    def opaque(self) -> list[Opaque]:
        """See models/programs/recorded.py."""
        ...


class StatesOnly:
    """A ServedModel whose forward ends before the output matrix: it returns states of all rows, see OpenModel.states."""

    def __init__(self, model: OpenModel, taps: Sequence[int]) -> None:
        self.model = model
        self.taps = tuple(taps)
        self.layout = model.layout
        self.hf_config = model.hf_config

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the step; the states."""
        return self.model.states(batch, taps=self.taps)

    def opaque(self) -> list[Opaque]:
        """See models/programs/recorded.py."""
        return self.model.opaque()

    def release(self, slot: int) -> None:
        """See ServedModel."""
        self.model.release(slot)


class KeepsStates:
    """A ServedModel that keeps what heads read of its latest step, in `hidden`, as long as it is `open`.

    That is [T, size], the last hidden states, or with taps what those layers read, [T, size * n]. `body` computes the
    states as `states_only` does, `whole` is the model for all other steps; both may be replaced by programs that do the
    same, and are replaced again when the caches are.
    """

    def __init__(self, model: OpenModel, taps: Sequence[int] = ()) -> None:
        self.model = model
        self.states_only = StatesOnly(model, taps)
        self.body: ServedModel = self.states_only
        self.whole: ServedModel = model
        self.layout = model.layout
        self.hf_config = model.hf_config
        self.open = True
        self.hidden: torch.Tensor | None = None
        self._taps = tuple(taps)

    def forward(self, batch: Batch) -> torch.Tensor:
        """See ServedModel."""
        if not self.open:
            return self.whole.forward(batch)
        states = self.body.forward(batch)
        size = self.layout.hidden_size
        self.hidden = states[:, size:] if self._taps else states
        return self.model.score(states.index_select(0, batch.logit_rows)[:, :size])

    def release(self, slot: int) -> None:
        """See ServedModel."""
        self.model.release(slot)

"""RecordedModel: a served model whose steps run as a program, recorded from its own forward and proved against it.

The forward runs twice on made-up steps while the backend writes down what it does. The program must then give the bits of
the forward for several kinds of steps, on working memory that holds NaN, before it is used. Whatever fails leaves the
model as it is, with the reason in the log. It knows nothing of what is in a program; see kernels/programs.py.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from quire.kernels.programs import NotRecordableError, Opaque, Program, Recorder, Take
from quire.kernels.table import Ops
from quire.layers.batch import Batch, GroupInputs
from quire.layers.spec import ModelLayout
from quire.models.programs.proved import ProvedPrograms
from quire.models.served import ServedModel

logger = logging.getLogger(__name__)

Kind = Sequence[tuple[int, int, int]]  # of a made-up step: each sequence's known positions, new ones, rows wanted

# The counts of rows, of sequences, of wanted rows and of pages must differ between the two takes, and no two of these
# may have the same ratio.
TAKES: tuple[Kind, Kind] = (((0, 3, 2), (1, 1, 1), (0, 3, 2)), ((2, 4, 3), (0, 5, 1), (3, 1, 1), (0, 1, 1)))
WIDTHS = (8, 9)  # of the page tables in the takes; the ratio must differ for each group, so a group's number is added
PROOFS: tuple[Kind, ...] = (((4, 1, 1),), ((3, 1, 1), (0, 5, 0), (1, 2, 1)))
MOST_ARENA = 256 << 20  # bytes: steps that need more run as they are


@runtime_checkable
class Recordable(ServedModel, Protocol):
    """A model whose forward may become a program."""

    def opaque(self) -> list[Opaque]:
        """The functions within it that look at numbers while they run, so that they must stay as they are."""
        ...


class HostOnly:
    """Stands for what a program cannot follow: lengths and rows as Python numbers."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _refuse(self, *_: Any) -> Any:
        raise NotRecordableError(f"its Python depends on {self._name}")

    __getitem__ = __iter__ = __len__ = __bool__ = _refuse

    def __getattr__(self, name: str) -> Any:
        return self._refuse()


@dataclass(slots=True)
class Plan:
    """Where a made-up step may keep keys, values and states: as GroupSpec and KVStore have it."""

    page_sizes: Sequence[int]  # of the groups, 0 for one of states
    pages: int  # of the smallest group
    caches: list[Any]
    state: torch.Tensor | None = None  # [size], like one position of batch.states, for a model that reads them

    def clean(self, kind: Kind) -> list[torch.Tensor]:
        """The pages of a made-up step, with zeros in them: what lies there by chance may hide a difference."""
        used = 1 + max((_pages(kind, size) for size in self.page_sizes), default=0)
        found = []
        for cache in self.caches:
            for tensor in cache if isinstance(cache, list) else [] if cache is None else [cache.data]:
                found.append(tensor[:used].zero_())
        return found


def with_program(model: ServedModel, plan: Plan, ops: Ops, proved: ProvedPrograms | None = None) -> ServedModel:
    """The model with its steps as a program where that can be, else the model itself.

    To be called before anything is kept in the plan's caches, because made-up steps write to them. Model and caches must
    stay where they are as long as the result is used. A program among those `proved` before is not proved again.
    """
    began = time.perf_counter()
    name = type(model).__name__
    try:
        recorder = ops.new_recorder()
        if recorder is None:
            raise NotRecordableError("this device has no programs")
        if not isinstance(model, Recordable):
            raise NotRecordableError("it is not made for recording")
        recorded = RecordedModel(model, _record(model, recorder, plan))
        known = proved is not None and proved.known(recorded.program)
        if not known:
            recorded.prove(plan)
            if proved is not None:
                proved.note(recorded.program)
    except NotRecordableError as reason:
        logger.info("%s runs step by step in Python: %s", name, reason)
        return model
    except Exception:
        logger.warning("%s runs step by step in Python: recording it failed", name, exc_info=True)
        return model
    logger.info(
        "steps of %s are a program of %s, made in %.2f s%s",
        name,
        recorded.program.describe(),
        time.perf_counter() - began,
        ", proved before" if known else "",
    )
    return recorded


class RecordedModel:
    """A ServedModel. Owns its program; one thread at a time may call forward."""

    def __init__(self, model: ServedModel, program: Program) -> None:
        self.model = model
        self.program = program
        self.layout: ModelLayout = model.layout
        self.hf_config = model.hf_config
        unit = program.memory(2) - program.memory(1)
        self._most_rows = MOST_ARENA // max(1, unit)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits [R, V] of batch.logit_rows; see ServedModel."""
        if batch.token_ids.shape[0] > self._most_rows:
            return self.model.forward(batch)
        return self.program.run(inputs_of(batch), sizes_of(batch), max(batch.lengths_host), batch)

    def release(self, slot: int) -> None:
        """See ServedModel."""
        self.model.release(slot)

    def prove(self, plan: Plan) -> None:
        """Raise NotRecordableError unless program and forward give the same bits, and leave the same in the pages."""
        for kind in PROOFS:
            batch = made_up(kind, plan)
            pages = plan.clean(kind)
            expected = [tensor.clone() for tensor in (self.model.forward(batch), *pages)]
            plan.clean(kind)
            self.program.spoil(batch.token_ids.shape[0])
            found = [self.forward(batch), *pages]
            if not all(map(_same_bits, expected, found)):
                raise NotRecordableError(f"its program gives other numbers in a step of {kind}")


def _same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8))


def _record(model: Recordable, recorder: Recorder, plan: Plan) -> Program:
    takes = []
    opaque = model.opaque()
    for kind, width in zip(TAKES, WIDTHS, strict=True):
        batch = made_up(kind, plan, width)
        if opaque:  # else nothing is computed in a take
            plan.clean(kind)
        hidden = replace(batch)
        for name in ("starts_host", "lengths_host", "rows_host", "rows", "prompt_lengths"):
            setattr(hidden, name, HostOnly(name))
        names = [f"input {index}" for index in range(len(inputs_of(batch)))]
        names[1] = "positions"
        inputs = dict(zip(names, inputs_of(batch), strict=True))
        takes.append(Take(_runs(model, hidden), inputs, tuple(sizes_of(batch)), hidden, batch))
    return recorder.program((takes[0], takes[1]), opaque)


def _runs(model: ServedModel, batch: Batch) -> Callable[[], torch.Tensor]:
    return lambda: model.forward(batch)


def inputs_of(batch: Batch) -> list[torch.Tensor]:
    """The tensors that a program reads from a step, in one order; positions are the second."""
    found = [batch.token_ids, batch.positions, batch.starts, batch.lengths, batch.logit_rows]
    for group in batch.groups:
        found.append(group.tables)
        found.append(group.slots)
    if batch.states is not None:
        found.append(batch.states)
    return [tensor.contiguous() for tensor in found]


def sizes_of(batch: Batch) -> list[int]:
    """The numbers that change from step to step: rows, sequences, wanted rows, and each group's pages."""
    return [
        batch.token_ids.shape[0],
        batch.lengths.shape[0],
        batch.logit_rows.shape[0],
        *(group.tables.shape[1] for group in batch.groups),
    ]


def made_up(kind: Kind, plan: Plan, width: int | None = None) -> Batch:
    """A step of sequences that do not exist, on the first pages. `width` is that of the page tables, at least."""
    starts, lengths, positions, wanted = [0], list[int](), list[int](), list[int]()
    for known, count, rows in kind:
        positions += range(known, known + count)
        starts.append(starts[-1] + count)
        lengths.append(known + count)
        wanted += range(starts[-1] - rows, starts[-1])
    tokens = [1 + position % 7 for position in positions]
    groups = [_group(size, number, kind, plan.pages, width) for number, size in enumerate(plan.page_sizes)]
    slots = list(range(len(kind)))
    return Batch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        logit_rows=torch.tensor(wanted),
        rows=torch.tensor(slots),
        starts_host=starts,
        lengths_host=lengths,
        rows_host=slots,
        groups=groups,
        caches=plan.caches,
        prompt_lengths=torch.tensor(lengths),
        states=None if plan.state is None else _made_up_states(plan.state, len(tokens)),
    )


def _made_up_states(like: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, size], no two rows alike."""
    numbers = torch.arange(rows * like.shape[0], device=like.device).view(rows, -1)
    return (numbers % 17 / 8 - 1).to(like.dtype)


def _group(size: int, number: int, kind: Kind, pages: int, width: int | None) -> GroupInputs:
    if _pages(kind, size) >= pages:
        raise NotRecordableError(f"there are only {pages} pages to try it on")
    if not size:
        own_page = range(1, len(kind) + 1)
        rows = [page for page, (_, count, _) in zip(own_page, kind, strict=True) for _ in range(count)]
        return GroupInputs(1, torch.tensor(own_page, dtype=torch.int32)[:, None], torch.tensor(rows))
    needed = [-(-(known + count) // size) for known, count, _ in kind]
    columns = max(max(needed), 0 if width is None else width + number)
    tables = torch.zeros(len(kind), columns, dtype=torch.int32)
    slots: list[int] = []
    page = 1
    for row, ((known, count, _), own) in enumerate(zip(kind, needed, strict=True)):
        tables[row, :own] = torch.arange(page, page + own, dtype=torch.int32)
        slots += [page * size + position for position in range(known, known + count)]
        page += own
    return GroupInputs(size, tables, torch.tensor(slots))


def _pages(kind: Kind, size: int) -> int:
    """How many pages a made-up step uses in a group of this page size."""
    return sum(-(-(known + count) // size) for known, count, _ in kind) if size else len(kind)

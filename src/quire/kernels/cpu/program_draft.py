"""What two takes of a forward have in common: a draft, whose numbers are the same in every step or a multiple of a size.

Here too: running the parts of a draft that stay with PyTorch, and finding what follows from positions alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from quire.kernels.cpu.program_trace import (
    STEP,
    At,
    BlockKind,
    Call,
    Eager,
    Field,
    Image,
    Instruction,
    Trace,
    View,
    touched,
)
from quire.kernels.programs import NotRecordableError


class Scaled(NamedTuple):
    """`factor` times the size number `size` of the step."""

    size: int
    factor: int

    def of(self, sizes: Sequence[int]) -> int:
        return self.factor * sizes[self.size]


Number = int | Scaled  # what an int of a trace has become


def value(number: Number, sizes: Sequence[int]) -> int:
    """The number in a step of these sizes."""
    return number if isinstance(number, int) else number.of(sizes)


@dataclass(slots=True)
class Memory:
    """A block of every step. `data` is the memory itself, for constants: the program keeps it alive."""

    kind: BlockKind
    nbytes: Number
    name: str
    data: torch.UntypedStorage | None = None


@dataclass(slots=True)
class Table:
    """What follows from positions alone: a row for each of the first positions, from which a step takes its own."""

    block: int  # of kind table
    source: int  # the block that the lines fill when they run for all positions
    row: int  # bytes


@dataclass(slots=True)
class Draft:
    """A program before its memory is laid out. Ints in its instructions may be Scaled."""

    sizes: int  # how many; one more is the height of the tables
    blocks: list[Memory]
    lines: list[Instruction]
    result: View
    tables: list[Table] = field(default_factory=list)
    table_lines: list[Instruction] = field(default_factory=list)  # these fill the tables


def text_of(draft: Draft) -> str | None:
    """All of a draft but where its constants lie and what is in them; None where a function in it has no name."""
    blocks = [(block.kind, block.nbytes, block.name) for block in draft.blocks]
    lines = [[(line.calls, line.eager) for line in part] for part in (draft.lines, draft.table_lines)]
    text = repr((draft.sizes, blocks, lines, draft.result, draft.tables))
    if " at 0x" in text:
        return None
    # Addresses of weights are numbers like others, only larger: each is called by when it came first.
    names: dict[str, str] = {}
    return re.sub(r"\d{11,}", lambda found: names.setdefault(found[0], f"address {len(names)}"), text)


# ---------------------------------------------------------------- from two takes to one draft


def join(one: Trace, two: Trace) -> Draft:
    """The draft of two traces. Raises NotRecordableError where they do not do the same."""
    return _Joining(one, two).run()


class _Joining:
    def __init__(self, one: Trace, two: Trace) -> None:
        self._one, self._two = one, two
        self._sizes = list(zip(one.sizes, two.sizes, strict=True))

    def run(self) -> Draft:
        one, two = self._one, self._two
        if len(one.instructions) != len(two.instructions) or len(one.blocks) != len(two.blocks):
            raise NotRecordableError("it does not do the same in steps of different sizes")
        blocks = [self._memory(index) for index in range(len(one.blocks))]
        lines = [self._line(a, b) for a, b in zip(one.instructions, two.instructions, strict=True)]
        assert one.result is not None and two.result is not None
        return Draft(len(self._sizes), blocks, lines, self._view(one.result, two.result))

    def _memory(self, index: int) -> Memory:
        one, two = self._one.blocks[index], self._two.blocks[index]
        if (one.kind, one.name) != (two.kind, two.name):
            raise NotRecordableError("it does not touch the same tensors in steps of different sizes")
        if one.kind == "input":
            return Memory("input", 0, one.name)  # nobody asks how long it is
        if one.kind != "constant":
            return Memory(one.kind, self.number(one.nbytes, two.nbytes), one.name)
        if one.storage.data_ptr() != two.storage.data_ptr():
            same = one.nbytes == two.nbytes and torch.equal(self._one.tensor(index), self._two.tensor(index))
            if not same:
                raise NotRecordableError("it makes a tensor from numbers that only Python sees")
        return Memory("constant", one.nbytes, one.name, one.storage)

    def number(self, one: int, two: int) -> Number:
        """One for all steps, or the multiple of a size. No two sizes of the takes have the same ratio."""
        if one == two:
            return one
        for size, (a, b) in enumerate(self._sizes):
            if one * b == two * a and one % a == 0:
                return Scaled(size, one // a)
        raise NotRecordableError(f"a number in it is {one} or {two} and follows from no size of the step")

    def _line(self, one: Instruction, two: Instruction) -> Instruction:
        if (one.calls is None) != (two.calls is None) or (one.eager is None) != (two.eager is None):
            raise NotRecordableError("it does not do the same in steps of different sizes")
        calls = None
        if one.calls is not None and two.calls is not None:
            calls = tuple(self._call(a, b) for a, b in _pairs(one.calls, two.calls))
        eager = None if one.eager is None or two.eager is None else self._eager(one.eager, two.eager)
        return Instruction(calls, eager, one.reads, one.places)

    def _call(self, one: Call, two: Call) -> Call:
        if one.function != two.function:
            raise NotRecordableError("it does not do the same in steps of different sizes")
        return Call(one.function, tuple(self._argument(a, b) for a, b in _pairs(one.arguments, two.arguments)))

    def _argument(self, one: Any, two: Any) -> Any:
        if type(one) is not type(two):
            raise NotRecordableError("it does not touch the same tensors in steps of different sizes")
        if isinstance(one, Image):
            fields = [
                Field(a.offset, a.width, self._argument(a.value, b.value)) for a, b in _pairs(one.fields, two.fields)
            ]
            return Image(one.size, tuple(fields))
        if isinstance(one, At):
            if one.block != two.block:
                raise NotRecordableError("it does not touch the same tensors in steps of different sizes")
            return At(one.block, self.number(one.offset, two.offset))  # type: ignore[arg-type]
        return self.number(one, two)

    def _view(self, one: View, two: View) -> View:
        if one.block != two.block or one.dtype != two.dtype:
            raise NotRecordableError("it does not touch the same tensors in steps of different sizes")
        shape = tuple(self.number(a, b) for a, b in _pairs(one.shape, two.shape))
        strides = tuple(self.number(a, b) for a, b in _pairs(one.strides, two.strides))
        return View(one.block, self.number(one.offset, two.offset), shape, strides, one.dtype)  # type: ignore[arg-type]

    def _eager(self, one: Eager, two: Eager) -> Eager:
        leaves, shape = tree_flatten(one.arguments, is_leaf=is_view)
        others, other_shape = tree_flatten(two.arguments, is_leaf=is_view)
        if one.function != two.function or shape != other_shape:
            raise NotRecordableError("it does not do the same in steps of different sizes")
        joined = [self._leaf(one.function, a, b) for a, b in zip(leaves, others, strict=True)]
        outputs = tuple(self._view(a, b) for a, b in _pairs(one.outputs, two.outputs))
        return Eager(one.function, tree_unflatten(joined, shape), outputs)

    def _leaf(self, function: Any, one: Any, two: Any) -> Any:
        if isinstance(one, View) and isinstance(two, View):
            return self._view(one, two)
        if type(one) is int and type(two) is int:
            number = self.number(one, two)
            return number if isinstance(number, int) else _Leaf(number)
        if one is two or (isinstance(one, bool | float | str | torch.dtype | torch.device) and one == two):
            return one
        if type(one) is type(two) and isinstance(one, torch.layout | torch.memory_format) and one == two:
            return one
        raise NotRecordableError(f"an argument of {function} changes from step to step")


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A Scaled among the arguments of an eager call; not a tuple, which would be taken apart."""

    number: Scaled


def is_view(item: Any) -> bool:
    """Whether nested arguments end here."""
    return isinstance(item, View)


def _pairs(one: Sequence[Any], two: Sequence[Any]) -> list[tuple[Any, Any]]:
    if len(one) != len(two):
        raise NotRecordableError("it does not do the same in steps of different sizes")
    return list(zip(one, two, strict=True))


# ---------------------------------------------------------------- what stays with PyTorch


def run_eager(
    eager: Eager, made: dict[int, torch.Tensor], lookup: Callable[[View], torch.Tensor], sizes: Sequence[int], step: Any
) -> None:
    """Call it, with `lookup` for the tensors; the results go into `made` under their blocks."""

    def real(leaf: Any) -> Any:
        if isinstance(leaf, View):
            return lookup(leaf)
        if isinstance(leaf, _Leaf):
            return leaf.number.of(sizes)
        return step if leaf is STEP else leaf

    args, kwargs = tree_map(real, eager.arguments, is_leaf=is_view)
    out = eager.function(*args, **kwargs)
    results = [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
    for view, tensor in zip(eager.outputs, results, strict=True):
        made[view.block] = tensor


def strided(base: torch.Tensor, view: View, sizes: Sequence[int]) -> torch.Tensor:
    """The tensor of a view, `base` being any tensor of its dtype on the same memory."""
    shape = tuple(value(number, sizes) for number in view.shape)
    strides = tuple(value(number, sizes) for number in view.strides)
    offset = value(view.offset, sizes) // base.itemsize
    if base.shape == shape and base.stride() == strides and base.storage_offset() == offset:
        return base
    return base.as_strided(shape, strides, offset)


# ---------------------------------------------------------------- what follows from positions alone


def tabulate(draft: Draft, one: Trace, two: Trace, height: int) -> None:
    """Let what depends on the rows' positions alone be taken from tables, if every row of it is a function of its own
    position: seen from a run for the first `height` positions, which must give the rows of both takes."""
    positional, table_lines = _positional(draft)
    if all(line.calls is not None for line in table_lines):
        return  # it costs little as it is
    taken = set(map(id, table_lines))
    others = [line for line in draft.lines if id(line) not in taken]
    elsewhere = {draft.result.block}.union(*(line.places for line in others))
    used = sorted(block for block in positional & elsewhere if draft.blocks[block].kind != "input")
    made = fill(draft, table_lines, height)
    tables = []
    for number, block in enumerate(used, len(draft.blocks)):
        nbytes = draft.blocks[block].nbytes
        if isinstance(nbytes, int) or nbytes.size != 0:
            return
        tables.append(Table(number, block, nbytes.factor))
    for table in tables:
        if not all(_same_rows(made[table.source], table, trace, draft) for trace in (one, two)):
            return
    draft.lines = others
    draft.tables, draft.table_lines = tables, table_lines
    positions = next(index for index, block in enumerate(draft.blocks) if block.name == "positions")
    for table in reversed(tables):
        arguments = (
            *(At(table.block, 0), table.row, Scaled(draft.sizes, 1)),
            *(At(positions, 0), At(table.source, 0), Scaled(0, 1), table.row),
        )
        calls = (Call("quire_gather_rows", arguments),)  # type: ignore[arg-type]
        draft.lines.insert(0, Instruction(calls, places=touched(calls)))
        draft.blocks[table.source].kind = "arena"
    draft.blocks += [Memory("table", 0, "") for _ in tables]


def _positional(draft: Draft) -> tuple[set[int], list[Instruction]]:
    """Blocks that follow from positions and constants, and the lines that make them."""
    found = {index for index, block in enumerate(draft.blocks) if block.name == "positions"}
    lines = []
    for line in draft.lines:
        if line.eager is None or line.reads is None or not line.reads & found:
            continue
        if line.calls is not None and line.calls[0].function == "quire_gather_rows":
            continue  # a table of the model's own, which may have fewer rows
        if all(block in found or draft.blocks[block].kind == "constant" for block in line.reads):
            lines.append(line)
            found |= {view.block for view in line.eager.outputs}
    return found, lines


def fill(draft: Draft, lines: list[Instruction], height: int) -> dict[int, torch.Tensor]:
    """Run lines for the positions below `height`; the tensors by block."""
    made: dict[int, torch.Tensor] = {}
    sizes = (height,) + (1,) * draft.sizes

    def lookup(view: View) -> torch.Tensor:
        block = draft.blocks[view.block]
        if block.kind == "input":
            made.setdefault(view.block, torch.arange(height))
        elif block.kind == "constant":
            made.setdefault(view.block, torch.empty(0, dtype=view.dtype).set_(block.data))
        return strided(made[view.block], view, sizes)

    for line in lines:
        assert line.eager is not None
        run_eager(line.eager, made, lookup, sizes, None)
    return made


def _same_rows(filled: torch.Tensor, table: Table, trace: Trace, draft: Draft) -> bool:
    if not filled.is_contiguous() or filled.nbytes % table.row:
        return False
    rows = filled.view(-1).view(torch.uint8).view(-1, table.row)
    place = next(index for index, block in enumerate(trace.blocks) if block.name == "positions")
    positions = trace.tensor(place).view(torch.int64)
    if int(positions.max()) >= rows.shape[0]:
        return False
    return torch.equal(rows[positions], trace.tensor(table.source).view(-1, table.row))

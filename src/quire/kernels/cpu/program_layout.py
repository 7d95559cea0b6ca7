"""Where a draft's blocks lie while a step runs, and its native calls as the arrays that csrc/program.h describes.

Blocks whose lives do not overlap share memory. A life lasts from the first instruction that touches a block to the last;
which of them write need not be known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from quire.kernels.cpu.program_draft import Draft, Number, Scaled
from quire.kernels.cpu.program_trace import At, Call, Eager, Image
from quire.kernels.programs import NotRecordableError

CELL = 8
LINE = 64  # what the kernels like their memory to be aligned to
RESULT, ARENA = 1, 0  # bases of addresses; the others are the program's own
PATCH = np.dtype(
    [
        *(("place", "<i8"), ("bytes", "<i4"), ("base", "<i4"), ("size", "<i4"), ("unused", "<i4")),
        *(("offset", "<i8"), ("factor", "<i8")),
    ]
)  # QuirePatch
CALL = np.dtype([("function", "<i4"), ("cell", "<i4"), ("patch", "<i4"), ("patches", "<i4")])  # QuireCall


class Spot(NamedTuple):
    """Bytes from the beginning of the arena: `offset` + `factor` times the rows of the step."""

    offset: int
    factor: int


@dataclass(slots=True)
class _Slot:
    """Memory that blocks take one after the other. `unit` bytes a row, or `unit` bytes in all where `fixed`."""

    fixed: bool
    unit: int
    free_from: int  # the first line that does not need it


class Arena:
    """The working memory of a program. No size in `bounded` exceeds the rows of a step, so a block's bytes are at most
    unit * rows."""

    def __init__(self, draft: Draft) -> None:
        self._slots: list[_Slot] = []
        self._slot_of: dict[int, int] = {}
        self.bounded: set[int] = set()
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for index, line in enumerate(draft.lines):
            for block in line.places:
                if draft.blocks[block].kind == "arena" and block != draft.result.block:
                    first.setdefault(block, index)
                    last[block] = index
        for block in sorted(first, key=lambda block: first[block]):
            nbytes = draft.blocks[block].nbytes
            if isinstance(nbytes, Scaled):
                self.bounded.add(nbytes.size)
            unit = -(-(nbytes if isinstance(nbytes, int) else nbytes.factor) // LINE) * LINE
            self._slot_of[block] = self._take(isinstance(nbytes, int), unit, first[block], last[block])
        self._starts: list[Spot] = []
        self._end = Spot(0, 0)
        for fixed in (True, False):
            for slot in self._slots:
                if slot.fixed == fixed:
                    self._starts.append(self._end)
                    self._end = Spot(self._end.offset + slot.unit * fixed, self._end.factor + slot.unit * (not fixed))
        order = [index for fixed in (True, False) for index, slot in enumerate(self._slots) if slot.fixed == fixed]
        self._starts = [start for _, start in sorted(zip(order, self._starts, strict=True))]

    def spot(self, block: int, offset: Number) -> Spot:
        """Where a place in a block lies."""
        start = self._starts[self._slot_of[block]]
        if isinstance(offset, int):
            return Spot(start.offset + offset, start.factor)
        if offset.size != 0:
            raise NotRecordableError("a tensor's place depends on more than the rows of the step")
        return Spot(start.offset, start.factor + offset.factor)

    def nbytes(self, rows: int) -> int:
        """The size of all of it in a step of so many rows."""
        return self._end.offset + self._end.factor * rows

    def _take(self, fixed: bool, unit: int, first: int, last: int) -> int:
        """The slot for a block: the smallest free one that is large enough, else the largest free one made larger."""
        free = [i for i, slot in enumerate(self._slots) if slot.fixed == fixed and slot.free_from <= first]
        fitting = [i for i in free if self._slots[i].unit >= unit]
        if fitting:
            chosen = min(fitting, key=lambda i: self._slots[i].unit)
        elif free:
            chosen = max(free, key=lambda i: self._slots[i].unit)
        else:
            self._slots.append(_Slot(fixed, unit, 0))
            chosen = len(self._slots) - 1
        slot = self._slots[chosen]
        slot.unit, slot.free_from = max(slot.unit, unit), last + 1
        return chosen


@dataclass(frozen=True, slots=True)
class Native:
    """Calls in a row that need no Python: `count` from the call number `first` on."""

    first: int
    count: int


class Code:
    """The native calls of a draft. The arrays belong to whoever keeps this object; `cells` is written to in each step."""

    def __init__(self, draft: Draft, functions: dict[str, int], bases: dict[int, int], arena: Arena) -> None:
        self._draft, self._functions, self._bases, self._arena = draft, functions, bases, arena
        self._words: list[int] = []
        self._found: list[tuple[int, ...]] = []  # patches
        self._pointers: dict[int, int] = {}  # cell -> the cell that it points to
        calls: list[tuple[int, ...]] = []
        self.parts: list[Native | Eager] = []
        for line in draft.lines:
            if line.calls is None:
                assert line.eager is not None
                self.parts.append(line.eager)
                continue
            before = self.parts[-1] if self.parts else None
            if isinstance(before, Native):
                self.parts[-1] = Native(before.first, before.count + len(line.calls))
            else:
                self.parts.append(Native(len(calls), len(line.calls)))
            calls += [self._call(call) for call in line.calls]
        self.cells = np.array(self._words, dtype=np.int64)
        for cell, target in self._pointers.items():
            self.cells[cell] = self.cells.ctypes.data + target * CELL
        self.patches = np.array(self._found, dtype=PATCH)
        self.calls = np.array(calls, dtype=CALL)

    def _call(self, call: Call) -> tuple[int, ...]:
        if call.function not in self._functions:
            raise NotRecordableError(f"programs do not know {call.function}")
        cell, patch = len(self._words), len(self._found)
        self._words += [0] * len(call.arguments)
        for place, argument in enumerate(call.arguments, cell):
            if not isinstance(argument, Image):
                self._set(place * CELL, CELL, argument)
                continue
            start = self._pointers[place] = len(self._words)
            self._words += [0] * -(-argument.size // CELL)
            for field in argument.fields:
                self._set(start * CELL + field.offset, field.width, field.value)
        return self._functions[call.function], cell, patch, len(self._found) - patch

    def _set(self, place: int, width: int, value: Number | At) -> None:
        """Write `width` bytes at a place: now where they never change, else by a patch."""
        if isinstance(value, Scaled):
            self._found.append((place, width, -1, value.size, 0, 0, value.factor))
        elif isinstance(value, At):
            self._set_place(place, width, value)
        else:
            shift = place % CELL * 8
            mask = (1 << width * 8) - 1
            word = self._words[place // CELL] % (1 << 64) & ~(mask << shift) | (value & mask) << shift
            self._words[place // CELL] = word - (1 << 64) if word >> 63 else word

    def _set_place(self, place: int, width: int, at: At) -> None:
        block, offset = self._draft.blocks[at.block], at.offset
        if block.kind == "constant":
            assert block.data is not None and isinstance(offset, int)
            self._set(place, width, block.data.data_ptr() + offset)
        elif at.block == self._draft.result.block and block.kind == "arena":
            self._patch(place, width, RESULT, offset)
        elif block.kind == "arena":
            spot = self._arena.spot(at.block, offset)
            self._found.append((place, width, ARENA, 0, 0, spot.offset, spot.factor))
        else:
            self._patch(place, width, self._bases[at.block], offset)

    def _patch(self, place: int, width: int, base: int, offset: Number) -> None:
        if isinstance(offset, int):
            self._found.append((place, width, base, -1, 0, offset, 0))
        else:
            self._found.append((place, width, base, offset.size, 0, 0, offset.factor))

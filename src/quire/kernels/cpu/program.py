"""Programs on the native library: a forward as data for csrc/program.cpp, and running it.

A CpuProgram owns its cells, patches, tables and working memory. It reads the model's weights and writes the caches
where they lay when it was recorded: both must stay where they are as long as it is used.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from quire.kernels.cpu.native import Library
from quire.kernels.cpu.program_draft import fill, join, run_eager, strided, tabulate, text_of, value
from quire.kernels.cpu.program_fuse import fuse, fuse_rounding
from quire.kernels.cpu.program_layout import CALL, LINE, Arena, Code, Native
from quire.kernels.cpu.program_lower import lower
from quire.kernels.cpu.program_rows import pick_early
from quire.kernels.cpu.program_trace import Eager, Tracer, View
from quire.kernels.programs import Opaque, Take

FIRST_TABLE = 2048  # positions that the tables hold at first; they double as sequences grow


class CpuRecorder:
    """Makes programs for one native library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._functions = {name: i for i, name in enumerate(library.quire_program_functions().decode().split())}

    def program(self, takes: tuple[Take, Take], opaque: Sequence[Opaque] = ()) -> CpuProgram:
        """See Recorder."""
        # What looks at numbers needs those of the functions before it; else a take costs only the time of its Python.
        unmade = () if opaque else self._functions
        one, two = (Tracer(self._library, take, lower, unmade).run(opaque) for take in takes)
        draft = join(one, two)
        tabulate(draft, one, two, FIRST_TABLE)
        fuse(draft)
        pick_early(draft)
        fuse_rounding(draft)
        return CpuProgram(self._library, self._functions, draft)


class CpuProgram:
    """See Program. Addresses by base: the working memory, the result, then inputs, tables, results of Python's calls."""

    def __init__(self, library: Library, functions: dict[str, int], draft: Any) -> None:
        self._call = library.quire_run_program
        self._draft = draft
        self._arena = Arena(draft)
        blocks = draft.blocks
        inputs = [index for index, block in enumerate(blocks) if block.kind == "input"]
        made = [index for index, block in enumerate(blocks) if block.kind == "made"]
        moving = [*inputs, *(table.block for table in draft.tables), *made]
        self._bases = {block: place for place, block in enumerate(moving, 2)}
        code = self._code = Code(draft, functions, self._bases, self._arena)
        self._calls, self._patches = code.calls.ctypes.data, code.patches.ctypes.data
        self._cells = code.cells.ctypes.data
        self._addresses = (ctypes.c_int64 * (2 + len(moving)))()
        self._sizes = (ctypes.c_int64 * (draft.sizes + 1))()
        self._owns_result = blocks[draft.result.block].kind == "arena"
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._tables: list[torch.Tensor] = []
        self._height = 0  # rows of the tables

    def run(self, inputs: Sequence[torch.Tensor], sizes: Sequence[int], highest: int, step: Any = None) -> torch.Tensor:
        """See Program."""
        if highest > self._height and self._draft.tables:
            self._fill_tables(highest)
        made: dict[int, torch.Tensor] = {}
        self._locate(inputs, sizes, made)
        for part in self._code.parts:
            if isinstance(part, Native):
                first = self._calls + part.first * CALL.itemsize
                if self._call(first, part.count, self._patches, self._cells, self._addresses, self._sizes) >= 0:
                    raise IndexError("a token or a position lies outside the model's table")
                continue
            run_eager(part, made, lambda view: self._tensor(view, inputs, sizes, made), sizes, step)
            for view in part.outputs:
                if view.block in self._bases:
                    self._addresses[self._bases[view.block]] = made[view.block].untyped_storage().data_ptr()
        result = self._draft.result
        return strided(made[result.block], result, sizes)

    def memory(self, rows: int) -> int:
        """See Program."""
        return self._arena.nbytes(rows)

    def spoil(self, rows: int) -> None:
        """See Program."""
        self._reserve(rows)
        self._memory.fill_(255)

    def describe(self) -> str:
        """See Program."""
        eager = sum(isinstance(part, Eager) for part in self._code.parts)
        return f"{len(self._code.calls)} native calls" + (f" and {eager} of Python" if eager else "")

    def text(self) -> str | None:
        """See Program."""
        return text_of(self._draft)

    def _locate(self, inputs: Sequence[torch.Tensor], sizes: Sequence[int], made: dict[int, torch.Tensor]) -> None:
        """Note where this step's tensors lie, and make the result."""
        if any(sizes[size] > sizes[0] for size in self._arena.bounded):
            raise ValueError(f"sizes {list(sizes)}: the first must be the largest number of rows")
        self._reserve(sizes[0])
        addresses = [self._memory.data_ptr(), 0]
        if self._owns_result:
            result = self._draft.result
            rows = [value(number, sizes) for number in result.shape]
            made[result.block] = torch.empty(rows, dtype=result.dtype)
            addresses[1] = made[result.block].data_ptr()
        addresses += [tensor.data_ptr() for tensor in inputs]
        addresses += [table.data_ptr() for table in self._tables]
        self._addresses[: len(addresses)] = addresses
        self._sizes[:] = [*sizes, self._height]

    def _reserve(self, rows: int) -> None:
        """Take memory for a step of so many rows; it only grows."""
        needed = self._arena.nbytes(rows)
        if self._memory.numel() < needed:
            memory = torch.empty(needed + LINE, dtype=torch.uint8)
            self._memory = memory[-memory.data_ptr() % LINE :][:needed]

    def _fill_tables(self, highest: int) -> None:
        height = max(FIRST_TABLE, 1 << (highest - 1).bit_length())
        made = fill(self._draft, self._draft.table_lines, height)
        self._tables = [made[table.source] for table in self._draft.tables]
        self._height = height

    def _tensor(
        self, view: View, inputs: Sequence[torch.Tensor], sizes: Sequence[int], made: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        """The tensor of a view in this step, for what Python calls."""
        block = self._draft.blocks[view.block]
        if view.block in made:
            return strided(made[view.block], view, sizes)
        if block.kind == "input":
            return strided(inputs[self._bases[view.block] - 2], view, sizes)
        if block.kind == "constant":
            return strided(torch.empty(0, dtype=view.dtype).set_(block.data), view, sizes)
        spot = self._arena.spot(view.block, view.offset)
        memory = self._memory[spot.offset + spot.factor * sizes[0] :].view(view.dtype)
        shape = tuple(value(number, sizes) for number in view.shape)
        return memory.as_strided(shape, tuple(value(number, sizes) for number in view.strides))

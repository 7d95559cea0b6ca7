"""Rows that nobody asks for are not computed: where a draft picks some rows of a tensor, what made the tensor row by row
is done for these rows alone, and its own inputs are picked instead.

A forward of the library computes its last layer for every position of a prompt and then takes a few rows of it. The bits
of a row do not depend on its company, so they stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quire.kernels.cpu.program_draft import Draft, Memory, Scaled
from quire.kernels.cpu.program_fuse import GATED, NORM, QUANTIZED, STRIDED
from quire.kernels.cpu.program_trace import At, Call, Image, Instruction, touched

ALL = Scaled(0, 1)  # the rows of the step
LINEAR = ("dtype", "x", "stride", "packed", "bias", "out", "rows", "n", "k")
LAYER_NORM = ("dtype", "x", "stride", "weight", "bias", "out", "rows", "dim", "eps")
ARGUMENTS = {
    "quire_rms_norm": NORM,
    "quire_layer_norm": LAYER_NORM,
    "quire_linear": LINEAR,
    "quire_quantized_linear": QUANTIZED,
    "quire_gated": GATED,
}
ITEM_BYTES = (4, 2)  # by code of dtype


@dataclass(frozen=True, slots=True)
class _RowWise:
    """A call that makes each row of its outputs from the same row of its inputs."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def pick_early(draft: Draft) -> None:
    """Change the draft's lines, from its last pick to its first."""
    for index in reversed(range(len(draft.lines))):
        line = draft.lines[index]
        if line.calls is not None and len(line.calls) == 1 and line.calls[0].function == "quire_gather_rows":
            _Picking(draft, index).run()


class _Picking:
    """One pick, from the call that gathers the rows."""

    def __init__(self, draft: Draft, index: int) -> None:
        self._draft, self._index = draft, index
        calls = draft.lines[index].calls
        assert calls is not None
        self._arguments = calls[0].arguments
        self._turned: set[int] = set()  # lines that will compute the picked rows only
        self._made: set[int] = set()  # blocks that will have these rows only
        self._whole: set[int] = set()  # blocks that these lines read, of which rows must be picked

    def run(self) -> None:
        """Look back from the pick; change the draft if anything can be done for fewer rows."""
        table, row, height, indices, out, count, _ = self._arguments
        blocks = self._draft.blocks
        if not (
            isinstance(table, At) and isinstance(indices, At) and isinstance(out, At) and isinstance(count, Scaled)
        ):
            return
        if height != ALL or blocks[indices.block].kind != "input" or not self._is_rows(table.block, row):
            return
        later = self._draft.lines[self._index + 1 :]
        if any(table.block in line.places or (out.block in line.places and line.calls is None) for line in later):
            return
        self._look_back(table.block)
        if self._turned:
            self._change(table.block, out.block, indices, count)

    def _is_rows(self, block: int, row: Any = None) -> bool:
        """Whether a block is working memory with a row for each row of the step."""
        found = self._draft.blocks[block]
        number = found.nbytes
        return (
            found.kind == "arena" and isinstance(number, Scaled) and number.size == 0 and row in (None, number.factor)
        )

    def _look_back(self, block: int) -> None:
        wanted = {block}
        for index in reversed(range(self._index)):
            line = self._draft.lines[index]
            here = line.places & wanted
            if not here:
                continue  # has nothing to do with it
            call = self._row_wise(line)
            if call is None or not all(self._only_turned(block, index + 1) for block in call.outputs):
                self._whole |= here
                wanted -= here
                continue
            self._turned.add(index)
            self._made |= call.outputs
            wanted -= call.outputs
            for found in call.inputs:
                if self._is_rows(found) and self._only_turned(found, index):
                    wanted.add(found)
                else:
                    self._whole.add(found)

    def _only_turned(self, block: int, index: int) -> bool:
        """Whether nobody from line `index` on reads the block but lines that are turned."""
        lines = self._draft.lines
        later = (place for place in range(index, len(lines)) if block in lines[place].places)
        return block != self._draft.result.block and all(
            place in self._turned or place == self._index for place in later
        )

    def _row_wise(self, line: Instruction) -> _RowWise | None:
        if line.calls is None or len(line.calls) != 1:
            return None
        call = line.calls[0]
        if call.function == "quire_strided":
            return self._element_wise(call)
        if call.function not in ARGUMENTS:
            return None
        given = dict(zip(ARGUMENTS[call.function], call.arguments, strict=True))
        rows, stride = given["rows"], given["stride"]
        inputs = [given.get("x"), given.get("residual", 0)]
        outputs = [given["out"], given.get("total", 0)]
        places = [place for place in (*inputs, *outputs) if place != 0]
        if not isinstance(rows, Scaled) or rows.size != 0 or not all(self._row_place(place) for place in places):
            return None
        item = rows.factor * ITEM_BYTES[given["dtype"]]
        if self._draft.blocks[given["x"].block].nbytes != Scaled(0, stride * item):
            return None
        residual = given.get("residual", 0)
        if call.function == "quire_rms_norm" and residual != 0:
            whole = self._draft.blocks[residual.block].nbytes == Scaled(0, given["dim"] * item)
            if not whole:
                return None
        return _RowWise(_blocks(inputs), _blocks(outputs))

    def _element_wise(self, call: Call) -> _RowWise | None:
        (image,) = call.arguments
        assert isinstance(image, Image)
        given: dict[str, Any] = dict(zip(STRIDED, (field.value for field in image.fields), strict=True))
        sizes = [given[f"size{i}"] for i in range(4)]
        if sizes[:3] != [1, 1, 1] or not isinstance(sizes[3], Scaled) or sizes[3].size != 0:
            return None
        rows = []
        for name in ("a", "b", "out"):
            place, step = given[name], given[f"{name}3"]
            if place == 0 or (step == 0 and self._draft.blocks[place.block].kind == "constant"):
                continue
            row = Scaled(0, sizes[3].factor * ITEM_BYTES[given[f"{name}_dtype"]])
            if step != 1 or not self._row_place(place) or self._draft.blocks[place.block].nbytes != row:
                return None
            rows.append(place)
        return _RowWise(_blocks(rows[:-1]), _blocks(rows[-1:]))

    def _row_place(self, place: Any) -> bool:
        return isinstance(place, At) and isinstance(place.offset, int) and self._is_rows(place.block)

    def _change(self, table: int, out: int, indices: Any, count: Scaled) -> None:
        """Turn the lines, pick the rows of what they read, and let the table stand for what was picked from it."""
        draft = self._draft
        picked: dict[int, int] = {}
        for block in sorted(self._whole):
            number = draft.blocks[block].nbytes
            assert isinstance(number, Scaled)
            picked[block] = len(draft.blocks)
            draft.blocks.append(Memory("arena", Scaled(count.size, number.factor), ""))
        for block in self._made:
            number = draft.blocks[block].nbytes
            assert isinstance(number, Scaled)
            draft.blocks[block].nbytes = Scaled(count.size, number.factor)
        lines: list[Instruction] = []
        done: set[int] = set()
        for index, line in enumerate(draft.lines):
            if index == self._index:
                continue
            if index in self._turned:
                for block in sorted((line.places & set(picked)) - done):
                    lines.append(_gather(block, picked[block], draft.blocks[block].nbytes, indices, count))
                    done.add(block)
                lines.append(_renamed(line, picked, count.size))
            else:
                lines.append(_renamed(line, {out: table}, None))
        draft.lines = lines
        if draft.result.block == out:
            draft.result = draft.result._replace(block=table)


def _gather(block: int, target: int, number: Any, indices: At, count: Scaled) -> Instruction:
    places = (At(block, 0), number.factor, ALL, indices, At(target, 0), count, number.factor)
    calls = (Call("quire_gather_rows", places),)  # type: ignore[arg-type]
    return Instruction(calls, places=touched(calls))


def _renamed(line: Instruction, names: dict[int, int], size: int | None) -> Instruction:
    """The line with other blocks in place of some, and with rows of another size in place of those of the step."""
    if line.calls is None or not (line.places & set(names) or size is not None):
        return line

    def change(item: Any) -> Any:
        if isinstance(item, Image):
            return Image(item.size, tuple(field._replace(value=change(field.value)) for field in item.fields))
        if isinstance(item, At):
            return At(names.get(item.block, item.block), item.offset)
        if isinstance(item, Scaled) and size is not None and item.size == 0:
            return Scaled(size, item.factor)
        return item

    calls = tuple(Call(call.function, tuple(map(change, call.arguments))) for call in line.calls)
    return Instruction(calls, line.eager, line.reads, touched(calls))


def _blocks(places: list[Any]) -> frozenset[int]:
    return frozenset(place.block for place in places if place != 0)

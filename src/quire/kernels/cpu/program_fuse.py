"""Two calls of a draft made one where a kernel does both and the bits stay: a sum and the norm of it, a rotation and the
write of its keys. They stand side by side in the models where they occur, so only neighbours are looked at.
"""

from __future__ import annotations

from typing import Any

from quire.kernels.cpu import native
from quire.kernels.cpu.program_draft import Draft, Scaled
from quire.kernels.cpu.program_trace import At, Call, Image, Instruction, touched

STRIDED = ("a", "b", "out", *(f"{name}{i}" for name in ("size", "a", "b", "out") for i in range(4)))
STRIDED += ("kind", "a_dtype", "b_dtype", "out_dtype")  # the fields of QuireStrided in order
ROTARY = tuple(field[0] for field in native.RotaryStruct._fields_)
NORM = ("dtype", "x", "stride", "residual", "weight", "out", "total", "rows", "dim", "eps", "style")
WRITE = ("cache", "key", "key_stride", "value", "value_stride", "slots", "tokens")
ADD = 1


def fuse(draft: Draft) -> None:
    """Change the draft's lines."""
    uses: dict[int, int] = {}
    for line in draft.lines:
        for block in line.places:
            uses[block] = uses.get(block, 0) + 1
    lines: list[Instruction] = []
    for line in draft.lines:
        call = _fused(lines[-1], line, uses) if lines else None
        if call is None:
            lines.append(line)
        else:
            lines[-1] = Instruction((call,), places=touched((call,)))
    draft.lines = lines


def _fused(first: Instruction, second: Instruction, uses: dict[int, int]) -> Call | None:
    if first.calls is None or second.calls is None or len(first.calls) != 1 or len(second.calls) != 1:
        return None
    (one,), (two,) = first.calls, second.calls
    if (one.function, two.function) == ("quire_strided", "quire_rms_norm"):
        return _norm_of_sum(one, two)
    if (one.function, two.function) == ("quire_rotary", "quire_write_cache"):
        return _rotated_write(one, two, uses)
    return None


def _norm_of_sum(one: Call, two: Call) -> Call | None:
    add, norm = _fields(one, STRIDED), dict(zip(NORM, two.arguments, strict=True))
    rows, dim = norm["rows"], norm["dim"]
    if add["kind"] != ADD or norm["residual"] != 0 or norm["x"] != add["out"] or norm["stride"] != dim:
        return None
    if {add["a_dtype"], add["b_dtype"], add["out_dtype"]} != {norm["dtype"]}:
        return None
    whole = [add[f"{name}{i}"] for name in ("size", "a", "b", "out") for i in range(4)]
    if not isinstance(rows, Scaled) or whole != [1, 1, 1, Scaled(rows.size, rows.factor * dim), *(0, 0, 0, 1) * 3]:
        return None  # not all of it in one piece
    norm.update(x=add["a"], residual=add["b"], total=add["out"])
    return Call(two.function, tuple(norm.values()))


def _rotated_write(one: Call, two: Call, uses: dict[int, int]) -> Call | None:
    rotary, write = _fields(one, ROTARY), dict(zip(WRITE, two.arguments, strict=True))
    key = rotary["key_out"]
    if rotary["cache"] != 0 or not isinstance(key, At) or write["key"] != key or write["value"] == key:
        return None
    if write["tokens"] != rotary["tokens"] or write["key_stride"] != rotary["kv_heads"] * rotary["dim"]:
        return None
    if uses[key.block] != 2:
        return None  # somebody else reads the turned keys
    rotary.update({name: write[name] for name in ("cache", "value", "value_stride", "slots")}, key_out=0)
    image: Any = one.arguments[0]
    fields = [field._replace(value=value) for field, value in zip(image.fields, rotary.values(), strict=True)]
    return Call(one.function, (Image(image.size, tuple(fields)),))


def _fields(call: Call, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the struct that a call takes, by their names."""
    (image,) = call.arguments
    assert isinstance(image, Image)
    return dict(zip(names, (field.value for field in image.fields), strict=True))

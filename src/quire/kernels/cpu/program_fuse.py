"""Two calls of a draft made one where a kernel does both and the bits stay: a sum and the norm of it, a rotation and the
write of its keys; a norm or a gated activation and the linear layer that rounds its rows. They stand side by side in the
models where they occur, so only neighbours are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from quire.kernels.cpu import native
from quire.kernels.cpu.program_draft import Draft, Scaled
from quire.kernels.cpu.program_trace import At, Call, Image, Instruction, touched

STRIDED = ("a", "b", "out", *(f"{name}{i}" for name in ("size", "a", "b", "out") for i in range(4)))
STRIDED += ("kind", "a_dtype", "b_dtype", "out_dtype")  # the fields of QuireStrided in order
ROTARY = tuple(field[0] for field in native.RotaryStruct._fields_)
NORM = ("dtype", "x", "stride", "residual", "weight", "out", "total", "rows", "dim", "eps", "style")
LAYER_NORM = ("dtype", "x", "stride", "weight", "bias", "out", "rows", "dim", "eps")
WRITE = ("cache", "key", "key_stride", "value", "value_stride", "slots", "tokens")
GATED = ("dtype", "x", "residual", "stride", "out", "rows", "dim", "activation")  # x: gate, residual: up
QUANTIZED = ("layout", "dtype", "x", "stride", "packed", "bias", "out", "rows")
ADD = 1

Uses = dict[int, int]  # how many lines touch a block
Fusion = Callable[[Call, Call, Uses], Call | None]


def fuse(draft: Draft) -> None:
    """Change the draft's lines."""
    _fuse(
        draft,
        {("quire_strided", "quire_rms_norm"): _norm_of_sum, ("quire_rotary", "quire_write_cache"): _rotated_write},
    )


def fuse_rounding(draft: Draft) -> None:
    """The same for quantized linear layers, whose rows nobody looks for any more."""
    makers = {"quire_rms_norm": NORM, "quire_layer_norm": LAYER_NORM, "quire_gated": GATED}
    _fuse(draft, {(name, "quire_quantized_linear"): partial(_linear_of, fields) for name, fields in makers.items()})


def _fuse(draft: Draft, fusions: dict[tuple[str, str], Fusion]) -> None:
    uses: Uses = {draft.result.block: 1}
    for line in draft.lines:
        for block in line.places:
            uses[block] = uses.get(block, 0) + 1
    lines: list[Instruction] = []
    for line in draft.lines:
        call = _fused(lines[-1], line, fusions, uses) if lines else None
        if call is None:
            lines.append(line)
        else:
            lines[-1] = Instruction((call,), places=touched((call,)))
    draft.lines = lines


def _fused(first: Instruction, second: Instruction, fusions: dict[tuple[str, str], Fusion], uses: Uses) -> Call | None:
    if first.calls is None or second.calls is None or len(first.calls) != 1 or len(second.calls) != 1:
        return None
    (one,), (two,) = first.calls, second.calls
    fusion = fusions.get((one.function, two.function))
    return None if fusion is None else fusion(one, two, uses)


def _norm_of_sum(one: Call, two: Call, uses: Uses) -> Call | None:
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


def _rotated_write(one: Call, two: Call, uses: Uses) -> Call | None:
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


def _linear_of(fields: tuple[str, ...], one: Call, two: Call, uses: Uses) -> Call | None:
    """The call that makes rows as `one` does and takes them for those of the layer, `two`."""
    maker: dict[str, Any] = dict(zip(fields, one.arguments, strict=True))
    linear = dict(zip(QUANTIZED, two.arguments, strict=True))
    if not _feeds(maker, linear):
        return None
    alone = uses[maker["out"].block] == 2  # nobody else reads the rows
    if fields is not GATED:
        maker["out"] = 0 if alone else maker["out"]
    elif alone:
        del maker["out"]
    else:
        return None
    return Call(f"{one.function}_quantized_linear", (*maker.values(), *_weights(linear)))


def _feeds(rows: dict[str, Any], linear: dict[str, Any]) -> bool:
    """Whether a linear layer takes all rows that a call makes, as they are."""
    whole = linear["x"] == rows["out"] and isinstance(rows["out"], At) and linear["stride"] == rows["dim"]
    return whole and linear["rows"] == rows["rows"] and linear["dtype"] == rows["dtype"]


def _weights(linear: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(linear[name] for name in ("layout", "packed", "bias", "out"))


def _fields(call: Call, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields of the struct that a call takes, by their names."""
    (image,) = call.arguments
    assert isinstance(image, Image)
    return dict(zip(names, (field.value for field in image.fields), strict=True))

"""Native calls for the operations of PyTorch that stand between the kernels: sums, copies, rows by their numbers.

Each gives the bits that PyTorch gives. An operation that is not here stays as it is, and the program calls PyTorch.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quire.kernels.cpu.program_trace import At, Call, Field, Image, Tracer

aten = torch.ops.aten
CODES = {torch.float32: 0, torch.bfloat16: 1}
KINDS = {aten.add: 1, aten.add_: 1, aten.sub: 2, aten.sub_: 2, aten.mul: 3, aten.mul_: 3, aten.div: 4, aten.div_: 4}
COPY = 0
DIMENSIONS = 4

Strides = Sequence[int]
Lowering = Callable[[Tracer, Any, Any, torch.Tensor], "list[Call] | None"]


def lower(tracer: Tracer, function: Any, args: Any, kwargs: Any, out: Any) -> list[Call] | None:
    """The calls that do what `function` did, or None."""
    packet = function.overloadpacket
    if not isinstance(out, torch.Tensor):
        return None
    if packet in KINDS:
        return _arithmetic(tracer, KINDS[packet], args, kwargs, out)
    found = LOWERINGS.get(packet)
    return None if found is None else found(tracer, args, kwargs, out)


def _arithmetic(tracer: Tracer, kind: int, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    """Element by element, repeated where sizes differ. Other data types than those of CODES stay with PyTorch."""
    if len(args) != 2 or set(kwargs) - {"alpha"} or kwargs.get("alpha", 1) != 1:
        return None
    operands = []
    for item in args:
        if isinstance(item, bool | complex) or not isinstance(item, torch.Tensor | int | float):
            return None
        # A Python number takes part as float32, whatever the tensors are.
        operands.append(item if isinstance(item, torch.Tensor) else torch.tensor(float(item), dtype=torch.float32))
    tensors = [item for item in args if isinstance(item, torch.Tensor)]
    if any(tensor.dtype not in CODES for tensor in tensors) or out.dtype not in CODES:
        return None
    if any(tensor.dim() == 0 and tensor.dtype != out.dtype for tensor in tensors):
        return None
    a, b = (operand.expand(out.shape) for operand in operands)
    return _strided(tracer, kind, a, b, out)


def _strided(
    tracer: Tracer, kind: int, a: torch.Tensor, b: torch.Tensor | None, out: torch.Tensor
) -> list[Call] | None:
    operands = [a, out] if b is None else [a, b, out]
    merged = merge(tuple(out.shape), [operand.stride() for operand in operands])
    if merged is None:
        return None
    sizes, strides = merged[0], merged[1:]
    values: list[int | At] = [tracer.at(a), 0 if b is None else tracer.at(b), tracer.at(out), *sizes]
    values += [*strides[0], *((0,) * DIMENSIONS if b is None else strides[1]), *strides[-1]]
    values += [kind, CODES[a.dtype], 0 if b is None else CODES[b.dtype], CODES[out.dtype]]
    return [Call("quire_strided", (_words(values),))]


def _move(tracer: Tracer, source: torch.Tensor, target: torch.Tensor) -> list[Call] | None:
    """Elements as they are, into a tensor of the same shape."""
    merged = merge(tuple(target.shape), [source.expand(target.shape).stride(), target.stride()])
    if merged is None:
        return None
    values = [tracer.at(source), tracer.at(target), *merged[0], *merged[1], *merged[2], source.itemsize]
    return [Call("quire_move", (_words(values),))]


def _copy(tracer: Tracer, source: torch.Tensor, target: torch.Tensor) -> list[Call] | None:
    if source.dtype == target.dtype:
        return _move(tracer, source, target)
    if source.dtype in CODES and target.dtype in CODES:
        return _strided(tracer, COPY, source.expand(target.shape), None, target)
    return None


def _copy_out(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    """clone, _to_copy: the first argument, copied into a new tensor."""
    return _copy(tracer, args[0], out)


def _copy_in(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    """copy_: the second argument, copied into the first."""
    return _copy(tracer, args[1], args[0])


def _join(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    """cat: each part moved to its place."""
    parts, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    calls: list[Call] = []
    start = 0
    for part in parts:
        if part.dtype != out.dtype or part.dim() != out.dim():
            return None
        moved = _move(tracer, part, out.narrow(dim, start, part.shape[dim]))
        if moved is None:
            return None
        calls += moved
        start += part.shape[dim]
    return calls


def _gather(tracer: Tracer, table: torch.Tensor, indices: torch.Tensor, out: torch.Tensor) -> list[Call] | None:
    """Rows of `table` [N, ...], each of whose rows lies in one piece."""
    row = table[0]
    if indices.dtype != torch.int64 or not (indices.is_contiguous() and out.is_contiguous() and row.is_contiguous()):
        return None
    stride, nbytes = table.stride(0) * table.itemsize, row.numel() * table.itemsize
    places = (tracer.at(table), stride, table.shape[0], tracer.at(indices), tracer.at(out), indices.numel(), nbytes)
    return [Call("quire_gather_rows", places)]


def _embedding(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    return _gather(tracer, args[0], args[1], out)


def _index_select(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    table, dim, indices = args
    return _gather(tracer, table, indices, out) if dim == 0 and table.dim() > 0 else None


def _index(tracer: Tracer, args: Any, kwargs: Any, out: torch.Tensor) -> list[Call] | None:
    """x[:, indices] where everything before the indexed dimension has size 1."""
    table, indices = args
    *before, last = indices
    if last is None or last.dim() != 1 or any(item is not None for item in before):
        return None
    if math.prod(table.shape[: len(before)]) != 1:
        return None
    return _gather(tracer, table[(0,) * len(before)], last, out)


LOWERINGS: dict[Any, Lowering] = {
    aten.clone: _copy_out,
    aten._to_copy: _copy_out,
    aten.copy_: _copy_in,
    aten.cat: _join,
    aten.embedding: _embedding,
    aten.index_select: _index_select,
    aten.index: _index,
}


def merge(shape: tuple[int, ...], strides: Sequence[Strides]) -> list[tuple[int, ...]] | None:
    """Sizes, and strides of each operand, in DIMENSIONS dimensions: those that lie in one piece become one."""
    dims: list[list[int]] = []  # [size, stride of each operand], from the first
    for place, size in enumerate(shape):
        if size == 1:
            continue
        steps = [item[place] for item in strides]
        if dims and all(outer == step * size for outer, step in zip(dims[-1][1:], steps, strict=True)):
            dims[-1] = [dims[-1][0] * size, *steps]
        else:
            dims.append([size, *steps])
    if len(dims) > DIMENSIONS:
        return None
    # In front, where a size of 1 costs nothing.
    filling = [1] + [0] * len(strides)
    dims = [filling] * (DIMENSIONS - len(dims)) + dims
    return [tuple(column) for column in zip(*dims, strict=True)]


def _words(values: Sequence[int | At]) -> Image:
    """A struct of 8-byte fields."""
    width = ctypes.sizeof(ctypes.c_int64)
    return Image(width * len(values), tuple(Field(i * width, width, value) for i, value in enumerate(values)))

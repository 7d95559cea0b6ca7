"""Writes down what a forward does: calls of the native library, and PyTorch's operations between them.

Views vanish, because whatever is written down names memory: a block, and where in it. A block is one allocation, seen
when it is made or first read. Everything seen stays alive as long as its trace, so no address means two things.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from bisect import bisect_right, insort
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from quire.kernels.cpu.native import Library
from quire.kernels.programs import NotRecordableError, Opaque, Take

EMPTY = {
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
PEEKS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__}


class At(NamedTuple):
    """A place in memory: bytes behind the beginning of a block."""

    block: int
    offset: int


class View(NamedTuple):
    """A tensor's place; the offset counts bytes, strides count elements."""

    block: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Field(NamedTuple):
    """One field of a C struct, `width` bytes at `offset`."""

    offset: int
    width: int
    value: int | At


class Image(NamedTuple):
    """A C struct that a call takes by its address."""

    size: int
    fields: tuple[Field, ...]


class Call(NamedTuple):
    """One call of the native library. Numbers are as they lie in a cell: floats by their bits."""

    function: str
    arguments: tuple[int | At | Image, ...]


class Step:
    """Stands in written arguments for the step itself."""


STEP = Step()


class Eager(NamedTuple):
    """A call of a Python function on tensors: an operation of PyTorch, or an opaque one. Views stand for tensors."""

    function: Callable[..., Any]
    arguments: Any  # (args, kwargs)
    outputs: tuple[View, ...]


@dataclass(slots=True)
class Instruction:
    """What is done at one point: `calls` if there are native ones for it, else `eager`."""

    calls: tuple[Call, ...] | None
    eager: Eager | None = None
    reads: frozenset[int] | None = None  # the blocks that an eager one reads
    places: frozenset[int] = frozenset()  # all blocks it touches


BlockKind = Literal["input", "constant", "arena", "made", "table"]


@dataclass(slots=True)
class Block:
    """One allocation. `arena`: memory without content when the forward takes it; `made`: the result of an eager one."""

    kind: BlockKind
    storage: torch.UntypedStorage
    nbytes: int
    name: str = ""


@dataclass(slots=True)
class Trace:
    """A take, written down."""

    sizes: tuple[int, ...]
    blocks: list[Block] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    result: View | None = None

    def tensor(self, block: int) -> torch.Tensor:
        """The bytes of a block, as they are now."""
        return torch.empty(0, dtype=torch.uint8).set_(self.blocks[block].storage)


def touched(calls: Sequence[Call]) -> frozenset[int]:
    """The blocks that native calls touch."""
    found = set()
    for call in calls:
        for argument in call.arguments:
            for value in (entry.value for entry in argument.fields) if isinstance(argument, Image) else (argument,):
                if isinstance(value, At):
                    found.add(value.block)
    return frozenset(found)


def views_in(tree: Any) -> list[View]:
    """All views in nested arguments."""
    return [leaf for leaf in tree_flatten(tree, is_leaf=_is_view)[0] if isinstance(leaf, View)]


def _is_view(item: Any) -> bool:
    return isinstance(item, View)


class Tracer:
    """Records one take. `lower` says which native calls do the same as an operation of PyTorch, if any do."""

    def __init__(
        self,
        library: Library,
        take: Take,
        lower: Callable[[Tracer, Any, Any, Any, Any], list[Call] | None],
        unmade: Container[str] = (),
    ) -> None:
        self.trace = Trace(take.sizes)
        self._unmade = unmade  # native functions that need not run: nobody looks at numbers while a take is recorded
        self._library = library
        self._take = take
        self._lower = lower
        self._known: dict[int, int] = {}  # address of a storage -> its block
        self._addresses: list[int] = []  # sorted
        self.listening = True
        self._keep: list[Any] = []  # what Python would free, and the allocator give to somebody else
        for name, tensor in take.inputs.items():
            self._block(tensor, "input", name)

    def run(self, opaque: Sequence[Opaque]) -> Trace:
        """Run the take once and write it down. Raises NotRecordableError."""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(self._library_heard())
            for item in opaque:
                stack.enter_context(self._replaced(item))
            stack.enter_context(_Refusing(self))
            stack.enter_context(_Listening(self))
            result = self._take.run()
        self.trace.result = self.view(result)
        return self.trace

    # ------------------------------------------------------------ what is heard

    @contextmanager
    def _library_heard(self) -> Iterator[None]:
        """Tell every call of the native library, before it is made, if it is made at all."""
        functions = {name: value for name, value in vars(self._library).items() if hasattr(value, "argtypes")}
        for name, function in functions.items():
            setattr(self._library, name, self._heard(name, function))
        try:
            yield
        finally:
            for name, function in functions.items():
                setattr(self._library, name, function)

    def _heard(self, name: str, function: Any) -> Callable[..., Any]:
        thread = threading.get_ident()

        def call(*arguments: Any) -> Any:
            # Other threads may be at work with the library, such as the one that keeps packed weights on disk.
            if self.listening and threading.get_ident() == thread:
                types = function.argtypes
                self._append((Call(name, tuple(map(self._argument, arguments, types))),))
                if name in self._unmade:
                    return None
            return function(*arguments)

        return call

    def _append(self, calls: tuple[Call, ...], eager: Eager | None = None, reads: frozenset[int] | None = None) -> None:
        self.trace.instructions.append(Instruction(calls, eager, reads, touched(calls)))

    @contextmanager
    def _replaced(self, item: Opaque) -> Iterator[None]:
        present, original = item.name in item.holder, item.holder.get(item.name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.listening = False
            try:
                args_, kwargs_ = _swap((args, kwargs), self._take.step, self._take.real_step)
                out = item.function(self._take.real_step, *args_, **kwargs_)
            finally:
                self.listening = True
            self._made(item.function, _swap(((STEP, *args), kwargs), self._take.step, STEP), out)
            return out

        item.holder[item.name] = call
        try:
            yield
        finally:
            if present:
                item.holder[item.name] = original
            else:
                del item.holder[item.name]

    def _made(self, function: Callable[..., Any], arguments: Any, out: Any) -> None:
        """Write down an eager call whose results are its own."""
        written = tree_map_only(torch.Tensor, self.view, arguments)
        reads = frozenset(view.block for view in views_in(written))
        outputs = tuple(self._new(tensor, "made") for tensor in _tensors(out))
        places = reads | {view.block for view in outputs}
        self.trace.instructions.append(Instruction(None, Eager(function, written, outputs), reads, places))

    def operation(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Take note of an operation of PyTorch that has just run."""
        given, results = _tensors((args, kwargs)), _tensors(out)
        if not self.listening or not results:
            return
        self._keep.append((given, results))
        if function.overloadpacket in EMPTY:
            self._new(results[0], "arena")
            return
        owned = {tensor.untyped_storage().data_ptr() for tensor in given}
        fresh = [tensor for tensor in results if tensor.untyped_storage().data_ptr() not in owned]
        written = _written(function, args, kwargs)
        if not fresh and not written:
            return  # a view
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise NotRecordableError(f"{function} draws random numbers")
        tree = tree_map_only(torch.Tensor, self.view, (args, kwargs))
        reads = frozenset(view.block for view in views_in(tree))
        for tensor in written:
            if self.trace.blocks[self.view(tensor).block].kind in ("constant", "input"):
                raise NotRecordableError(f"{function} writes to a tensor that outlives the step")
        if reads and not written and all(self.trace.blocks[block].kind == "constant" for block in reads):
            for tensor in fresh:
                self._new(tensor, "constant")  # computed now, and never again
            return
        made = {self._new(tensor, "made").block for tensor in fresh}
        outputs = tuple(self.view(tensor) for tensor in results)
        eager = Eager(function, tree, outputs)
        calls = self._lower(self, function, args, kwargs, out)
        if calls is None:
            places = reads | {view.block for view in outputs}
            self.trace.instructions.append(Instruction(None, eager, reads, places))
            return
        for block in made:
            self.trace.blocks[block].kind = "arena"
        self._append(tuple(calls), eager, reads)

    # ------------------------------------------------------------ where things lie

    def view(self, tensor: torch.Tensor) -> View:
        """Where a tensor lies; memory that was not seen before is a constant of the model."""
        if tensor.layout is not torch.strided or tensor.device.type != "cpu":
            raise NotRecordableError(f"a {tensor.layout} tensor on {tensor.device}")
        return self._new(tensor, "constant")

    def at(self, tensor: torch.Tensor) -> At:
        """Where a tensor begins."""
        view = self.view(tensor)
        return At(view.block, view.offset)

    def _new(self, tensor: torch.Tensor, kind: BlockKind) -> View:
        block = self._block(tensor, kind)
        offset = tensor.storage_offset() * tensor.itemsize
        return View(block, offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def _block(self, tensor: torch.Tensor, kind: BlockKind, name: str = "") -> int:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        found = self._known.get(address)
        if found is not None:
            return found
        if address:
            self._known[address] = len(self.trace.blocks)
            insort(self._addresses, address)
        self.trace.blocks.append(Block(kind, storage, storage.nbytes(), name))
        return len(self.trace.blocks) - 1

    def _argument(self, value: Any, kind: Any) -> int | At | Image:
        if kind is ctypes.c_void_p:
            if value is None:
                return 0
            return self._place(value) if isinstance(value, int) else self._image(value._obj)
        return _bits(value, kind)

    def _place(self, address: int) -> int | At:
        """The block that an address lies in; the address itself where no block is known: packed weights, pages."""
        index = bisect_right(self._addresses, address) - 1
        if index >= 0:
            start = self._addresses[index]
            block = self._known[start]
            if address < start + max(1, self.trace.blocks[block].nbytes):
                return At(block, address - start)
        return address

    def _image(self, struct_: ctypes.Structure) -> Image:
        fields = []
        for name, kind in struct_._fields_:  # type: ignore[misc]
            value = getattr(struct_, name)
            place = getattr(type(struct_), name)
            bits = self._place(value or 0) if kind is ctypes.c_void_p else _bits(value, kind)
            fields.append(Field(place.offset, place.size, bits))
        return Image(ctypes.sizeof(struct_), tuple(fields))


def _bits(value: Any, kind: Any) -> int:
    """A number as the integer that has its bits."""
    if kind is ctypes.c_float:
        return int(struct.unpack("<i", struct.pack("<f", value))[0])
    if kind is ctypes.c_double:
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    return int(value)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _written(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The arguments that an operation writes to, as its schema says."""
    found = []
    for index, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += _tensors(value)
    return found


def _swap(tree: Any, old: Any, new: Any) -> Any:
    """The same with one object in place of another; the step is a leaf of no known kind."""
    if old is None:
        return tree
    return tree_map_only(type(old), lambda leaf: new if leaf is old else leaf, tree)


def _depends_on_numbers(function: Any, args: Any) -> bool:
    """Whether the shape of what an operation gives, or Python's way after it, follows from the numbers in a tensor."""
    if function.overloadpacket is torch.ops.aten.index:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(args[1]))
    return torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags


class _Listening(TorchDispatchMode):
    """Hears PyTorch's operations."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it away from this class, which takes two seconds."""
        return False

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tracer.listening and _depends_on_numbers(func, args):
            raise NotRecordableError(f"its Python depends on the numbers in a tensor ({func})")
        out = func(*args, **kwargs)
        self._tracer.operation(func, args, kwargs, out)
        return out


class _Refusing(TorchFunctionMode):
    """Hears the few methods that read a tensor without an operation."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._tracer.listening and func in PEEKS:
            raise NotRecordableError(f"its Python depends on the numbers in a tensor ({func.__name__})")
        return func(*args, **(kwargs or {}))

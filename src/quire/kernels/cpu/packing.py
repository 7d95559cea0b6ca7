"""NativePacking: weights into the panels of one native library and back, and where the panels live.

float32 and bfloat16 are native, any other dtype is left to the reference. It knows nothing of models or files.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence
from ctypes import Array, addressof
from dataclasses import dataclass

import torch

from quire.kernels import reference
from quire.kernels.cpu import native
from quire.kernels.memory import AHEAD, FILE_PAGES, HUGE, fresh_memory
from quire.kernels.weights import KeptLinear, PackedLinear, Parts, QuantizedLinear, QuantizedWeights

CODES = {torch.float32: 0, torch.bfloat16: 1}
CHUNK = 128 << 20
PANEL = 16  # outputs
SLICE = 32 << 20  # bytes of a weight


@dataclass(slots=True)
class NativeLinear(PackedLinear):
    """A PackedLinear in the panels that csrc/linear.cpp draws, with the addresses that every call needs."""

    code: int
    weights: int
    added: int | None


@dataclass(slots=True)
class NativeQuantized(QuantizedLinear):
    """A QuantizedLinear in the panels that csrc/quantized.cpp draws, with the addresses that every call needs."""

    code: int
    struct: native.QuantizedStruct
    layout: int  # address of struct
    weights: int
    added: int | None


class Arena:
    """Memory for weights in a few large pieces, each in huge pages where the system allows it.

    What was not taken of a piece was never touched. A piece goes back to the system with the last tensor in it.
    """

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], aligned to 64 bytes, with whatever content."""
        if nbytes < HUGE // 2:
            return torch.empty(nbytes, dtype=torch.uint8)
        if self._used + nbytes > self._piece.numel():
            # What was touched while torch was imported comes first; a weight that it cannot hold gets a piece of its own.
            ahead = AHEAD.take()
            memory = ahead if ahead is not None and len(ahead) >= nbytes + HUGE else fresh_memory(max(nbytes, CHUNK))
            self._piece, self._used = _aligned(memory), 0
        taken = self._piece[self._used : self._used + nbytes]
        self._used += -(-nbytes // 64) * 64
        return taken


def _aligned(memory: mmap.mmap) -> torch.Tensor:
    """The memory from where a huge page may begin."""
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % HUGE :]


class NativePacking:
    """The ops of kernels/reference.py that make and keep packed weights."""

    def __init__(self, library: native.Library) -> None:
        self._lib = library
        self._arena = Arena()

    # ------------------------------------------------------------ plain weights

    def pack_linear(self, weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> PackedLinear:
        parts = [weight] if isinstance(weight, torch.Tensor) else list(weight)
        dtype, k = dtype or parts[0].dtype, parts[0].shape[1]
        code = CODES.get(dtype)
        if code is None:
            return reference.pack_linear(_parts(parts, dtype), bias)
        n = sum(part.shape[0] for part in parts)
        data = self._arena.take(self._lib.quire_packed_size(code, n, k) * dtype.itemsize)
        # Slice by slice: beside the panels there is never more of a weight in memory, nor in another data type.
        step = max(1, SLICE // (PANEL * max(1, k) * parts[0].element_size())) * PANEL
        for start in range(0, n, step):
            rows = _rows(parts, start, start + step)
            pieces = _parts(rows, dtype)
            structs = _structs(pieces)
            before = self._lib.quire_packed_size(code, start, k) * dtype.itemsize
            self._lib.quire_pack_parts(code, addressof(structs), len(pieces), k, data.data_ptr() + before)
            for part in rows:
                FILE_PAGES.let_go(part.data_ptr(), part.numel() * part.element_size())
        return self._plain(n, k, dtype, data, bias)

    def unpack_linear(self, packed: PackedLinear) -> torch.Tensor:
        if not isinstance(packed, NativeLinear):
            return reference.unpack_linear(packed)
        n, k = packed.out_features, packed.in_features
        weight = torch.empty(n, k, dtype=packed.dtype)
        self._lib.quire_unpack_linear(packed.code, packed.weights, n, k, weight.data_ptr())
        return weight

    def _plain(self, n: int, k: int, dtype: torch.dtype, data: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear:
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        return NativeLinear(n, k, dtype, data.view(dtype), bias, CODES[dtype], data.data_ptr(), _pointer(bias))

    # ------------------------------------------------------------ quantized weights

    def pack_quantized(
        self, weights: QuantizedWeights, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> QuantizedLinear:
        if dtype not in CODES:
            return reference.pack_quantized(weights, bias, dtype)
        n, k = weights.values.shape
        struct = native.QuantizedStruct(weights.bits, weights.zeros is not None, weights.group, n, k)
        data = self._arena.take(self._lib.quire_quantized_size(addressof(struct)))
        values, scales = weights.values.contiguous(), weights.scales.contiguous()
        zeros = None if weights.zeros is None else weights.zeros.contiguous()
        self._lib.quire_pack_quantized(
            addressof(struct), values.data_ptr(), scales.data_ptr(), _pointer(zeros), data.data_ptr()
        )
        return self._quantized(struct, dtype, data, bias)

    def round_linear(
        self,
        weight: Parts,
        bias: torch.Tensor | None,
        dtype: torch.dtype | None,
        bits: int,
        group: int,
        zero_points: bool,
    ) -> QuantizedLinear:
        parts = _parts(weight, dtype)
        dtype, k = parts[0].dtype, parts[0].shape[1]
        if dtype not in CODES:
            return reference.round_linear(parts, bias, dtype, bits, group, zero_points)
        n = sum(part.shape[0] for part in parts)
        struct = native.QuantizedStruct(bits, zero_points, group, n, k)
        data = self._arena.take(self._lib.quire_quantized_size(addressof(struct)))
        structs = _structs(parts)
        self._lib.quire_round_parts(addressof(struct), CODES[dtype], addressof(structs), len(parts), data.data_ptr())
        return self._quantized(struct, dtype, data, bias)

    def unpack_quantized(self, packed: QuantizedLinear) -> QuantizedWeights:
        if not isinstance(packed, NativeQuantized):
            return reference.unpack_quantized(packed)
        n, k, struct = packed.out_features, packed.in_features, packed.struct
        groups = -(-k // struct.group) if struct.bits == 4 else 1
        values, scales = torch.empty(n, k, dtype=torch.int8), torch.empty(n, groups)
        zeros = torch.empty(n, groups, dtype=torch.uint8) if struct.zero_points else None
        self._lib.quire_unpack_quantized(
            packed.layout, packed.weights, values.data_ptr(), scales.data_ptr(), _pointer(zeros)
        )
        return QuantizedWeights(struct.bits, struct.group, values, scales, zeros)

    def _quantized(
        self, struct: native.QuantizedStruct, dtype: torch.dtype, data: torch.Tensor, bias: torch.Tensor | None
    ) -> NativeQuantized:
        bias = None if bias is None else bias.detach().to(dtype).contiguous()
        layout, address = addressof(struct), data.data_ptr()
        return NativeQuantized(
            struct.n, struct.k, dtype, data, bias, CODES[dtype], struct, layout, address, _pointer(bias)
        )

    # ------------------------------------------------------------ in files

    def packed_layout(self) -> str | None:
        # The library's own bytes: whoever changes a layout, or how a weight is rounded, changes them.
        digest = hashlib.sha256(self._lib.path.read_bytes()).hexdigest()
        return f"{self._lib.level}-{digest[:16]}"

    def take_apart(self, packed: PackedLinear | QuantizedLinear) -> KeptLinear | None:
        n, k, dtype, bias = packed.out_features, packed.in_features, packed.dtype, packed.bias
        if isinstance(packed, NativeLinear):
            return KeptLinear(n, k, dtype, 0, 0, False, packed.data.view(torch.uint8), bias)
        if isinstance(packed, NativeQuantized):
            struct = packed.struct
            return KeptLinear(n, k, dtype, struct.bits, struct.group, bool(struct.zero_points), packed.data, bias)
        return None

    def put_together(self, kept: KeptLinear) -> PackedLinear | QuantizedLinear:
        n, k, dtype = kept.out_features, kept.in_features, kept.dtype
        struct = native.QuantizedStruct(kept.bits, kept.zero_points, kept.group, n, k)
        if kept.bits:
            need = self._lib.quire_quantized_size(addressof(struct))
        else:
            need = self._lib.quire_packed_size(CODES[dtype], n, k) * dtype.itemsize
        if kept.data.numel() != need:
            raise ValueError(f"a linear of {n} x {k} takes {need} bytes when packed, not {kept.data.numel()}")
        if kept.bits:
            return self._quantized(struct, dtype, kept.data, kept.bias)
        return self._plain(n, k, dtype, kept.data, kept.bias)

    def checksum(self, data: torch.Tensor) -> int:
        return self._lib.quire_checksum(data.data_ptr(), data.numel())


def _parts(weight: Parts, dtype: torch.dtype | None) -> list[torch.Tensor]:
    """The parts in one dtype, with the elements of each row side by side; rows may stand apart."""
    parts = [weight] if isinstance(weight, torch.Tensor) else list(weight)
    parts = [part.detach().to(dtype or parts[0].dtype) for part in parts]
    return [part if part.stride(1) == 1 or part.shape[1] == 1 else part.contiguous() for part in parts]


def _rows(parts: Sequence[torch.Tensor], start: int, end: int) -> list[torch.Tensor]:
    """Rows start..end of the parts below one another."""
    found, first = [], 0
    for part in parts:
        low, high = max(start - first, 0), min(end - first, part.shape[0])
        if low < high:
            found.append(part[low:high])
        first += part.shape[0]
    return found


def _structs(parts: Sequence[torch.Tensor]) -> Array[native.PartStruct]:
    return (native.PartStruct * len(parts))(
        *(native.PartStruct(part.data_ptr(), part.stride(0), part.shape[0]) for part in parts)
    )


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()

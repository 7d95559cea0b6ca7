"""CpuOps: the ops of kernels/reference.py on one native library. float32 and bfloat16 are native; any other dtype, and
any tensor that the native code does not take, goes to the reference. Pointers are passed as plain integers.
"""

from __future__ import annotations

import logging
from ctypes import addressof, byref
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.kernels import reference
from quire.kernels.cpu import native
from quire.kernels.cpu.choosing import NativeChoosing
from quire.kernels.cpu.experts import NativeMixtures
from quire.kernels.cpu.packing import CODES, NativeLinear, NativePacking, NativeQuantized
from quire.kernels.cpu.program import CpuRecorder
from quire.kernels.reference import (
    KVCache,
    NormStyle,
    PackedLinear,
    QuantizedLinear,
    RotaryStyle,
)

logger = logging.getLogger(__name__)

CACHE_CODES = {**CODES, torch.int8: 2}
NORM_STYLES = {"down_then_scale": 0, "scale_then_down": 1, "plus_one": 2}
NO_WEIGHT = 3
ROTARY_STYLES = {"half": 0, "interleaved": 1}


@dataclass(slots=True, kw_only=True)
class NativeCache(KVCache):
    """A KVCache laid out as csrc/pages.h draws it, and the C struct that describes it."""

    struct: native.CacheStruct


def load() -> object:
    """The ops of the best level of this machine; the reference, with a warning, where no library was built."""
    level = native.choose_level()
    if level is None:
        logger.warning(
            "The native CPU kernels are not built, so plain PyTorch does their work, slowly. Looked for libquire_*.so "
            "in %s; `make setup` builds them.",
            native.FOLDER,
        )
        return reference
    return CpuOps(level)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as rows [R, D] whose elements lie side by side; the rows themselves may stand apart."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _tokens(x: torch.Tensor) -> torch.Tensor:
    """x [T, H, D] with each token's heads side by side; the tokens themselves may stand apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _rows_dtype(cache: NativeCache, x: torch.Tensor) -> torch.dtype:
    """The dtype in which x, a key or a query, meets the cache; a cache of int8 takes note of it."""
    if cache.dtype != torch.int8:
        return cache.dtype
    dtype = x.dtype if x.dtype in CODES else torch.float32
    cache.struct.rows = CODES[dtype]
    return dtype


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _native(first: torch.Tensor, *others: torch.Tensor | None) -> int | None:
    """The code of the dtype that all these share, or None where the native code does not take them."""
    dtype = first.dtype
    for tensor in others:
        if tensor is not None and tensor.dtype != dtype:
            return None
    return CODES.get(dtype)


class CpuOps:
    """See kernels/reference.py for what each op means."""

    def __init__(self, level: str, threads: int | None = None, folder: Path = native.FOLDER) -> None:
        self.level = level
        self._lib = native.Library(level, folder)
        self._lib.set_threads(threads or native.default_threads())
        packing = NativePacking(self._lib)
        self.pack_linear, self.unpack_linear = packing.pack_linear, packing.unpack_linear
        self.pack_quantized, self.unpack_quantized = packing.pack_quantized, packing.unpack_quantized
        self.round_linear = packing.round_linear
        choosing = NativeChoosing(self._lib)
        self.argmax, self.uniform, self.sample = choosing.argmax, choosing.uniform, choosing.sample
        self.rank, self.scores = choosing.rank, choosing.scores
        self.forbid, self.penalize = choosing.forbid, choosing.penalize
        mixtures = NativeMixtures(self._lib)
        self.stack_experts, self.experts = mixtures.stack_experts, mixtures.experts
        self.packed_layout, self.checksum = packing.packed_layout, packing.checksum
        self.take_apart, self.put_together = packing.take_apart, packing.put_together

    def set_threads(self, n: int) -> None:
        reference.set_threads(n)
        self._lib.set_threads(n)

    def new_recorder(self) -> CpuRecorder:
        """Its programs hear the calls of `_lib`: every kernel of a forward must be called through it."""
        return CpuRecorder(self._lib)

    # ------------------------------------------------------------ linear

    def linear(self, x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        if not isinstance(packed, NativeLinear):
            return reference.linear(x, packed)
        if x.dtype != packed.dtype:
            return self.linear(x.to(packed.dtype), packed).to(x.dtype)
        n, k, rows = packed.out_features, packed.in_features, _rows(x)
        if rows.shape[1] != k:
            raise ValueError(f"linear takes {k} features, the input has {rows.shape[1]} (shape {tuple(x.shape)}).")
        out = torch.empty(*x.shape[:-1], n, dtype=packed.dtype)
        self._lib.quire_linear(
            packed.code,
            rows.data_ptr(),
            rows.stride(0),
            packed.weights,
            packed.added,
            out.data_ptr(),
            rows.shape[0],
            n,
            k,
        )
        return out

    def quantized_linear(self, x: torch.Tensor, packed: QuantizedLinear) -> torch.Tensor:
        if not isinstance(packed, NativeQuantized):
            return reference.quantized_linear(x, packed)
        if x.dtype != packed.dtype:
            return self.quantized_linear(x.to(packed.dtype), packed).to(x.dtype)
        n, k, rows = packed.out_features, packed.in_features, _rows(x)
        if rows.shape[1] != k:
            raise ValueError(f"linear takes {k} features, the input has {rows.shape[1]} (shape {tuple(x.shape)}).")
        out = torch.empty(*x.shape[:-1], n, dtype=packed.dtype)
        self._lib.quire_quantized_linear(
            packed.layout,
            packed.code,
            rows.data_ptr(),
            rows.stride(0),
            packed.weights,
            packed.added,
            out.data_ptr(),
            rows.shape[0],
        )
        return out

    # ------------------------------------------------------------ paged keys and values

    def cache_bytes(
        self, page_size: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, shared: bool = False
    ) -> int:
        if dtype not in CACHE_CODES:
            return reference.cache_bytes(page_size, kv_heads, key_dim, value_dim, dtype, shared)
        stored = 0 if shared else value_dim
        return self._lib.quire_page_size(CACHE_CODES[dtype], page_size, kv_heads, key_dim, stored) * dtype.itemsize

    def new_cache(
        self,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        shared: bool = False,
    ) -> KVCache:
        if dtype not in CACHE_CODES:
            return reference.new_cache(num_pages, page_size, kv_heads, key_dim, value_dim, dtype, device, shared)
        nbytes = self.cache_bytes(page_size, kv_heads, key_dim, value_dim, dtype, shared)
        # Left as it comes, so that pages take memory only once they are written.
        data = torch.empty(num_pages, nbytes // dtype.itemsize, dtype=dtype)
        code = CACHE_CODES[dtype]
        struct = native.CacheStruct(data.data_ptr(), page_size, kv_heads, key_dim, value_dim, code, 0, shared)
        return NativeCache(data, num_pages, page_size, kv_heads, key_dim, value_dim, dtype, shared, struct=struct)

    def write_cache(self, cache: KVCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        if not isinstance(cache, NativeCache):
            reference.write_cache(cache, key, value, slots)
            return
        dtype = _rows_dtype(cache, key)
        key = _tokens(key.to(dtype))
        value = key if cache.shared else _tokens(value.to(dtype))
        slots = slots.contiguous()
        self._lib.quire_write_cache(
            addressof(cache.struct),
            key.data_ptr(),
            key.stride(0),
            value.data_ptr(),
            value.stride(0),
            slots.data_ptr(),
            key.shape[0],
        )

    def copy_pages(self, cache: KVCache, pairs: list[tuple[int, int]]) -> None:
        if not isinstance(cache, NativeCache):
            reference.copy_pages(cache, pairs)
            return
        flat = torch.tensor(pairs, dtype=torch.int64)
        self._lib.quire_copy_pages(cache.data.data_ptr(), cache.data[0].nbytes, flat.data_ptr(), len(pairs))

    def attention(
        self,
        query: torch.Tensor,
        cache: KVCache,
        tables: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        scale: float,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not isinstance(cache, NativeCache):
            return reference.attention(query, cache, tables, starts, lengths, scale, window, chunk, softcap, sinks)
        dtype = _rows_dtype(cache, query)
        rows = _tokens(query if query.dtype == dtype else query.to(dtype))
        out = torch.empty(query.shape[0], query.shape[1], cache.value_dim, dtype=dtype)
        tables = tables.contiguous()
        starts, lengths = starts.contiguous(), lengths.contiguous()
        if sinks is not None:
            sinks = sinks.float().contiguous()
        call = native.AttentionStruct(
            rows.data_ptr(),
            out.data_ptr(),
            addressof(cache.struct),
            tables.data_ptr(),
            starts.data_ptr(),
            lengths.data_ptr(),
            _pointer(sinks),
            rows.stride(0),
            tables.shape[1],
            lengths.shape[0],
            query.shape[1],
            window or 0,
            chunk or 0,
            scale,
            softcap or 0.0,
        )
        self._lib.quire_attention(byref(call))
        return out if query.dtype == dtype else out.to(query.dtype)

    def heads_linear(
        self, x: torch.Tensor, packed: PackedLinear, heads: int, width: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        if not isinstance(packed, NativeLinear):
            return reference.heads_linear(x, packed, heads, width, out)
        if out is None:
            out = torch.empty(*x.shape[:2], width, dtype=x.dtype)
        if x.dtype != packed.dtype:
            return out.copy_(self.heads_linear(x.to(packed.dtype), packed, heads, width))
        if x.stride(2) != 1:
            x = x.contiguous()
        call = native.HeadsStruct(
            x.data_ptr(),
            packed.weights,
            out.data_ptr(),
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(1),
            x.shape[0],
            heads,
            width,
            packed.out_features // heads,
            packed.in_features,
            packed.code,
        )
        self._lib.quire_heads_linear(byref(call))
        return out

    # ------------------------------------------------------------ norms, activations, rotary

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: NormStyle) -> torch.Tensor:
        code = _native(x, weight)
        if code is None:
            return reference.rms_norm(x, weight, eps, style)
        rows, out = _rows(x), torch.empty(x.shape, dtype=x.dtype)
        self._lib.quire_rms_norm(
            code,
            rows.data_ptr(),
            rows.stride(0),
            None,
            _pointer(weight),
            out.data_ptr(),
            None,
            rows.shape[0],
            rows.shape[1],
            eps,
            NORM_STYLES[style] if weight is not None else NO_WEIGHT,
        )
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, style: NormStyle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        code = _native(x, residual, weight)
        if code is None:
            return reference.add_rms_norm(x, residual, weight, eps, style)
        rows, residual = _rows(x), residual.contiguous()
        out, total = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape, dtype=x.dtype)
        self._lib.quire_rms_norm(
            code,
            rows.data_ptr(),
            rows.stride(0),
            residual.data_ptr(),
            _pointer(weight),
            out.data_ptr(),
            total.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            eps,
            NORM_STYLES[style] if weight is not None else NO_WEIGHT,
        )
        return out, total

    def layer_norm(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        code = _native(x, weight, bias)
        if code is None:
            return reference.layer_norm(x, weight, bias, eps)
        rows, out = _rows(x), torch.empty(x.shape, dtype=x.dtype)
        self._lib.quire_layer_norm(
            code,
            rows.data_ptr(),
            rows.stride(0),
            _pointer(weight),
            _pointer(bias),
            out.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            eps,
        )
        return out

    def gated(self, gate_up: torch.Tensor, activation: str, gate_first: bool = True) -> torch.Tensor:
        code = _native(gate_up)
        if code is None:
            return reference.gated(gate_up, activation, gate_first)
        rows = _rows(gate_up)
        size = rows.shape[1] // 2
        out = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
        first = rows.data_ptr()
        second = first + size * gate_up.dtype.itemsize
        self._lib.quire_gated(
            code,
            first if gate_first else second,
            second if gate_first else first,
            rows.stride(0),
            out.data_ptr(),
            rows.shape[0],
            size,
            native.ACTIVATIONS[activation],
        )
        return out

    def rotary(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: RotaryStyle
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if _native(query, key) is None or _native(cos, sin) is None:
            return reference.rotary(query, key, cos, sin, style)
        query_out, key_out = torch.empty(query.shape, dtype=query.dtype), torch.empty(key.shape, dtype=key.dtype)
        self._rotate(query, key, None, cos, sin, style, query_out, key_out, None, None)
        return query_out, key_out

    def rotary_write(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        style: RotaryStyle,
        cache: KVCache,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        if not isinstance(cache, NativeCache) or _rows_dtype(cache, query) != query.dtype:
            query, key = self.rotary(query, key, cos, sin, style)
            self.write_cache(cache, key, value, slots)
            return query
        if _native(query, key, value) is None or _native(cos, sin) is None:
            return reference.rotary_write(query, key, value, cos, sin, style, cache, slots)
        query_out = torch.empty(query.shape, dtype=query.dtype)
        self._rotate(query, key, value, cos, sin, style, query_out, None, cache, slots)
        return query_out

    def _rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        style: RotaryStyle,
        query_out: torch.Tensor,
        key_out: torch.Tensor | None,
        cache: NativeCache | None,
        slots: torch.Tensor | None,
    ) -> None:
        query, key, cos, sin = _tokens(query), _tokens(key), cos.contiguous(), sin.contiguous()
        value = None if value is None else _tokens(value)
        slots = None if slots is None else slots.contiguous()
        call = native.RotaryStruct(
            query.data_ptr(),
            key.data_ptr(),
            _pointer(value),
            cos.data_ptr(),
            sin.data_ptr(),
            query_out.data_ptr(),
            _pointer(key_out),
            None if cache is None else addressof(cache.struct),
            _pointer(slots),
            query.stride(0),
            key.stride(0),
            0 if value is None else value.stride(0),
            query.shape[0],
            query.shape[1],
            key.shape[1],
            query.shape[2],
            cos.shape[-1],
            CODES[query.dtype],
            CODES[cos.dtype],
            ROTARY_STYLES[style],
        )
        self._lib.quire_rotary(byref(call))

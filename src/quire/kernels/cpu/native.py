"""The native library: which level this machine gets, its functions with prepared argument types, and its threads.

It knows the C interface of csrc/quire.h and nothing of tensors.
"""

from __future__ import annotations

import ctypes
import logging
import time
from collections.abc import Callable
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire import env
from quire.errors import ConfigError
from quire.kernels.threads import usable_cpus

LEVELS = ("plain", "avx2", "avx512", "avx512bf16")  # ascending; the index is what quire_best_level returns
FOLDER = Path(__file__).parent
ACTIVATIONS = {name: code for code, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid"))}
ACTIVATIONS["quick_gelu"] = 6  # as in csrc/rows.h
logger = logging.getLogger(__name__)

_P, _I, _L, _F = c_void_p, c_int32, c_int64, c_float
# Argument types by function. `long` ones may work for milliseconds and let other Python threads run meanwhile; the
# others hold the interpreter, because waiting for it again would take longer than they do.
LONG_FUNCTIONS = {
    "quire_pack_parts": (_I, _P, _L, _L, _P),
    "quire_round_parts": (_P, _I, _P, _L, _P),
    "quire_checksum": (_P, _L),
    "quire_unpack_linear": (_I, _P, _L, _L, _P),
    "quire_linear": (_I, _P, _L, _P, _P, _P, _L, _L, _L),
    "quire_pack_quantized": (_P, _P, _P, _P, _P),
    "quire_unpack_quantized": (_P, _P, _P, _P, _P),
    "quire_quantized_linear": (_P, _I, _P, _L, _P, _P, _P, _L),
    "quire_rms_norm_quantized_linear": (_I, _P, _L, _P, _P, _P, _P, _L, _L, _F, _I, _P, _P, _P, _P),
    "quire_layer_norm_quantized_linear": (_I, _P, _L, _P, _P, _P, _L, _L, _F, _P, _P, _P, _P),
    "quire_gated_quantized_linear": (_I, _P, _P, _L, _L, _L, _I, _P, _P, _P, _P),
    "quire_attention": (_P,),
    "quire_experts": (_P,),
    "quire_heads_linear": (_P,),
    "quire_sample": (_I, _P, _L, _P, _P, _P, _P, _P, _P, _L, _L),
    "quire_rank": (_P,),
    "quire_read_memory": (_P, _L),
    "quire_multiply_registers": (_I, _L),
    "quire_run_program": (_P, _L, _P, _P, _P, _P),
}
SHORT_FUNCTIONS = {
    "quire_set_threads": (_I,),
    "quire_packed_size": (_I, _L, _L),
    "quire_quantized_size": (_P,),
    "quire_page_size": (_I, _L, _L, _L, _L),
    "quire_write_cache": (_P, _P, _L, _P, _L, _P, _L),
    "quire_rotary": (_P,),
    "quire_rms_norm": (_I, _P, _L, _P, _P, _P, _P, _L, _L, _F, _I),
    "quire_layer_norm": (_I, _P, _L, _P, _P, _P, _L, _L, _F),
    "quire_gated": (_I, _P, _P, _L, _P, _L, _L, _I),
    "quire_argmax": (_I, _P, _L, _P, _L, _L),
    "quire_uniform": (_P, _P, _P, _L),
    "quire_scores": (_I, _P, _L, _P, _L, _L),
    "quire_forbid": (_P, _P, _L, _P, _L, _L),
    "quire_penalize": (_P,),
    "quire_copy_pages": (_P, _L, _P, _L),
    "quire_best_level": (),
    "quire_program_functions": (),
}
RETURNS = {
    "quire_packed_size": c_int64,
    "quire_quantized_size": c_int64,
    "quire_page_size": c_int64,
    "quire_best_level": c_int32,
    "quire_checksum": c_uint64,
    "quire_read_memory": c_float,
    "quire_multiply_registers": c_double,
    "quire_run_program": c_int64,
    "quire_program_functions": c_char_p,
}


class CacheStruct(ctypes.Structure):
    """QuireCache of csrc/quire.h."""

    _fields_ = [
        ("data", _P),
        ("page_size", _L),
        ("kv_heads", _L),
        ("key_dim", _L),
        ("value_dim", _L),
        ("dtype", _I),
        ("rows", _I),
        ("shared", _I),
    ]


class QuantizedStruct(ctypes.Structure):
    """QuireQuantized of csrc/quire.h."""

    _fields_ = [("bits", _I), ("zero_points", _I), ("group", _L), ("n", _L), ("k", _L)]


class PartStruct(ctypes.Structure):
    """QuirePart of csrc/packing.h."""

    _fields_ = [("rows", _P), ("stride", _L), ("n", _L)]


class RotaryStruct(ctypes.Structure):
    """QuireRotary of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("query", "key", "value", "cos", "sin", "query_out", "key_out", "cache", "slots")),
        *((name, _L) for name in ("query_stride", "key_stride", "value_stride")),
        *((name, _L) for name in ("tokens", "heads", "kv_heads", "dim", "rotated")),
        *((name, _I) for name in ("dtype", "angles_dtype", "style")),
    ]


class AttentionStruct(ctypes.Structure):
    """QuireAttention of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("query", "out", "cache", "tables", "starts", "lengths", "sinks")),
        *((name, _L) for name in ("query_stride", "table_stride", "sequences", "heads", "window", "chunk")),
        *((name, _F) for name in ("scale", "softcap")),
    ]


class HeadsStruct(ctypes.Structure):
    """QuireHeads of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("x", "packed", "out")),
        *((name, _L) for name in ("x_row", "x_head", "out_row", "out_head", "rows", "heads", "width", "n", "k")),
        ("dtype", _I),
    ]


class ExpertStruct(ctypes.Structure):
    """QuireExpert of csrc/quire.h."""

    _fields_ = [(name, _P) for name in ("up", "up_bias", "down", "down_bias")]


class ExpertsStruct(ctypes.Structure):
    """QuireExperts of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("experts", "up", "down", "x", "chosen", "weights", "out")),
        *((name, _L) for name in ("x_stride", "rows", "choices", "count", "size", "inner")),
        *((name, _I) for name in ("dtype", "activation")),
    ]


class RankStruct(ctypes.Structure):
    """QuireRank of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("logits", "chosen", "log_sums", "ranks", "best")),
        *((name, _L) for name in ("stride", "count", "rows", "vocab")),
        ("dtype", _I),
    ]


class PenaltiesStruct(ctypes.Structure):
    """QuirePenalties of csrc/quire.h."""

    _fields_ = [
        *((name, _P) for name in ("logits", "tokens", "rows", "slots", "firsts", "ends")),
        *((name, _P) for name in ("repetition", "presence", "frequency")),
        *((name, _L) for name in ("vocab", "width", "count")),
    ]


class Library:
    """The functions of one level's library as attributes, with prepared argument types."""

    quire_pack_parts: Callable[..., None]
    quire_round_parts: Callable[..., None]
    quire_checksum: Callable[..., int]
    quire_unpack_linear: Callable[..., None]
    quire_linear: Callable[..., None]
    quire_pack_quantized: Callable[..., None]
    quire_unpack_quantized: Callable[..., None]
    quire_quantized_linear: Callable[..., None]
    quire_rms_norm_quantized_linear: Callable[..., None]
    quire_layer_norm_quantized_linear: Callable[..., None]
    quire_gated_quantized_linear: Callable[..., None]
    quire_attention: Callable[..., None]
    quire_experts: Callable[..., None]
    quire_heads_linear: Callable[..., None]
    quire_sample: Callable[..., None]
    quire_read_memory: Callable[..., float]
    quire_multiply_registers: Callable[..., float]
    quire_set_threads: Callable[..., None]
    quire_packed_size: Callable[..., int]
    quire_quantized_size: Callable[..., int]
    quire_page_size: Callable[..., int]
    quire_write_cache: Callable[..., None]
    quire_rotary: Callable[..., None]
    quire_rms_norm: Callable[..., None]
    quire_layer_norm: Callable[..., None]
    quire_gated: Callable[..., None]
    quire_argmax: Callable[..., None]
    quire_uniform: Callable[..., None]
    quire_rank: Callable[..., None]
    quire_scores: Callable[..., None]
    quire_forbid: Callable[..., None]
    quire_penalize: Callable[..., None]
    quire_copy_pages: Callable[..., None]
    quire_best_level: Callable[..., int]
    quire_run_program: Callable[..., int]
    quire_program_functions: Callable[..., bytes]

    if TYPE_CHECKING:  # they come from the tables above

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, level: str, folder: Path = FOLDER) -> None:
        path = folder / f"libquire_{level}.so"
        self.level = level
        self.path = path
        releasing, holding = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        for functions, library in ((LONG_FUNCTIONS, releasing), (SHORT_FUNCTIONS, holding)):
            for name, arguments in functions.items():
                function = getattr(library, name)
                function.argtypes = arguments
                function.restype = RETURNS.get(name)
                setattr(self, name, function)

    def set_threads(self, count: int) -> None:
        """Work on `count` threads, the caller's among them."""
        self.quire_set_threads(count)

    def read_bandwidth(self, megabytes: int = 128, passes: int = 8) -> float:
        """Bytes per second that the team reads from memory: the best of some passes over so many megabytes."""
        data = torch.zeros(megabytes << 18).add_(1.0)
        self.quire_read_memory(data.data_ptr(), data.numel())
        times = []
        for _ in range(passes):
            start = time.perf_counter()
            self.quire_read_memory(data.data_ptr(), data.numel())
            times.append(time.perf_counter() - start)
        return data.nbytes / min(times)

    def multiply_rate(self, rounds: int = 2_000_000, dtype: torch.dtype = torch.float32) -> float:
        """Operations per second of products of float32, bfloat16 or int8 in registers on the team: the best of three."""
        code = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}[dtype]
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            done = self.quire_multiply_registers(code, rounds)
            rates.append(done / (time.perf_counter() - start))
        return max(rates)


def built_levels() -> tuple[str, ...]:
    """The levels whose library lies beside this file, ascending."""
    return tuple(level for level in LEVELS if (FOLDER / f"libquire_{level}.so").exists())


def machine_level() -> str:
    """The best level that this machine can run."""
    return LEVELS[Library("plain").quire_best_level()]


def choose_level() -> str | None:
    """The level to use: the machine's best, or what QUIRE_CPU_LEVEL names if that is lower. None: nothing is built."""
    built = built_levels()
    if "plain" not in built:
        return None
    allowed = [level for level in built if LEVELS.index(level) <= LEVELS.index(machine_level())]
    wanted = env.cpu_level()
    if wanted is None:
        return allowed[-1]
    if wanted not in LEVELS:
        raise ConfigError(f"QUIRE_CPU_LEVEL is {wanted!r}. Choose one of: {', '.join(LEVELS)}.")
    if wanted not in allowed:
        raise ConfigError(
            f"QUIRE_CPU_LEVEL is {wanted!r}, which this machine or this build cannot run. "
            f"It can run: {', '.join(allowed)}."
        )
    return wanted


def default_threads() -> int:
    """Threads that this process may really use, at most those of PyTorch's own setting."""
    return min(usable_cpus(), torch.get_num_threads())

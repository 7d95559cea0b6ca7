"""Ops: the table of all kernels for one device, the reference overridden by the device's own module.

A backend is a module with functions of the same names and signatures as kernels/reference.py, or with a function
`load` that returns an object with such functions; what it lacks, the reference does. This file knows which module
belongs to which device, and nothing about what the functions do.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from quire.errors import ConfigError
from quire.kernels import choosing, reference
from quire.kernels.programs import Recorder
from quire.kernels.weights import KeptLinear

BACKENDS = {"cpu": "quire.kernels.cpu", "cuda": "quire.kernels.cuda"}


@dataclass(frozen=True, slots=True)
class Ops:
    """One function per op; kernels/reference.py documents each, and kernels/choosing.py those that choose tokens."""

    pack_linear: Callable[..., reference.PackedLinear]
    unpack_linear: Callable[..., torch.Tensor]
    linear: Callable[..., torch.Tensor]
    pack_quantized: Callable[..., reference.QuantizedLinear]
    unpack_quantized: Callable[..., reference.QuantizedWeights]
    round_linear: Callable[..., reference.QuantizedLinear]
    quantized_linear: Callable[..., torch.Tensor]
    packed_layout: Callable[[], str | None]
    take_apart: Callable[..., KeptLinear | None]
    put_together: Callable[[KeptLinear], reference.PackedLinear | reference.QuantizedLinear]
    checksum: Callable[[torch.Tensor], int]
    cache_bytes: Callable[..., int]
    new_cache: Callable[..., reference.KVCache]
    write_cache: Callable[..., None]
    copy_pages: Callable[..., None]
    attention: Callable[..., torch.Tensor]
    heads_linear: Callable[..., torch.Tensor]
    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    layer_norm: Callable[..., torch.Tensor]
    gated: Callable[..., torch.Tensor]
    stack_experts: Callable[..., Any]
    experts: Callable[..., torch.Tensor]
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rotary_write: Callable[..., torch.Tensor]
    argmax: Callable[..., torch.Tensor]
    uniform: Callable[..., torch.Tensor]
    sample: Callable[..., torch.Tensor]
    rank: Callable[[torch.Tensor, torch.Tensor, int], choosing.Ranked]
    scores: Callable[[torch.Tensor], torch.Tensor]
    forbid: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    penalize: Callable[[torch.Tensor, torch.Tensor, choosing.Said], None]
    set_threads: Callable[[int], None]
    new_recorder: Callable[[], Recorder | None]


def load_ops(device: str | torch.device) -> Ops:
    """The ops of a device ("cpu", "cuda", "cuda:1"). Raises ConfigError for a kind of device that has none."""
    kind = torch.device(device).type
    if kind not in BACKENDS:
        known = ", ".join(sorted(BACKENDS))
        raise ConfigError(f"There are no kernels for device {str(device)!r}. Choose one of: {known}.")
    # Imported when asked for: a backend brings heavy packages or a native library that other devices do not have.
    module = importlib.import_module(BACKENDS[kind])
    return ops_of(module.load() if hasattr(module, "load") else module)


def ops_of(backend: object) -> Ops:
    """The table of one backend; with `reference` itself, the oracle, on any device."""
    return Ops(**{field.name: _find(field.name, (backend, reference, choosing)) for field in fields(Ops)})


def _find(name: str, places: tuple[object, ...]) -> Callable[..., Any]:
    return next(getattr(place, name) for place in places if hasattr(place, name))

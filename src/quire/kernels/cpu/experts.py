"""Experts on a native library: the packed blocks of one mixture, put side by side for csrc/experts.cpp.

A part of CpuOps; it knows how weights are packed, and nothing of routers or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Array, addressof, byref
from dataclasses import dataclass

import torch

from quire.kernels.cpu import native
from quire.kernels.cpu.packing import NativeLinear, NativeQuantized
from quire.kernels.weights import PackedLinear, QuantizedLinear

Packed = PackedLinear | QuantizedLinear


@dataclass(slots=True)
class NativeExperts:
    """Gated blocks of one shape: their addresses, and the weights that these belong to."""

    blocks: Array[native.ExpertStruct]
    up: NativeLinear | NativeQuantized  # that of the first; all are alike
    down: NativeLinear | NativeQuantized
    activation: int
    weights: tuple[Packed, ...]


class NativeMixtures:
    """The ops of mixtures, on one library."""

    def __init__(self, library: native.Library) -> None:
        self._lib = library

    def stack_experts(self, up: Sequence[Packed], down: Sequence[Packed], activation: str) -> NativeExperts | None:
        first, last = up[0], down[0]
        kind: type[NativeLinear] | type[NativeQuantized]
        if isinstance(first, NativeLinear) and isinstance(last, NativeLinear):
            kind = NativeLinear
        elif isinstance(first, NativeQuantized) and isinstance(last, NativeQuantized):
            kind = NativeQuantized
        else:
            return None
        alike = all(isinstance(one, kind) and one.dtype == first.dtype for one in (*up, *down))
        shapes = (
            {(one.out_features, one.in_features) for one in up},
            {(one.out_features, one.in_features) for one in down},
        )
        if not alike or max(map(len, shapes)) > 1 or last.in_features * 2 != first.out_features:
            return None
        pairs = zip(up, down, strict=True)
        structs = [native.ExpertStruct(a.weights, a.added, b.weights, b.added) for a, b in pairs]  # type: ignore[union-attr]
        blocks = (native.ExpertStruct * len(structs))(*structs)
        return NativeExperts(blocks, first, last, native.ACTIVATIONS[activation], (*up, *down))

    def experts(
        self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: NativeExperts
    ) -> torch.Tensor:
        up, down = stack.up, stack.down
        if x.dtype != up.dtype:
            return self.experts(x.to(up.dtype), chosen, weights, stack).to(x.dtype)
        rows = x if x.stride(1) == 1 else x.contiguous()
        chosen, weights = chosen.contiguous(), weights.float().contiguous()
        out = torch.empty(x.shape[0], down.out_features, dtype=x.dtype)
        quantized = isinstance(up, NativeQuantized) and isinstance(down, NativeQuantized)
        call = native.ExpertsStruct(
            addressof(stack.blocks),
            up.layout if quantized else None,  # type: ignore[union-attr]
            down.layout if quantized else None,  # type: ignore[union-attr]
            rows.data_ptr(),
            chosen.data_ptr(),
            weights.data_ptr(),
            out.data_ptr(),
            rows.stride(0),
            chosen.shape[0],
            chosen.shape[1],
            len(stack.blocks),
            up.in_features,
            down.in_features,
            up.code,
            stack.activation,
        )
        self._lib.quire_experts(byref(call))
        return out

"""The CUDA backend: the ops that Triton or cuBLAS do better than the reference, under the same names.

Importing it needs the triton package. What is not here runs as the reference does, in PyTorch on the device.
"""

from __future__ import annotations

from quire.kernels.cuda.attention import attention, copy_pages, write_cache
from quire.kernels.cuda.elementwise import add_rms_norm, gated, rms_norm, rotary_write
from quire.kernels.cuda.linear import heads_linear, linear, stack_experts

__all__ = [
    "add_rms_norm",
    "attention",
    "copy_pages",
    "gated",
    "heads_linear",
    "linear",
    "rms_norm",
    "rotary_write",
    "stack_experts",
    "write_cache",
]

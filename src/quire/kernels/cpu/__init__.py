"""The kernels of the CPU: bindings to the native library, with the names and signatures of kernels/reference.py."""

from __future__ import annotations

from quire.kernels.cpu.ops import CpuOps, load

__all__ = ["CpuOps", "load"]

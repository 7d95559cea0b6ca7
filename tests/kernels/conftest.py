"""Fixtures of the kernel tests: the ops of every level that was built, those beyond this machine on emulation.

A level that the machine cannot run is tested where the AVX-512 levels were built on SIMDe:
    cmake -S . -B build/emulated -G Ninja -DQUIRE_EMULATE=ON && cmake --build build/emulated
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from quire.kernels import reference
from quire.kernels.cpu import CpuOps, native
from quire.kernels.table import Ops, ops_of

EMULATED = Path(__file__).parents[2] / "build" / "emulated"


@cache
def ops_at(level: str) -> Ops:
    """The ops of one level, or a skip that says why there are none."""
    if "plain" not in native.built_levels():
        pytest.skip("the native library is not built")
    if level in native.built_levels() and native.LEVELS.index(level) <= native.LEVELS.index(native.machine_level()):
        return ops_of(CpuOps(level))
    if (EMULATED / f"libquire_{level}.so").exists():
        return ops_of(CpuOps(level, folder=EMULATED))
    pytest.skip(f"this machine cannot run {level}, and it was not built on emulation")


@pytest.fixture(params=native.LEVELS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return ops_at(request.param)


@pytest.fixture
def oracle() -> Ops:
    return ops_of(reference)

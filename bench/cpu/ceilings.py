"""The limits of this machine as they are now: read bandwidth and the speed of arithmetic, from ceilings.cpp.

The program is compiled on first use and kept in the peers' folder. Measuring takes about two seconds of all cores.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("ceilings.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-pthread")
TOO_DIFFERENT = 0.15


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes a second, and operations a second of each unit. `at` is time.monotonic() of the measurement."""

    at: float
    threads: int
    read: float
    f32: float
    bf16: float
    int8: float
    bf16_unit: str
    int8_unit: str

    def rate(self, unit: str) -> float:
        return {"f32": self.f32, "bf16": self.bf16, "int8": self.int8}[unit]

    def differ(self, other: Ceilings) -> float:
        """The largest relative difference between the two in reading or in float32."""
        pairs = ((self.read, other.read), (self.f32, other.f32))
        return max(abs(mine - theirs) / max(mine, theirs) for mine, theirs in pairs)


def mean(found: Sequence[Ceilings]) -> Ceilings:
    """The median of each limit: of two measurements their mean."""
    rates = {name: statistics.median(getattr(one, name) for one in found) for name in ("read", "f32", "bf16", "int8")}
    return replace(found[0], **rates)


def prepare(folder: Path) -> Path:
    """The compiled program. Raises RuntimeError when there is no compiler, or when it refuses."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("The ceilings need a C++ compiler (c++, g++ or clang++), and none is on the path.")
    cpu = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    flags = next((line for line in cpu.splitlines() if line.startswith("flags")), "")
    digest = hashlib.sha256(SOURCE.read_bytes() + flags.encode()).hexdigest()[:12]
    target = folder / f"ceilings-{digest}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} cannot compile {SOURCE.name}: {done.stderr.strip()[:2000]}")
        fresh.rename(target)
    return target


def measure(program: Path, threads: int) -> Ceilings:
    """Run the program; raises RuntimeError when it fails."""
    done = subprocess.run([str(program), str(threads)], capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr.strip()[:500]}")
    return Ceilings(at=time.monotonic(), **json.loads(done.stdout))

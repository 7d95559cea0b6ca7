"""Device: where a worker's tensors live, how much memory is there, how data gets in and out.

Knows nothing of models, plans or kernels.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from quire.errors import ConfigError

CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes: all of the device's memory, and what could be taken now."""

    total: int
    free: int


class Device:
    """One device, named "cpu"."""

    def __init__(self, name: str = "cpu") -> None:
        self.torch_device = torch.device(name)
        self.kind = self.torch_device.type
        if self.kind != "cpu":
            raise ConfigError(f"No support for device {name!r}; quire runs on cpu.")

    def memory(self) -> DeviceMemory:
        """The memory as it is now. On a CPU a control group's limit counts, not the machine's label."""
        return cpu_memory(MEMINFO, CGROUP)

    def threads(self) -> int:
        """Threads that this process may use: its affinity mask, cut by the control group's quota."""
        return cpu_threads(CGROUP)

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A host tensor on the device; on a CPU the tensor itself."""
        return tensor

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the host, ready to be read."""
        return tensor

    def synchronize(self) -> None:
        """Wait for everything that was started. A CPU has nothing to wait for."""


def cpu_memory(meminfo: Path, cgroup: Path) -> DeviceMemory:
    """Total and available bytes from /proc/meminfo, cut by the limit of the control group (version 2 or 1)."""
    figures = {}
    for line in meminfo.read_text().splitlines():
        name, _, rest = line.partition(":")
        figures[name] = int(rest.split()[0]) * 1024
    total, free = figures["MemTotal"], figures.get("MemAvailable", figures["MemFree"])
    for limit_file, used_file, cache_key in (
        (cgroup / "memory.max", cgroup / "memory.current", "inactive_file"),
        (cgroup / "memory/memory.limit_in_bytes", cgroup / "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit = _number(limit_file)
        if limit is None or limit >= total:
            continue
        # Pages of files that nobody uses are given up when memory is asked for.
        reclaimable = _stat(used_file.with_name("memory.stat"), cache_key)
        used = max(0, (_number(used_file) or 0) - reclaimable)
        total, free = limit, min(free, max(0, limit - used))
    return DeviceMemory(total, free)


def cpu_threads(cgroup: Path) -> int:
    """Cores in the affinity mask, at most those of the control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cgroup / "cpu.max"
    if limit.is_file():
        quota, _, period = limit.read_text().partition(" ")
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def _number(file: Path) -> int | None:
    """The integer in a file; None when there is no file or it says "max"."""
    if not file.is_file():
        return None
    text = file.read_text().strip()
    return int(text) if text.isdigit() else None


def _stat(file: Path, key: str) -> int:
    """One figure of a memory.stat file, 0 when it is not there."""
    if not file.is_file():
        return 0
    for line in file.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0

"""Where things are on this machine and what it is: the peers' folder, the models made for the benchmark, the cores.

PEERS names the folder of the peers; without it, `peers` in the user's cache folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Place:
    """Folders, threads and time limits that all engines share."""

    peers: Path
    logs: Path
    threads: int
    limit: float  # seconds for one workload
    load_limit: float  # seconds for a start

    @property
    def models(self) -> Path:
        return self.peers / "models"


@dataclass(frozen=True, slots=True)
class Processor:
    """The machine, for the report."""

    name: str
    cores: tuple[int, ...]
    flags: frozenset[str]
    memory: int

    @property
    def has_bf16(self) -> bool:
        return bool(self.flags & {"avx512_bf16", "amx_bf16", "bf16"})

    def describe(self) -> str:
        level = "AVX-512" if "avx512f" in self.flags else "AVX2" if "avx2" in self.flags else "no AVX2"
        extras = [name for name in ("avx512_bf16", "avx512_vnni", "avx_vnni", "amx_int8") if name in self.flags]
        units = ", ".join([level, *extras])
        return f"{len(self.cores)} cores of {self.name} ({units}), {self.memory / 1e9:.0f} GB"


def peers_folder() -> Path:
    """The folder that PEERS names, or its default."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PEERS") or cache / "peers")


def processor() -> Processor:
    """This machine's, as the kernel describes it."""
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    name = fields.get("model name", "an unknown processor")
    family = f"{name}, family {fields['cpu family']}" if "cpu family" in fields else name
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(family, tuple(sorted(os.sched_getaffinity(0))), flags, memory)

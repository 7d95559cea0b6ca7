"""How many threads this process may really use: its affinity mask, cut by the quota of its control group.

Knows no tensors and no devices; whoever sizes a team of threads on a CPU asks here.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = CGROUP) -> int:
    """Cores in the affinity mask, at most those of the control group's quota; at least one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cgroup_cpus(cgroup) or cores))


def cgroup_cpus(cgroup: Path = CGROUP) -> int | None:
    """The processor quota of this process's control group (version 2, then 1), rounded up; None where there is none."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if quota == "max" or int(quota) <= 0:
        return None
    return math.ceil(int(quota) / int(period))

"""Was the machine quiet? What other processes used while an engine ran, from /proc, and whether a run counts.

Our own are this process and all that descend from it. `adopt_orphans` makes this process inherit those whose parent
ended, so that none is lost sight of, and `end_leftovers` ends them.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
PR_SET_CHILD_SUBREAPER = 36
MOST_OTHERS = 0.08  # of a core
SHORTEST = 1.0  # seconds below which the clock's ticks say nothing about shares


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc/PID/stat: seconds of processor time, those of ended children too, and resident bytes."""

    pid: int
    parent: int
    seconds: float
    resident: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Processor seconds so far: of the whole machine, and of this process with its descendants."""

    at: float
    machine: float
    ours: float


def parse_process(line: str) -> Process:
    """Read a line of /proc/PID/stat. The name in parentheses may hold spaces and parentheses."""
    pid, _, rest = line.partition(" (")
    fields = rest.rpartition(") ")[2].split()
    # Counted from the field after the name: state 0, parent 1, utime 11, stime 12, cutime 13, cstime 14, rss 21.
    ticks = sum(int(fields[index]) for index in (11, 12, 13, 14))
    return Process(int(pid), int(fields[1]), ticks * TICK, int(fields[21]) * PAGE)


def parse_machine(text: str) -> float:
    """Busy seconds of all cores from /proc/stat; time that the hypervisor took away (steal) is use by others."""
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(word) for word in text.split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) * TICK


def processes() -> dict[int, Process]:
    """Every process that is alive now."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                process = parse_process((folder / "stat").read_text())
            except (OSError, IndexError, ValueError):  # ended meanwhile
                continue
            found[process.pid] = process
    return found


def family(everyone: dict[int, Process], root: int) -> list[Process]:
    """`root` and its descendants."""
    children: dict[int, list[int]] = {}
    for process in everyone.values():
        children.setdefault(process.parent, []).append(process.pid)
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        if pid in everyone:
            found.append(everyone[pid])
        waiting += children.get(pid, [])
    return found


def snapshot() -> Snapshot:
    """The counters as they are now."""
    machine = parse_machine(Path("/proc/stat").read_text())
    ours = sum(process.seconds for process in family(processes(), os.getpid()))
    return Snapshot(time.monotonic(), machine, ours)


def others_between(before: Snapshot, after: Snapshot) -> float:
    """Cores that processes other than ours used on average."""
    used = (after.machine - before.machine) - (after.ours - before.ours)
    return max(0.0, used / max(after.at - before.at, SHORTEST))


def peak_memory(root: int) -> int:
    """Bytes: the most that each process below `root` (itself included) ever held, added up."""
    total = 0
    for process in family(processes(), root):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def disturbance(others: float, difference: float, most_difference: float) -> str | None:
    """Why a run does not count, None when it does. `difference` is between the ceilings before and after it."""
    if others > MOST_OTHERS:
        return f"others used {others:.2f} of a core"
    if difference > most_difference:
        return f"the ceilings before and after differ by {difference:.0%}"
    return None


def adopt_orphans() -> None:
    """Descendants whose parent ends become children of this process (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_leftovers(patience: float = 5.0) -> None:
    """Wait for all descendants of this process; those that stay are killed."""
    deadline = time.monotonic() + patience
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        if time.monotonic() > deadline:
            for process in family(processes(), os.getpid()):
                if process.pid != os.getpid():
                    os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.05)

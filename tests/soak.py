"""The long tests, one after the other, with one line each at the end: python tests/soak.py [--minutes 60] [--only NAME]

The seeded simulation of the scheduler, a mixed workload under random schedules, faults at every call, allocations that
fail, 10,000 dropped connections, overload, fuzzing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """A program and its share of the time; None: it takes what it takes."""

    name: str
    words: tuple[str, ...]
    share: float | None = None


PARTS = (
    Part("simulation", ("pure/simulation.py",), 0.3),
    Part("overload", ("e2e/overload.py",), 0.2),
    Part("schema", ("security/test_security_schema.py",), 0.2),
    Part("schedules", ("engine/schedules.py", "--count", "60")),
    Part("faults", ("engine/fault_rig.py",)),
    Part("memory", ("engine/short_memory.py",)),
    Part("storms", ("engine/storms.py", "--connections", "10000")),
)


def run(part: Part, minutes: float) -> tuple[int, str]:
    """The status of a part and the last line that it printed."""
    script, *words = part.words
    if part.share is not None:
        words += ["--minutes", f"{part.share * minutes:.2f}"]
    command = [sys.executable, "-W", "ignore", str(HERE / script), *words]
    print(f"== {part.name}: {' '.join(command[3:])}", flush=True)
    last = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def main() -> int:
    """Run the parts; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=50.0, help="for the parts that go on as long as they may")
    parser.add_argument("--only", choices=[part.name for part in PARTS])
    found = parser.parse_args()
    began, lines, worst = time.monotonic(), [], 0
    for part in PARTS:
        if found.only in (None, part.name):
            status, last = run(part, found.minutes)
            lines.append(f"{'ok    ' if status == 0 else 'FAILED'} {part.name}: {last}")
            worst = max(worst, int(status != 0))
    print("\n" + "\n".join(lines) + f"\n{(time.monotonic() - began) / 60:.1f} minutes")
    return worst


if __name__ == "__main__":
    sys.exit(main())

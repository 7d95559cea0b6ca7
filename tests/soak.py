"""The long tests in pieces of some minutes each: python tests/soak.py [--minutes 10] [--only NAME] [--stop-after SECONDS]

The seeded simulation of the scheduler, a mixed workload under random schedules, faults at every call, allocations that
fail, kills of the engine, 10,000 dropped connections, overload, two keys, fuzzing. What is done stands in build/soak.jsonl:
the same command goes on where it was interrupted, and begins anew when nothing was left. A line for each piece at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
RECORD = HERE.parent / "build" / "soak.jsonl"
LONGEST = 3.0  # minutes of a piece that goes on as long as it may
LASTING = {
    "simulation": "pure/simulation.py",
    "overload": "e2e/overload.py",
    "schema": "security/test_security_schema.py",
}
COUNTED = {
    "keys": ["e2e/overload.py --keys"],
    "many": ["e2e/many_connections.py --connections 10000"],
    "kills": ["e2e/test_survival.py --kills 20 --tokens 250"],
    "schedules": [f"engine/schedules.py --count 10 --seed {10 * seed}" for seed in range(6)],
    "faults": [f"engine/fault_rig.py --shard {shard}/16" for shard in range(1, 17)],
    "memory": [f"engine/short_memory.py --every {every}" for every in (1009, 307, 101, 53)],
    "bodies": ["security/test_security_fuzz.py --examples 1000"],
    "storms": [f"engine/storms.py --connections 2500 --seed {seed}" for seed in range(4)],
}


@dataclass(frozen=True)
class Done:
    """A piece that was run: its command, its status, the last line that it printed, and how long it took."""

    command: str
    status: int
    line: str
    seconds: float

    def shown(self) -> str:
        """For people."""
        return f"{'ok    ' if self.status == 0 else 'FAILED'} {self.command}: {self.line} ({self.seconds:.0f} s)"


def commands(minutes: float, only: str | None) -> list[str]:
    """All pieces, or those of one part."""
    count = max(1, math.ceil(minutes / LONGEST))
    lasting = {name: [f"{script} --minutes {minutes / count:.2f}"] * count for name, script in LASTING.items()}
    parts = lasting | COUNTED
    found = [command for name, part in parts.items() if only in (None, name) for command in part]
    return [f"{command} # {found[:place].count(command) + 1}" for place, command in enumerate(found)]


def run(command: str) -> Done:
    """Run a piece to its end."""
    print(f"== {command}", flush=True)
    began, last = time.monotonic(), ""
    script, *words = command.partition(" #")[0].split()
    line = [sys.executable, "-W", "ignore", str(HERE / script), *words]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            last = text.strip() or last
    return Done(command, process.returncode, last, time.monotonic() - began)


def recorded() -> Iterator[Done]:
    """What earlier runs have done, the latest last."""
    if RECORD.exists():
        for line in RECORD.read_text().splitlines():
            yield Done(**json.loads(line))


def main() -> int:
    """Run what is left; 1 when a piece failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for each part that goes on as long as it may")
    parser.add_argument("--only", choices=[*LASTING, *COUNTED])
    parser.add_argument("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no piece later")
    found = parser.parse_args()
    wanted = commands(found.minutes, found.only)
    done = {item.command: item for item in recorded()}
    left = [command for command in wanted if command not in done or done[command].status] or wanted
    if left == wanted:
        done = {command: item for command, item in done.items() if command not in wanted}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text("".join(json.dumps(asdict(item)) + "\n" for item in done.values()))
    began = time.monotonic()
    for command in left:
        if time.monotonic() - began > found.stop_after:
            break
        done[command] = run(command)
        with RECORD.open("a") as record:
            record.write(json.dumps(asdict(done[command])) + "\n")
    ended = [done[command] for command in wanted if command in done]
    print("\n" + "\n".join(item.shown() for item in ended))
    print(
        f"{len(ended)} of {len(wanted)} pieces are done; the same command goes on." if len(ended) < len(wanted) else ""
    )
    return int(any(item.status for item in ended))


if __name__ == "__main__":
    sys.exit(main())

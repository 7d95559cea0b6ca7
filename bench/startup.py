"""Seconds from the start of the process to the first token, for the bundled model or another one.

python bench/startup.py [MODEL] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Once upon a time"


def main() -> None:
    """Start the command several times and print each time and the median."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="model and flags, as quire run takes them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found, rest = parser.parse_known_args()
    seconds = [first_token([*found.model, PROMPT, "--max-tokens", "1", *rest]) for _ in range(found.rounds)]
    print("first token after", ", ".join(f"{value:.2f}" for value in seconds), "s")
    print(f"median {statistics.median(seconds):.2f} s")
    found.results.mkdir(exist_ok=True)
    (found.results / "startup.json").write_text(json.dumps({"seconds": seconds}))


def first_token(words: list[str]) -> float:
    """Seconds until the process has written anything beyond the prompt."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "quire.cli.main", "run", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(len(PROMPT) + 1)
        seconds = time.perf_counter() - start
        process.stdout.read()
    if process.returncode != 0:
        raise SystemExit(f"quire run ended with {process.returncode}")
    return seconds


if __name__ == "__main__":
    main()

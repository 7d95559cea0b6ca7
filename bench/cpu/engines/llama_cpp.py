"""llama.cpp as one of the engines: its own benchmark programs, on GGUF files with random weights.

Each workload is a process of llama-bench or llama-batched-bench, which warm up and measure by themselves.
"""

from __future__ import annotations

import json
import os
import selectors
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cpu.checkpoint import model_folder, read_through
from bench.cpu.engines.session import Answer, Engine, EngineFailed, Session, last_reason
from bench.cpu.place import Place
from bench.cpu.workloads import Workload

WRITER = Path(__file__).parents[1] / "write_gguf.py"


def programs(place: Place) -> Path:
    """The folder of the programs."""
    return place.peers / "llama" / "bin"


def missing(place: Place) -> str | None:
    """Is it built?"""
    if not (programs(place) / "llama-bench").exists():
        return f"not built in {place.peers}; bench/cpu/install_peers.sh llama does it"
    return None


@dataclass(slots=True)
class Ended:
    """A program that ran to its end."""

    output: str
    seconds: float
    peak: int


class LlamaSession:
    """The model file of one shape and format; nothing stays in memory between workloads."""

    def __init__(self, place: Place, shape: str, variant: str) -> None:
        self.place = place
        self.shape = shape
        self.variant = variant
        self.file = place.models / f"{shape}-{variant}.gguf"
        self.log = place.logs / f"llama.cpp-{shape}-{variant}.log"

    def prepare(self) -> None:
        """Make the file if need be, and bring it into memory."""
        if not self.file.exists():
            self.make()
        read_through(self.file)

    def make(self) -> None:
        """Write the file, or quantize the bfloat16 one."""
        fresh = self.file.with_suffix(".part")
        if self.variant == "BF16":
            config = model_folder(self.place.models, self.shape, None, False) / "config.json"
            python = self.place.peers / "llama" / "env" / "bin" / "python"
            if not python.exists():
                raise EngineFailed("no environment to write GGUF files; bench/cpu/install_peers.sh llama makes it")
            self.call([str(python), str(WRITER), str(config), str(fresh)], self.place.load_limit)
        else:
            plain = LlamaSession(self.place, self.shape, "BF16")
            if not plain.file.exists():
                plain.make()
            program = str(programs(self.place) / "llama-quantize")
            # The file of bfloat16 has all that is needed; the limit is that of a start, which is generous.
            self.call([program, str(plain.file), str(fresh), self.variant, str(self.place.threads)], 600)
        fresh.rename(self.file)

    def call(self, command: list[str], limit: float) -> Ended:
        """Run a program to its end. Raises EngineFailed with the last line that tells why it failed."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with (
            self.log.open("ab") as errors,
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors) as process,
        ):
            output = self.collect(process, began + limit)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        if process.returncode != 0:
            if seconds > limit:
                raise EngineFailed(f"no answer within {limit:.0f} s")
            raise EngineFailed(f"ended with {process.returncode}: {last_reason(self.log)}")
        return Ended(output.decode(), seconds, usage.ru_maxrss * 1024)

    def collect(self, process: subprocess.Popen[bytes], deadline: float) -> bytes:
        """All that a program writes; it is killed at the deadline."""
        assert process.stdout is not None
        parts: list[bytes] = []
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    process.kill()
                    return b"".join(parts)
                part = os.read(process.stdout.fileno(), 1 << 16)
                if not part:
                    return b"".join(parts)
                parts.append(part)

    def run(self, workload: Workload) -> Answer:
        """The program that suits the kind of workload."""
        if workload.kind == "decode":
            return self.decode(workload)
        if workload.kind == "start":
            return self.first_token(workload)
        return self.batched(workload)

    def decode(self, workload: Workload) -> Answer:
        """Output tokens of one request, after a prompt."""
        words = ["-p", "0", "-n", str(workload.output_len), "-d", str(workload.input_len)]
        ended = self.bench([*words, "-r", str(workload.repeats)])
        samples = read_lines(ended.output)[-1]["samples_ts"]
        return Answer(statistics.median(samples), tuple(samples), ended.peak)

    def first_token(self, workload: Workload) -> Answer:
        """A whole process that computes a prompt and one token: an upper bound."""
        ended = self.bench(["-p", "0", "-n", "0", "-pg", f"{workload.input_len},1", "-r", "1", "--no-warmup"])
        return Answer(ended.seconds, (ended.seconds,), ended.peak)

    def bench(self, words: list[str]) -> Ended:
        program = str(programs(self.place) / "llama-bench")
        common = ["-m", str(self.file), "-t", str(self.place.threads), "-o", "jsonl"]
        return self.call([program, *common, *words], self.place.limit)

    def batched(self, workload: Workload) -> Answer:
        """Several requests at once, each with a prompt of its own."""
        shape = {"-npp": workload.input_len, "-ntg": workload.output_len, "-npl": workload.requests}
        threads = {"-t": self.place.threads, "-tb": self.place.threads}
        context = {"-c": workload.requests * (workload.input_len + workload.output_len)}
        words = [str(word) for pair in (shape | threads | context).items() for word in pair]
        program = str(programs(self.place) / "llama-batched-bench")
        samples, peak = [], 0
        for _ in range(workload.repeats):
            ended = self.call([program, "-m", str(self.file), *words, "--output-format", "jsonl"], self.place.limit)
            found = read_lines(ended.output)[-1]
            peak = max(peak, ended.peak)
            if workload.kind == "prefill":
                samples.append(found["speed_pp"])
            elif workload.kind == "memory":
                samples.append(ended.peak / 1e9)
            else:
                samples.append(workload.requests * workload.output_len / (found["t_pp"] + found["t_tg"]))
        return Answer(statistics.median(samples), tuple(samples), peak)

    def hold(self) -> None:
        """Nothing runs between workloads."""

    def release(self) -> None:
        """Nothing was held."""

    def close(self) -> None:
        """Nothing is left running."""


def read_lines(output: str) -> list[dict[str, Any]]:
    """The JSON objects of an output that may hold other lines, too."""
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if not found:
        raise EngineFailed("the program printed no result")
    return found


def open_session(place: Place, workload: Workload, variant: str) -> Session:
    """The file of the group of `workload`."""
    return LlamaSession(place, workload.shape, variant)


ENGINE = Engine("llama.cpp", missing, open_session)

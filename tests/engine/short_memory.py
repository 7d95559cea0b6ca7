"""An engine process in which every n-th allocation fails, in Python, torch and the native kernels alike: what becomes of
its requests. Needs a C compiler. Without arguments it tries several n.

python tests/engine/short_memory.py [--every 307]
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import logging
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))

from quire.config import EngineOptions
from quire.core.params import SamplingParams
from quire.engine.async_engine import AsyncEngine
from quire.engine.child import ChildProcess
from quire.engine.engine_process import Served, Tell, import_heavy, load_model, run
from quire.engine.supervised import start_supervised
from quire.engine.supervisor import Patience, Supervisor
from quire.errors import EngineDeadError

REQUESTS, TOKENS = 12, 30
SOURCE = Path(__file__).parent / "failing_malloc.c"


@dataclass
class Survived:
    """What came of it."""

    every: int
    failures: int
    restarts: int
    errors: int  # requests that ended with one
    wrong: int  # requests whose tokens were others than without failures

    def line(self) -> str:
        return (
            f"every {self.every}th allocation: {self.failures} failed, {self.restarts} restarts, {self.errors} of "
            f"{REQUESTS} requests ended with an error, {self.wrong} with wrong tokens"
        )


def child(every: str, log: str, *descriptors: str) -> int:
    """The engine process. Memory is short as soon as the model is loaded."""

    def load(options: EngineOptions, tell: Tell) -> Served:
        served = load_model(options, tell)
        if int(every):
            ctypes.CDLL(None).fail_every(ctypes.c_long(int(every)), log.encode())
        return served

    return run(load, descriptors, import_heavy)


async def answers(engine: AsyncEngine) -> list[list[int] | str]:
    """The tokens of all requests, or why they failed."""

    async def one(number: int) -> list[int] | str:
        params = SamplingParams(
            max_tokens=TOKENS, ignore_eos=True, seed=number, temperature=number % 2, logprobs=number % 3 or None
        )
        async for output in engine.generate({"prompt_token_ids": [5 + number] * (8 + 9 * number)}, params, str(number)):
            last = output.outputs[0]
        return last.error or list(last.token_ids)

    return await asyncio.gather(*(one(number) for number in range(REQUESTS)))


async def attempt(
    model: Path, library: Path, every: int, healthy: list[list[int] | str] | None
) -> tuple[list, Survived]:
    """One engine, from its start to its end."""
    log = model / f"log-{every}"
    command = ("env", f"LD_PRELOAD={library}", sys.executable, __file__, "child", str(every), str(log))
    options = EngineOptions.from_flat(
        {"model": str(model), "device": "cpu", "threads": 1, "max_model_len": 256, "num_gpu_blocks_override": 200}
    )
    patience = Patience(first_pause=0.01, longest_pause=0.1, spare_after=0.0, vain_deaths=100)
    engine = start_supervised(options, patience=patience, new_process=partial(ChildProcess, command))
    core = engine._core
    assert isinstance(core, Supervisor)
    async with AsyncEngine(engine) as running:
        try:
            found = await answers(running)
        except EngineDeadError as error:
            found = [str(error)] * REQUESTS
    failures = log.stat().st_size if log.exists() else 0
    errors = sum(isinstance(item, str) for item in found)
    wrong = sum(item != right for item, right in zip(found, healthy or found, strict=True) if not isinstance(item, str))
    return found, Survived(every, failures, core.restarts, errors, wrong)


def survive(folder: Path, everies: list[int]) -> list[Survived]:
    """One engine for each n."""
    from tiny import write_tiny  # brings torch, which the engine process imports by itself

    library = folder / "failing_malloc.so"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    model = write_tiny(folder / "model")
    healthy, _ = asyncio.run(attempt(model, library, 0, None))
    return [asyncio.run(attempt(model, library, every, healthy))[1] for every in everies]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, nargs="*", default=[1009, 307, 101, 53])
    everies = parser.parse_args().every
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        found = survive(Path(folder), everies)
    for item in found:
        print(item.line())
    print(
        f"{sum(item.failures for item in found)} failed allocations, {sum(item.restarts for item in found)} restarts, "
        f"{sum(item.errors for item in found)} errors, {sum(item.wrong for item in found)} wrong answers"
    )
    return int(any(item.wrong for item in found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        sys.exit(child(*sys.argv[2:]))
    sys.exit(main())

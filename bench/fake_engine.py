"""An engine process whose model is a clock: every token is the time at which its step was over, in units of 0.1 ms.

Steps come at a steady rate, so what a server costs can be measured without a model. Everything else is the real
engine. Run by the server, with the rate of steps and the rows of a step as arguments before the descriptors.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import quire.bundled
from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.plan import GroupSpec, Singles, StepPlan, StepResult
from quire.engine.engine import EngineSettings
from quire.engine.engine_process import Served, Tell, run
from quire.engine.executor import Done, FakeExecutor, Handle
from quire.engine.wire import Phase, Tokenizing

UNIT = 1e-4  # seconds
WRAP = 4000  # units; the bundled tokenizer has as many plain tokens
MAX_MODEL_LEN = 8192
MODEL = Path(quire.bundled.__file__).parent / "model"


def now() -> int:
    """The time as a token. All processes of a machine share this clock."""
    return int(time.monotonic() / UNIT) % WRAP


def age(token: int, at: float) -> float:
    """Milliseconds from when a token was made until `at`, by time.monotonic(), if that is no longer than UNIT * WRAP."""
    return (int(at / UNIT) - token) % WRAP * UNIT * 1000


class SteadyExecutor:
    """A FakeExecutor that begins its steps at a steady rate, those per second."""

    def __init__(self, rate: float) -> None:
        self._inner = FakeExecutor(lambda tokens: now())
        self._interval = 1.0 / rate
        self._next = 0.0

    def submit(self, plan: StepPlan) -> Handle:
        """Wait for the step's time, then run it."""
        begin = time.monotonic()
        self._next = max(self._next + self._interval, begin)
        time.sleep(self._next - begin)
        self._inner.plans.clear()
        return Done(stamped(plan, self._inner.submit(plan).result()))

    def call(self, method: str, *args: Any) -> Any:
        """There is no worker."""
        return self._inner.call(method, *args)

    def close(self) -> None:
        """Nothing to give back."""


def stamped(plan: StepPlan, result: StepResult) -> StepResult:
    """The result as a worker tells it: a step's tokens are there together, and where there is nothing else, as a column."""
    if not all(span.sample for span in plan.spans) or any(any(found[2:]) for found in result.spans):
        return result
    return StepResult(result.step, Singles(plan.spans, [now()] * len(plan.spans)), result.seconds)


def load(options: EngineOptions, tell: Tell) -> Served:
    """What the real loader brings, without a model."""
    rate, rows = float(sys.argv[1]), int(sys.argv[2])
    tell(Tokenizing(str(MODEL)))
    tell(Phase("pretending", 0.0))
    scheduler = SchedulerOptions(
        groups=(GroupSpec("full", 16, rows * 64),),
        max_num_seqs=rows,
        max_num_batched_tokens=8192,
        policy=options.schedule.scheduling_policy,
        max_model_len=MAX_MODEL_LEN,
    )
    schedule = options.schedule
    settings = EngineSettings(
        MAX_MODEL_LEN,
        4096,
        (4089,),
        max_num_queued_reqs=schedule.max_num_queued_reqs,
        max_num_queued_tokens=schedule.max_num_queued_tokens,
        model_names=("clock",),
    )
    return Served(SteadyExecutor(rate), scheduler, settings)


if __name__ == "__main__":
    sys.exit(run(load, [sys.argv[3], sys.argv[4]]))

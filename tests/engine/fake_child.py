"""An engine process without a model, for tests of the supervisor: its tokens are bytes, its model is a function.

The options' `model` is a JSON object: `delay` of each step in seconds; `flag`, a file that says whether a prompt with
"hang once" has hung already; `fail`, a kind of error that the start brings; `die`, whether it dies while starting;
`pages` and `in_flight`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from bytes_engine import EOS, VOCAB, mixer

from quire import errors
from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.plan import GroupSpec
from quire.engine.engine import EngineSettings
from quire.engine.engine_process import Served, Tell, run
from quire.engine.executor import FakeExecutor, NextToken
from quire.engine.wire import Phase

MAX_MODEL_LEN = 400


def scheduler_options(setup: dict[str, Any]) -> SchedulerOptions:
    return SchedulerOptions(
        groups=(GroupSpec("full", 8, setup.get("pages", 4000)),),
        max_num_seqs=setup.get("seqs", 64),
        max_num_batched_tokens=512,
        max_model_len=MAX_MODEL_LEN,
        max_in_flight=setup.get("in_flight", 1),
    )


def model(setup: dict[str, Any]) -> NextToken:
    def next_token(tokens: tuple[int, ...]) -> int:
        start = bytes(token for token in tokens[:40] if token < 256)
        if start.startswith(b"poison"):
            os.kill(os.getpid(), signal.SIGKILL)
        if start.startswith(b"fault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if start.startswith(b"hang"):
            flag = Path(setup["flag"])
            if b"always" in start or not flag.exists():
                flag.touch()
                time.sleep(1000)
        if start.startswith(b"broken"):
            raise RuntimeError("broken by its prompt")
        return mixer(tokens)

    return next_token


def load(options: EngineOptions, tell: Tell) -> Served:
    setup = json.loads(options.model.model or "{}")
    tell(Phase("pretending", 0.5))
    if "fail" in setup:
        raise getattr(errors, setup["fail"], ArithmeticError)("as the test wants it")
    if Path(setup.get("die", "/nowhere")).exists():
        os.kill(os.getpid(), signal.SIGKILL)
    executor = FakeExecutor(model(setup), setup.get("delay", 0.0), threaded=setup.get("in_flight", 1) > 1)
    executor.plans = Forgetful()
    return Served(executor, scheduler_options(setup), EngineSettings(MAX_MODEL_LEN, VOCAB, (EOS,)))


class Forgetful(list[Any]):
    """The plans of a long run are not kept."""

    def append(self, item: Any) -> None:
        pass


if __name__ == "__main__":
    sys.exit(run(load, sys.argv[1:]))

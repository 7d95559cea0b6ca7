"""The real server, as `quire serve` starts it, over an engine whose next token is a hash of all before it.

python mixer_server.py [flags of quire serve]. The first token of a prompt may be special: POISON kills the engine process
when it is computed, SLOW and SLOWER make each step with it take a while.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import quire.bundled
from quire import env
from quire.cli.options import engine_options, engine_parser, section_of
from quire.config import EngineOptions, ServeOptions
from quire.core.options import SchedulerOptions
from quire.core.plan import GroupSpec
from quire.engine.child import ChildProcess
from quire.engine.engine import EngineSettings
from quire.engine.engine_process import Served, Tell, run
from quire.engine.executor import FakeExecutor
from quire.engine.wire import Phase, Tokenizing
from quire.serve.run import run_server

POISON, SLOW, SLOWER = 7, 8, 9
SECONDS = {SLOW: 0.002, SLOWER: 0.01}  # that a request with this first token adds to a step, on any machine
MAX_MODEL_LEN = 2048
MODEL = Path(quire.bundled.__file__).parent / "model"


def next_token(tokens: tuple[int, ...]) -> int:
    """The model."""
    if tokens[0] == POISON:
        os.kill(os.getpid(), signal.SIGKILL)
    if tokens[0] in SECONDS:
        time.sleep(SECONDS[tokens[0]])
    return 20 + hash(tokens[-8:]) % 4000


def load(options: EngineOptions, tell: Tell) -> Served:
    """What the real loader brings, without a model."""
    tell(Tokenizing(str(MODEL)))
    tell(Phase("pretending", 0.0))
    schedule = options.schedule
    scheduler = SchedulerOptions(
        groups=(GroupSpec("full", 16, 4000),),
        max_num_seqs=schedule.max_num_seqs or 32,
        max_num_batched_tokens=4096,
        policy=schedule.scheduling_policy,
        max_model_len=MAX_MODEL_LEN,
    )
    settings = EngineSettings(
        MAX_MODEL_LEN,
        4096,
        (4089,),
        max_num_queued_reqs=schedule.max_num_queued_reqs,
        model_names=("mixer",),
        fair=schedule.scheduling_policy == "fair",
    )
    return Served(FakeExecutor(next_token, delay=0.002), scheduler, settings)


def main() -> int:
    """Serve, or be the engine, where two descriptors are given."""
    if len(sys.argv) == 3 and all(argument.isdigit() for argument in sys.argv[1:]):
        return run(load, sys.argv[1:])
    parser = engine_parser("mixer_server", "The server over a hash.")
    parser.add_section(ServeOptions, "server")
    found = parser.parse(sys.argv[1:])
    env.set_up_logging()
    command = (sys.executable, __file__)
    return run_server(
        engine_options(found), section_of(ServeOptions, found), new_process=partial(ChildProcess, command)
    )


if __name__ == "__main__":
    sys.exit(main())

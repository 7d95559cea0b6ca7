"""The engine process goes on with its steps while a grammar is compiled for a request that has just come."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from quire.core.options import SchedulerOptions
from quire.core.params import SamplingParams
from quire.core.plan import GroupSpec
from quire.core.scheduler import Scheduler
from quire.engine import wire
from quire.engine.blackbox import BlackBox, new_file
from quire.engine.core import EngineCore
from quire.engine.engine_process import EngineLoop, NotedExecutor
from quire.engine.executor import FakeExecutor


class Scripted:
    """The other end of the socket: messages by the number of the round, until the script ends."""

    def __init__(self, rounds: int, script: dict[int, list[Any]], at_round: Callable[[int], None]) -> None:
        self.ended = False
        self.sent: list[Any] = []
        self._rounds, self._script, self._at_round, self._round = rounds, script, at_round, 0

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def flush(self) -> None:
        pass

    def receive(self) -> list[Any]:
        self._round += 1
        self._at_round(self._round)
        self.ended = self._round >= self._rounds
        return self._script.get(self._round, [])


class Slow:
    """Grammars that are ready when the test says so."""

    is_ready = False

    def ready(self, form: object) -> bool:
        return self.is_ready


def add(ticket: int, **wishes: Any) -> wire.Add:
    params = SamplingParams(max_tokens=30, ignore_eos=True, **wishes)
    return wire.Add(ticket, f"r{ticket}", (1, 2, 3), params, None, seed=0)


def admitted(at_end: int, ready_at: int, script: dict[int, list[Any]]) -> tuple[list[list[str]], FakeExecutor]:
    """The requests that entered by each round's end."""
    inner = FakeExecutor(lambda tokens: 7)
    memory = new_file()
    box = BlackBox(memory)
    os.close(memory)
    executor = NotedExecutor(inner, box)
    options = SchedulerOptions(
        groups=(GroupSpec("full", 8, 100),), max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64
    )
    seen: list[list[str]] = []
    slow = Slow()

    def at_round(number: int) -> None:
        slow.is_ready = number >= ready_at
        seen.append([new.request_id for plan in inner.plans for new in plan.admitted])

    connection = Scripted(at_end, script, at_round)
    EngineLoop(EngineCore(Scheduler(options), executor), executor, connection, slow).serve()  # type: ignore[arg-type]
    box.close()
    return seen, inner


def test_steps_go_on_while_a_grammar_is_compiled() -> None:
    script = {1: [add(1)], 3: [add(2, structured_outputs={"regex": "a+"})]}
    seen, inner = admitted(14, 9, script)
    names = [wire.core_id(1, "r1"), wire.core_id(2, "r2")]
    assert seen[7] == names[:1] and seen[-1] == names
    assert len(inner.plans) >= 11  # one in each round since the first request came


def test_a_waiting_request_can_be_aborted() -> None:
    held = add(2, structured_outputs={"regex": "a+"})
    script = {1: [add(1)], 3: [held], 5: [wire.Abort(2, "r2")]}
    seen, _ = admitted(14, 9, script)
    assert seen[-1] == [wire.core_id(1, "r1")]

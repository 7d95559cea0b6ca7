"""The engine process dies, hangs or is poisoned: streams go on as if nothing had happened, and only the guilty end."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bytes_engine import ByteTokenizer, Shape, byte_engine, mixer
from fake_child import MAX_MODEL_LEN

from quire.config import EngineOptions
from quire.core.params import RequestOutputKind, SamplingParams
from quire.engine import wire
from quire.engine.async_engine import AsyncEngine
from quire.engine.child import ChildProcess
from quire.engine.engine import Engine
from quire.engine.supervisor import Patience, Supervisor
from quire.engine.suspects import QUARANTINED
from quire.errors import CapacityError, EngineDeadError, EngineError, ModelNotFoundError, ValidationError
from waiting import when

CHILD = (sys.executable, str(Path(__file__).parent / "fake_child.py"))
DELTA = RequestOutputKind.DELTA
SILENCE = 2.5  # seconds that an engine process with work needs for a step on no machine


def supervisor(setup: dict[str, Any], patience: Patience | None = None) -> Supervisor:
    return Supervisor(EngineOptions.from_flat({"model": json.dumps(setup)}), partial(ChildProcess, CHILD), patience)


def engine_over(core: Supervisor) -> AsyncEngine:
    ready = core.start()
    return AsyncEngine(Engine(core, ByteTokenizer(), ready.settings))


@dataclass
class Heard:
    """What came of one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    times: list[float] = field(default_factory=list)
    reason: str | None = None
    error: str | None = None


async def listen(engine: AsyncEngine, prompt: str, params: SamplingParams, name: str, heard: Heard) -> None:
    async for output in engine.generate(prompt, params, name):
        done = output.outputs[0]
        heard.tokens += done.token_ids
        heard.text += done.text
        heard.times.append(time.monotonic())
        heard.reason, heard.error = done.finish_reason, done.error


def expected(prompt: str, count: int) -> list[int]:
    tokens = list(prompt.encode())
    for _ in range(count):
        tokens.append(mixer(tuple(tokens)))
    return tokens[-count:]


async def all_free(engine: AsyncEngine) -> None:
    """Wait until the engine says that nothing runs and no page is held."""
    stats = await engine.stats()
    while stats.running or stats.waiting or stats.free_pages != stats.pages:
        await asyncio.sleep(0.01)
        stats = await engine.stats()


def pid_of(core: Supervisor) -> int | None:
    child = core._child
    return None if child is None or not core._is_up else child.pid


@pytest.mark.parametrize("in_flight", [1, 2])
def test_streams_go_on_over_kills_at_random_moments(in_flight: int, capsys: pytest.CaptureFixture[str]) -> None:
    kills, count, length = (10, 64, 300) if in_flight == 1 else (3, 64, 100)
    draw = random.Random(7 + in_flight)

    async def main() -> tuple[list[Heard], list[float], int]:
        core = supervisor({"delay": 0.004, "in_flight": in_flight})
        all_heard = [Heard() for _ in range(count)]
        moments = []
        async with engine_over(core) as engine:
            readers = [
                asyncio.create_task(
                    listen(
                        engine, f"stream {index}", SamplingParams(max_tokens=length, output_kind=DELTA), str(index), h
                    )
                )
                for index, h in enumerate(all_heard)
            ]
            for _ in range(kills):
                restarts = core.restarts
                moment = sum(len(heard.tokens) for heard in all_heard) + draw.randint(1, 10 * count)
                await when(
                    lambda moment=moment: (
                        sum(len(heard.tokens) for heard in all_heard) >= moment
                        or all(reader.done() for reader in readers)
                    )
                )
                await when(lambda: pid_of(core) is not None)
                if all(reader.done() for reader in readers):
                    break
                moments.append(time.monotonic())
                os.kill(pid_of(core), signal.SIGKILL)
                await when(lambda before=restarts: core.restarts > before)
            await asyncio.gather(*readers)
        return all_heard, moments, core.restarts

    all_heard, moments, restarts = asyncio.run(main())
    lost = sum(length - len(heard.tokens) for heard in all_heard)
    pauses = []
    for heard in all_heard:
        for moment in moments:
            later = next((at for at in heard.times if at > moment), None)
            if later is not None:
                pauses.append(later - moment)
    pauses.sort()
    with capsys.disabled():
        print(
            f"\n{len(moments)} kills, {count} streams, tokens lost {lost}, pause median "
            f"{statistics.median(pauses):.2f} s, p99 {pauses[int(len(pauses) * 0.99)]:.2f} s ({in_flight} in flight)"
        )
    assert restarts == len(moments) >= 3
    for index, heard in enumerate(all_heard):
        assert heard.tokens == expected(f"stream {index}", length), f"stream {index} differs"
        assert heard.text.encode() == bytes(heard.tokens) and heard.reason == "length" and heard.error is None


def test_a_hang_is_noticed_and_ended(tmp_path: Path) -> None:
    async def main() -> None:
        core = supervisor({"delay": 0.002, "flag": str(tmp_path / "hung")}, Patience(silence=SILENCE))
        async with engine_over(core) as engine:
            params = SamplingParams(max_tokens=40, output_kind=DELTA)
            names = ["hang once", "another", "third"]
            found = [Heard() for _ in names]
            await asyncio.gather(*(listen(engine, name, params, name, h) for name, h in zip(names, found, strict=True)))
            assert core.restarts == 1
            for name, heard in zip(names, found, strict=True):
                assert heard.tokens == expected(name, 40)
            # An idle engine is not taken for one that hangs.
            await asyncio.sleep(SILENCE + 0.5)
            heard = Heard()
            await listen(engine, "later", params, "later", heard)
            assert heard.tokens == expected("later", 40) and core.restarts == 1

    asyncio.run(main())


@pytest.mark.parametrize(("poison", "most"), [("poison", 12), ("hang always", 8), ("fault", 2)])
def test_a_poisonous_request_ends_alone(poison: str, most: int, tmp_path: Path) -> None:
    async def main() -> None:
        core = supervisor({"delay": 0.002, "flag": str(tmp_path / "f")}, Patience(silence=SILENCE, first_pause=0.05))
        async with engine_over(core) as engine:
            params = SamplingParams(max_tokens=120, output_kind=DELTA)
            names = [f"innocent {index}" for index in range(7)]
            found = {name: Heard() for name in names}
            tasks = [asyncio.create_task(listen(engine, name, params, name, found[name])) for name in names]
            await when(lambda: all(heard.tokens for heard in found.values()))
            bad = Heard()
            await listen(engine, poison, params, "bad", bad)
            assert bad.reason == "error" and bad.error == QUARANTINED
            assert not bad.tokens
            await asyncio.gather(*tasks)
            for name, heard in found.items():
                assert heard.tokens == expected(name, 120) and heard.error is None
            assert 2 <= core.restarts <= most
            # The engine is as good as new.
            heard = Heard()
            await listen(engine, "later", params, "later", heard)
            assert heard.tokens == expected("later", 120)
            await all_free(engine)

    asyncio.run(main())


def test_a_request_that_fails_by_itself_needs_no_restart() -> None:
    async def main() -> None:
        core = supervisor({})
        async with engine_over(core) as engine:
            bad, good = Heard(), Heard()
            params = SamplingParams(max_tokens=20, output_kind=DELTA)
            await asyncio.gather(listen(engine, "broken", params, "a", bad), listen(engine, "well", params, "b", good))
            assert bad.reason == "error" and "broken by its prompt" in (bad.error or "")
            assert good.tokens == expected("well", 20) and core.restarts == 0

    asyncio.run(main())


def test_the_same_as_in_one_process() -> None:
    """Stop strings, several completions, logprobs, wrong requests, aborts and the cache's reset, over the boundary."""

    async def outputs(engine: AsyncEngine) -> list[Any]:
        found: list[Any] = []
        text = "".join(map(chr, expected("hello", 30)))
        for params in (
            SamplingParams(max_tokens=30),
            SamplingParams(max_tokens=30, stop=[text[10:13]]),
            SamplingParams(max_tokens=10, n=3, seed=4),
            SamplingParams(max_tokens=5, logprobs=2, output_kind=DELTA),
            SamplingParams(max_tokens=30, stop_token_ids=[ord(text[5])], bad_words=["xyz"]),
        ):
            told = [output.outputs async for output in engine.generate("hello", params, "one")]
            last = {o.index: o for part in told for o in part}  # those that change together come together
            found.append(
                [(o.text, o.token_ids, o.finish_reason, o.stop_reason, o.logprobs) for _, o in sorted(last.items())]
            )
            if params.output_kind is DELTA:  # how many tokens come together is a matter of time
                found[-1] = [sum(part, []) for part in zip(*((o.token_ids, o.logprobs) for [o] in told), strict=True)]
        for prompt, params in (("", None), ("x" * 1000, None), ("x", SamplingParams(extra_args={"a": "\ud800"}))):
            try:
                async for output in engine.generate(prompt, params, "two"):
                    found.append(output.outputs[0].finish_reason)
            except (ValidationError, CapacityError) as error:
                found.append(type(error).__name__)
        return found

    async def main() -> None:
        async with AsyncEngine(byte_engine(mixer, Shape(max_model_len=MAX_MODEL_LEN, num_pages=4000))) as plain:
            wanted = await outputs(plain)
        core = supervisor({"delay": 0.01})
        async with engine_over(core) as engine:
            found = await outputs(engine)
            assert found[:-1] == wanted[: len(found) - 1] and found[-1] == "ValidationError"
            heard = Heard()
            reader = asyncio.create_task(listen(engine, "long", SamplingParams(max_tokens=390), "long", heard))
            await when(lambda: heard.tokens)
            assert (await engine.stats()).running == 1
            await engine.abort("long")
            await reader
            assert heard.reason == "abort"
            assert await engine.reset_prefix_cache()
            await all_free(engine)

    asyncio.run(main())


def test_figures_go_on_over_a_death() -> None:
    async def main() -> None:
        core = supervisor({"delay": 0.002})
        async with engine_over(core) as engine:
            params = SamplingParams(max_tokens=50, output_kind=DELTA)
            await listen(engine, "one", params, "1", Heard())
            before = await engine.stats()
            os.kill(pid_of(core) or 0, signal.SIGKILL)
            await when(lambda: core.restarts == 1 and core.phase == "ready")
            await listen(engine, "two", params, "2", Heard())
            after = await engine.stats()
            assert before.generated_tokens == 50 and after.generated_tokens == 100
            assert after.steps > before.steps and after.finished == {"length": 2}

    asyncio.run(main())


def test_a_start_that_fails_raises_its_own_error() -> None:
    with pytest.raises(ModelNotFoundError, match="as the test wants it"):
        supervisor({"fail": "ModelNotFoundError"}).start()
    with pytest.raises(EngineError, match="ArithmeticError: as the test wants it"):
        supervisor({"fail": "ArithmeticError"}).start()


def test_a_system_that_has_no_file_left_is_an_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the supervisor tries again, as any other."""

    def none_left() -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("quire.engine.child.new_file", none_left)
    with pytest.raises(EngineError, match="Too many open files"):
        ChildProcess(CHILD)


def test_an_engine_beyond_repair_tells_everybody(tmp_path: Path) -> None:
    async def main() -> None:
        flag = tmp_path / "die"
        core = supervisor({"delay": 0.02, "die": str(flag)}, Patience(failed_starts=3, first_pause=0.01))
        async with engine_over(core) as engine:
            heard = Heard()
            params = SamplingParams(max_tokens=390, output_kind=DELTA)
            reader = asyncio.create_task(listen(engine, "x", params, "x", heard))
            await when(lambda: heard.tokens)
            flag.touch()
            os.kill(pid_of(core) or 0, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="could not be started 3 times"):
                await reader
            assert not engine.is_running
            with pytest.raises(EngineDeadError):
                await engine.check_health()

    asyncio.run(main())


def test_the_process_ends_with_its_parent() -> None:
    core = supervisor({})
    core.start()
    child = core._child
    assert child is not None
    os.kill(child.pid, signal.SIGTERM)  # left to the parent, which drains
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.2)
    assert child._process.poll() is None
    core.close()
    assert child._process.returncode == 0


@pytest.mark.parametrize("spare_dies", [False, True])
def test_the_spare_process_takes_over(spare_dies: bool) -> None:
    async def main() -> None:
        core = supervisor({"delay": 0.002}, Patience(spare_after=0.0))
        async with engine_over(core) as engine:
            heard = Heard()
            params = SamplingParams(max_tokens=390, output_kind=DELTA)
            reader = asyncio.create_task(listen(engine, "x", params, "x", heard))
            await when(lambda: core._spare.process is not None and heard.tokens)
            spare, before = core._spare.process, pid_of(core)
            assert spare is not None and spare.pid != before
            if spare_dies:
                spare.kill()
            os.kill(before or 0, signal.SIGKILL)
            await when(lambda: pid_of(core) not in (None, before))
            assert (pid_of(core) == spare.pid) is not spare_dies
            await reader
            assert heard.tokens == expected("x", 390) and core.restarts == 1
            await when(lambda: core._spare.process is not None)
            last = core._spare.process
        assert last is not None and not last.is_alive

    asyncio.run(main())


def test_a_server_with_many_connections_restarts_its_engine() -> None:
    """Descriptors above 1023, which select() does not take."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)) if hard > 0 else 4096, hard))
    taken = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]

    async def main() -> None:
        core = supervisor({"delay": 0.002})
        async with engine_over(core) as engine:
            heard = Heard()
            reader = asyncio.create_task(
                listen(engine, "x", SamplingParams(max_tokens=100, output_kind=DELTA), "x", heard)
            )
            await when(lambda: heard.tokens)
            os.kill(pid_of(core) or 0, signal.SIGKILL)
            await reader
            assert heard.tokens == expected("x", 100)
            await when(lambda: core.restarts == 1)

    try:
        asyncio.run(main())
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_step_makes_crosses_the_boundary_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One message a step, however many streams it is for."""
    receive, streams, tokens, crossed = wire.Connection.receive, 64, 100, Counter[str]()

    def counted(connection: wire.Connection[Any]) -> list[Any]:
        messages = receive(connection)
        crossed.update(type(message).__name__ for message in messages)
        return messages

    async def main() -> int:
        async with engine_over(supervisor({"delay": 0.01})) as engine:
            params, found = SamplingParams(max_tokens=tokens, output_kind=DELTA), [Heard() for _ in range(streams)]
            await asyncio.gather(*(listen(engine, "x", params, str(index), heard) for index, heard in enumerate(found)))
            assert all(len(heard.tokens) == tokens for heard in found)
            return (await engine.stats()).steps

    monkeypatch.setattr(wire.Connection, "receive", counted)
    steps = asyncio.run(main())
    assert crossed["Stepped"] <= steps + streams and sum(crossed.values()) < streams * tokens / 10, (steps, crossed)

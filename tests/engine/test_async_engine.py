"""AsyncEngine: many coroutines over one engine; cancelling, aborting, errors and endings reach the right one."""

from __future__ import annotations

import asyncio

import pytest
from bytes_engine import Shape, byte_engine, mixer, speaker

from quire.core.params import RequestOutputKind, SamplingParams
from quire.core.stats import Stats
from quire.engine.async_engine import LONG_TEXT, TOLD_AT_ONCE, AsyncEngine, together
from quire.engine.executor import FakeExecutor
from quire.engine.observe import StepFigures
from quire.errors import EngineDeadError, ValidationError

DELTA = RequestOutputKind.DELTA
FINAL = RequestOutputKind.FINAL_ONLY
STEP = 0.05  # seconds
ENDLESS = 190  # tokens, all that there is room for: ten seconds on the fastest machine


async def last_of(engine: AsyncEngine, prompt, params, request_id: str):
    output = None
    async for item in engine.generate(prompt, params, request_id):
        output = item
    return output


async def settle(engine: AsyncEngine) -> None:
    """Wait until nothing runs or waits."""
    stats = await engine.stats()
    while stats.running or stats.waiting:
        stats = await engine.stats()


async def begun(engine: AsyncEngine) -> None:
    """Wait until a request has a token."""
    while not (await engine.stats()).generated_tokens:
        await asyncio.sleep(0.001)


def test_where_one_of_several_fails_the_others_have_ended() -> None:
    ended: list[str] = []

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append("cleaned up")

    async def failing() -> None:
        await asyncio.sleep(0)
        raise ValueError

    with pytest.raises(ValueError):
        asyncio.run(together([lasting(), failing(), lasting()]))
    assert ended == ["cleaned up"] * 2


def test_streams_side_by_side():
    async def main():
        async with AsyncEngine(byte_engine(speaker("hello"), Shape(max_in_flight=2))) as engine:
            texts: dict[int, list[str]] = {index: [] for index in range(20)}

            async def read(index: int) -> None:
                params = SamplingParams(max_tokens=9, output_kind=DELTA)
                async for output in engine.generate("?", params, str(index)):
                    texts[index].append(output.outputs[0].text)

            await asyncio.gather(*(read(index) for index in texts))
            return texts

    assert all("".join(pieces) == "hello" and len(pieces) > 2 for pieces in asyncio.run(main()).values())


def test_more_streams_than_are_told_of_at_once():
    count = TOLD_AT_ONCE * 2 + 1

    class Counting:
        tokens = 0

        def observe(self, stats: Stats, figures: StepFigures) -> None:
            self.tokens += figures.generation_tokens

    async def main():
        shape = Shape(num_pages=3 * count, max_num_seqs=count, max_num_batched_tokens=count)
        engine = byte_engine(speaker("hello"), shape)
        engine.observer = counting = Counting()
        async with AsyncEngine(engine) as running:
            params = SamplingParams(max_tokens=9, output_kind=DELTA)
            texts: dict[str, str] = {}

            async def read(name: str) -> None:
                async for output in running.generate("?", params, name):
                    texts[name] = texts.get(name, "") + output.outputs[0].text

            await asyncio.gather(*(read(str(index)) for index in range(count)))
            return texts, counting.tokens

    texts, tokens = asyncio.run(main())
    assert len(texts) == count and set(texts.values()) == {"hello"}
    assert tokens == count * len("hello ")  # and the end


def test_only_the_last_output_is_finished():
    async def main():
        async with AsyncEngine(byte_engine(speaker("hello"))) as engine:
            return [output.finished async for output in engine.generate("?", None, "a")]

    flags = asyncio.run(main())
    assert flags == [False] * (len(flags) - 1) + [True]


def test_cancelling_the_reader_aborts_the_request():
    async def main():
        executor = FakeExecutor(mixer, delay=STEP)
        async with AsyncEngine(byte_engine(executor)) as engine:
            params = SamplingParams(max_tokens=ENDLESS, output_kind=FINAL)
            reader = asyncio.create_task(last_of(engine, "x", params, "a"))
            await begun(engine)
            assert (await engine.stats()).running == 1
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
            await settle(engine)
            assert (await engine.stats()).finished == {"abort": 1}
            # The id is free again.
            output = await last_of(engine, "x", SamplingParams(max_tokens=2), "a")
            assert output.outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_leaving_the_loop_aborts_the_request():
    async def main():
        async with AsyncEngine(byte_engine(FakeExecutor(mixer, delay=STEP))) as engine:
            stream = engine.generate("x", SamplingParams(max_tokens=ENDLESS, output_kind=DELTA), "a")
            async for _ in stream:
                break
            await stream.aclose()
            await settle(engine)

    asyncio.run(main())


def test_an_explicit_abort_gives_a_last_output():
    async def main():
        async with AsyncEngine(byte_engine(FakeExecutor(mixer, delay=STEP))) as engine:
            params = SamplingParams(max_tokens=ENDLESS, output_kind=FINAL)
            reader = asyncio.create_task(last_of(engine, "x", params, "a"))
            await begun(engine)
            await engine.abort("a")
            output = await reader
            assert output.finished and output.outputs[0].finish_reason == "abort"
            assert len(output.outputs[0].token_ids) > 0

    asyncio.run(main())


def test_wrong_requests_raise_in_their_own_coroutine():
    async def main():
        async with AsyncEngine(byte_engine(FakeExecutor(mixer, delay=STEP))) as engine:
            good = asyncio.create_task(last_of(engine, "x", SamplingParams(max_tokens=ENDLESS), "a"))
            await begun(engine)
            with pytest.raises(ValidationError, match="cannot be empty"):
                await last_of(engine, "", None, "b")
            with pytest.raises(ValidationError, match="already running"):
                await last_of(engine, "x", None, "a")
            with pytest.raises(ValidationError, match="longer than the maximum model length"):
                await last_of(engine, "x" * (LONG_TEXT + 1), None, "c")
            with pytest.raises(ValidationError, match="must be SamplingParams, found dict"):
                await last_of(engine, "x", {"max_tokens": 3}, "d")
            await engine.abort("a")
            assert (await good).outputs[0].finish_reason == "abort"

    asyncio.run(main())


def test_a_request_that_fails_while_running_ends_with_its_error():
    def model(tokens: tuple[int, ...]) -> int:
        if tokens[0] == ord("!"):
            raise ArithmeticError("broken")
        return mixer(tokens)

    async def main():
        async with AsyncEngine(byte_engine(model)) as engine:
            bad, good = await asyncio.gather(last_of(engine, "!", None, "a"), last_of(engine, "?", None, "b"))
            assert bad.outputs[0].finish_reason == "error" and "broken" in bad.outputs[0].error
            assert good.outputs[0].finish_reason == "length"
            await engine.check_health()

    asyncio.run(main())


def test_closing_ends_streams_and_refuses_new_ones():
    async def main():
        engine = AsyncEngine(byte_engine(FakeExecutor(mixer, delay=STEP)))
        with pytest.raises(EngineDeadError, match="never started"):
            await last_of(engine, "x", None, "early")
        engine.start()
        reader = asyncio.create_task(last_of(engine, "x", SamplingParams(max_tokens=ENDLESS), "a"))
        await begun(engine)
        await engine.close()
        assert (await reader).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineDeadError):
            await last_of(engine, "x", None, "b")
        assert not engine.is_running

    asyncio.run(main())


def test_an_engine_that_dies_tells_everybody():
    async def main():
        inner = byte_engine(FakeExecutor(mixer, delay=STEP))
        async with AsyncEngine(inner) as engine:
            reader = asyncio.create_task(last_of(engine, "x", SamplingParams(max_tokens=ENDLESS), "a"))
            await begun(engine)

            def broken(at_most: int) -> list:
                raise MemoryError("no more")

            inner.step = broken
            with pytest.raises(EngineDeadError, match="no more"):
                await reader
            with pytest.raises(EngineDeadError, match="no more"):
                await engine.check_health()
            with pytest.raises(EngineDeadError, match="no more"):
                await last_of(engine, "x", None, "b")

    asyncio.run(main())


def test_a_call_that_fails_raises_at_the_caller():
    async def main():
        async with AsyncEngine(byte_engine(mixer)) as engine:
            with pytest.raises(ZeroDivisionError):
                await engine.call(lambda: 1 // 0)
            assert await engine.reset_prefix_cache() is True

    asyncio.run(main())


def test_two_event_loops_share_an_engine():
    """The engine's thread wakes each coroutine in its own loop."""
    engine = AsyncEngine(byte_engine(speaker("hey")))
    engine.start()
    first = asyncio.run(last_of(engine, "?", SamplingParams(output_kind=FINAL), "a"))
    second = asyncio.run(last_of(engine, "?", SamplingParams(output_kind=FINAL), "b"))
    assert first.outputs[0].text == second.outputs[0].text == "hey"
    asyncio.run(engine.close())

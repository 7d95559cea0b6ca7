"""More requests than can be done, and two keys of which one floods. Counted, not timed; ten minutes of it: `make soak`."""

from __future__ import annotations

import asyncio

import pytest
from overload import TOKENS, crowd, fake_server, jain

pytestmark = pytest.mark.slow

ROWS, QUEUE, STEPS = 4, 8, 60.0  # six answers a second, fewer than any machine can ask for


def test_more_requests_than_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    """What is taken is done, the rest is refused with a time to come back, and the server is well all the time."""
    with fake_server(STEPS, ROWS, "--max-num-queued-reqs", str(QUEUE), "--no-engine-spare") as server:
        load = asyncio.run(crowd(server, {"": 3 * (ROWS + QUEUE)}, 30))[""]
    with capsys.disabled():
        print(f"\n{load.statuses[200]} requests answered, {load.statuses.total() - load.statuses[200]} refused")
    assert set(load.statuses) <= {200, 429, 503} and not load.without_retry
    assert load.statuses.total() > load.statuses[200], "it was no overload"
    assert load.tokens == TOKENS * load.statuses[200]


def test_a_key_that_floods_takes_nothing_from_another(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--scheduling-policy", "fair", "--api-key", "key0", "key1", "--no-engine-spare")
    with fake_server(STEPS / 2, ROWS, *flags) as server:  # the lesser one alone fills the engine and a queue
        loads = asyncio.run(crowd(server, {"key0": 20 * ROWS, "key1": 4 * ROWS}, 60, tokens=10))
    got = [load.tokens for load in loads.values()]
    with capsys.disabled():
        print(f"\ntwo keys, one with five times the clients: {got[0]} and {got[1]} tokens, Jain index {jain(got):.3f}")
    assert jain(got) > 0.9

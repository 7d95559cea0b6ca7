"""Twice as many requests as can be done, and two keys of which one floods. Ten minutes of it: `make soak`."""

from __future__ import annotations

import asyncio

import pytest
from overload import STEPS, fake_server, jain, line, run, two_tenants

pytestmark = pytest.mark.slow


def test_twice_as_many_requests_as_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    most, load = run(12.0)
    with capsys.disabled():
        print("\n" + line(most, load))
    assert load.goodput > 0.85 * most.goodput, "0.9 is asked for on a quiet machine"
    assert load.statuses[503] + load.statuses[429] > load.statuses[200] / 4, "it was no overload"
    assert not load.without_retry and set(load.statuses) <= {200, 429, 503}
    assert max(load.descriptors[2:]) < 200 and load.memory[-1] - load.memory[3] < 20
    assert load.health_p99() < 250, "50 is asked for on a quiet machine"


def test_a_key_that_floods_takes_nothing_from_another(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--scheduling-policy", "fair", "--api-key", "key0", "key1", "--no-engine-spare")
    with fake_server(STEPS, 16, *flags) as server:
        got = asyncio.run(two_tenants(server, 10.0))
    with capsys.disabled():
        print(f"\ntwo keys, one with ten times the clients: {got[0]} and {got[1]} tokens, Jain index {jain(got):.3f}")
    assert jain(got) > 0.95 and min(got) > 100

"""A fault at any call of a step is noticed by one request at most; allocations that fail hurt nobody else either.

Here some of the sites; all of them: `make soak`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fault_rig import Rig, Tally, find_sites, moments, try_faults
from faults import Faults
from tiny import write_tiny

EVERY = 97  # of the sites, one of so many


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Each fault is logged with its traceback."""
    logging.disable(logging.CRITICAL)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def test_a_fault_at_any_call_is_noticed_by_one_request_at_most(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> Tally:
        rig = Rig(write_tiny(tmp_path), Faults())
        with rig.faults.watching():
            rig.start()
        sites, healthy = await find_sites(rig)
        picked = list(sites)[::EVERY]
        tally = Tally(sites=len(sites))
        await try_faults(rig, [(site, moments(sites[site])[-1]) for site in picked], healthy, tally)
        # What the sample may have missed, and what matters most: the whole step, in its beginning, middle and end.
        names = ("Runner.run", "Sampler.choose", "Scheduler.apply", "Scheduler.schedule", "step_message", "event_of")
        names += ("Supervisor._stepped", "Engine._take", "Engine._note_news", "AsyncEngine._deliver")
        names += ("NotedExecutor.submit", "gather")
        named = [site for site in sites if site.name in names]
        assert len(named) == len(names), {site.name for site in named}
        await try_faults(rig, [(site, moments(sites[site])[1]) for site in named], healthy, tally)
        await rig.close()
        return tally

    tally = asyncio.run(main())
    with capsys.disabled():
        print("\n" + tally.line())
    assert not tally.hurt, tally.hurt
    assert tally.fired > len(list(range(0, tally.sites, EVERY))) // 2 and tally.restarts

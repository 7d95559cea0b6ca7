"""The picture of the pages: whose each is, what is known, who waits."""

from __future__ import annotations

from collections import Counter

from quire.core.options import SchedulerOptions
from quire.core.params import SamplingParams
from quire.core.picture import BLANK, CACHED, FIRST_OWNER, SHARED, Picture
from quire.core.plan import GroupSpec, SpanResult, StepResult
from quire.core.request import CoreRequest
from quire.core.scheduler import Scheduler


def scheduler() -> Scheduler:
    return Scheduler(
        SchedulerOptions(
            groups=(GroupSpec("full", 4, 33),), max_num_seqs=2, max_num_batched_tokens=64, max_model_len=64
        )
    )


def step(running: Scheduler) -> None:
    plan = running.schedule()
    assert plan is not None
    running.apply(plan, StepResult(plan.step, tuple(SpanResult(span.slot, tokens=(7,)) for span in plan.spans)))


def marks(picture: Picture) -> Counter[int]:
    found: Counter[int] = Counter()
    for mark, count in picture.groups[0].runs:
        found[mark] += count
    return found


def request(name: str, tokens: range, most: int) -> CoreRequest:
    return CoreRequest(name, tuple(tokens), SamplingParams(max_tokens=most, ignore_eos=True), seed=0)


def test_a_page_is_blank_owned_shared_or_cached() -> None:
    found = scheduler()
    assert marks(found.picture()) == {BLANK: 32}
    found.add(request("first", range(10), 3))
    step(found)
    assert marks(found.picture()) == {FIRST_OWNER: 3, BLANK: 29}
    found.add(request("second", range(12), 9))
    found.add(request("third", range(20, 25), 4))
    step(found)
    picture = found.picture()
    assert marks(picture) == {SHARED: 2, FIRST_OWNER: 1, FIRST_OWNER + 1: 1, BLANK: 28}
    assert [(each.request_id, each.is_running) for each in picture.requests] == [
        ("first", True),
        ("second", True),
        ("third", False),
    ]
    assert picture.requests[1].cached == 10 and picture.requests[1].computed == 12 and picture.requests[0].limit == 13
    while found.has_work():
        step(found)
    assert marks(found.picture()) == {CACHED: 2 + 1 + 3 + 2, BLANK: 24} and found.picture().requests == ()

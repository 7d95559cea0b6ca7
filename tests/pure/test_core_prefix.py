"""The scheduler and its pages: preemption, admission, windows, the prefix cache, states."""

from __future__ import annotations

import pytest
from core_steps import FULL, ask, finish, land, make, shape, step

from quire.core.plan import GroupSpec, PageCopy

# ---- pages


def test_the_youngest_is_preempted_and_comes_back_where_it_was() -> None:
    scheduler = make(GroupSpec("full", 4, 8))  # seven pages; both want to grow to five
    ask(scheduler, "old", 10, out=10)
    ask(scheduler, "young", 6, out=10)
    events = []
    while not scheduler.stats().preemptions:
        events += land(scheduler, scheduler.schedule())
    assert scheduler.stats().waiting == 1
    generated = sum(len(event.tokens) for event in events if event.request_id == "young")
    events += finish(scheduler)
    ends = {event.request_id: event for event in events if event.finish_reason}
    assert (ends["old"].preemptions, ends["young"].preemptions) == (0, 1)
    assert sum(len(event.tokens) for event in events if event.request_id == "young") == 10 > generated > 0
    assert scheduler.stats().free_pages == (7,)


def test_a_preempted_request_finds_its_own_pages_again() -> None:
    scheduler = make(GroupSpec("full", 4, 10))
    ask(scheduler, "old", 15, out=16)
    ask(scheduler, "young", 10, out=8)
    while not scheduler.stats().preemptions:
        step(scheduler)
    hits = scheduler.stats().cache_hits
    finish(scheduler)
    assert scheduler.stats().cache_hits > hits


def test_the_least_urgent_is_preempted() -> None:
    scheduler = make(GroupSpec("full", 4, 8), policy="priority")
    ask(scheduler, "early", 8, out=12, priority=5, arrival=1.0)
    ask(scheduler, "urgent", 8, out=12, priority=1, arrival=2.0)
    ends = {event.request_id: event for event in finish(scheduler) if event.finish_reason}
    assert ends["urgent"].preemptions == 0 < ends["early"].preemptions


def test_a_request_is_admitted_only_if_its_whole_prompt_has_room() -> None:
    scheduler = make(GroupSpec("full", 4, 11), max_num_batched_tokens=8)
    ask(scheduler, "a", 24, out=4)  # six pages of ten, taken two by two
    ask(scheduler, "b", 16, out=4)  # four, but one is to stay free for growing
    step(scheduler)
    assert scheduler.stats().free_pages == (8,)
    step(scheduler)
    step(scheduler)
    assert scheduler.stats().waiting == 1
    finish(scheduler)
    assert scheduler.stats().preemptions == 0


def test_a_window_group_gives_back_what_left_the_window() -> None:
    scheduler = make(GroupSpec("window", 4, 5, window=6))
    ask(scheduler, "a", 30, out=50)
    while scheduler.has_work():
        plan = scheduler.schedule()
        for grant in plan.grants:
            assert 0 not in grant.pages
        land(scheduler, plan)
    assert scheduler.stats().finished == {"length": 1}


# ---- the prefix cache


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = make()
    prompt = tuple(range(10, 23))
    ask(scheduler, "a", prompt, out=1)
    plan = step(scheduler)
    pages = plan.grants[0].pages
    ask(scheduler, "b", prompt, out=1)
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 12, 1, True)]
    assert plan.grants[0].index == 0 and plan.grants[0].pages[:3] == pages[:3]
    (event,) = land(scheduler, plan)
    assert event.cached_tokens == 12
    assert (scheduler.stats().cached_tokens, scheduler.stats().prompt_tokens) == (12, 26)


def test_a_hit_leaves_at_least_the_last_token() -> None:
    scheduler = make()
    prompt = tuple(range(10, 22))
    for name in "ab":
        ask(scheduler, name, prompt, out=1)
        plan = step(scheduler)
    assert shape(plan) == [(0, 8, 4, True)]


def test_generated_pages_are_known_too() -> None:
    scheduler = make()
    prompt = tuple(range(10, 15))
    ask(scheduler, "a", prompt, out=9)
    finish(scheduler)
    ask(scheduler, "b", (*prompt, *[5] * 9, 77), out=1)
    assert shape(step(scheduler)) == [(0, 12, 3, True)]


@pytest.mark.parametrize("salts", [(b"a", b"b"), (b"a", b"a")])
def test_salt_keeps_tenants_apart(salts: tuple[bytes, bytes]) -> None:
    scheduler = make()
    for name, salt in zip("ab", salts, strict=True):
        ask(scheduler, name, tuple(range(10, 23)), out=1, salt=salt)
        plan = step(scheduler)
    assert plan.spans[0].start == (12 if salts[0] == salts[1] else 0)


def test_two_requests_with_one_beginning_compute_it_once() -> None:
    scheduler = make(max_in_flight=2, max_num_batched_tokens=32)
    stem = tuple(range(10, 26))
    for name in "abc":
        ask(scheduler, name, (*stem, ord(name)), out=4)
    ask(scheduler, "other", 5)
    first = scheduler.schedule()
    assert [admission.request_id for admission in first.admitted] == ["a", "other"], "nobody else waits for that"
    land(scheduler, first)
    second = scheduler.schedule()
    assert [admission.request_id for admission in second.admitted] == ["b", "c"]
    assert [span.start for span in second.spans] == [17, 5, 16, 16]
    land(scheduler, second)
    finish(scheduler)


def test_reset_forgets_everything_and_says_whether_somebody_goes_on() -> None:
    scheduler = make()
    prompt = tuple(range(10, 23))
    ask(scheduler, "a", prompt, out=9)
    step(scheduler)
    assert scheduler.reset_prefix_cache() is False
    ask(scheduler, "b", prompt, out=1)
    assert [span.start for span in step(scheduler).spans] == [13, 0]
    finish(scheduler)
    assert scheduler.reset_prefix_cache() is True
    ask(scheduler, "c", prompt, out=1)
    assert step(scheduler).spans[0].start == 0


def test_switched_off_nothing_is_found() -> None:
    scheduler = make(enable_prefix_caching=False)
    for name in "ab":
        ask(scheduler, name, tuple(range(10, 23)), out=1)
        assert step(scheduler).spans[0].start == 0


def test_a_state_is_kept_at_the_last_full_page_of_the_prompt_and_taken_over() -> None:
    scheduler = make(FULL, GroupSpec("state", 4, 9))
    prompt = tuple(range(10, 24))
    ask(scheduler, "a", prompt, out=2)
    plan = step(scheduler)
    assert shape(plan) == [(0, 0, 12, False)]
    (live,) = (grant.pages[0] for grant in plan.grants if grant.group == 1)
    plan = step(scheduler)
    assert shape(plan) == [(0, 12, 2, True)]
    (copy,) = plan.copies
    assert (copy.group, copy.source) == (1, live)
    finish(scheduler)
    ask(scheduler, "b", (*prompt[:13], 99, 98), out=1)
    plan = step(scheduler)
    (fresh,) = (grant.pages[0] for grant in plan.grants if grant.group == 1)
    assert plan.copies == (PageCopy(1, copy.target, fresh),)
    assert plan.spans[0].start == 12


def test_a_begun_page_is_copied_and_then_belongs_to_one() -> None:
    """Three answers to one prompt: the first computes it, the others begin at its last token, each in its own page."""
    scheduler = make(GroupSpec("full", 4, 40))
    prompt = tuple(range(10, 21))
    for name in ("a", "b", "c"):
        ask(scheduler, name, prompt)
    assert shape(step(scheduler)) == [(0, 0, 11, True)]
    plan = scheduler.schedule()
    assert shape(plan)[1:] == [(1, 10, 1, True), (2, 10, 1, True)]
    first = plan.copies[0].source
    targets = [copy.target for copy in plan.copies]
    assert plan.copies == (PageCopy(0, first, targets[0]), PageCopy(0, first, targets[1]))
    assert len({first, *targets}) == 3
    granted = {grant.slot: grant.pages for grant in plan.grants if grant.slot}
    assert granted[1][:2] == granted[2][:2], "whole pages are shared"
    assert [granted[slot][2] for slot in (1, 2)] == targets
    land(scheduler, plan)
    assert scheduler.stats().cached_tokens == 20
    finish(scheduler)


def test_a_request_that_ended_leaves_its_begun_page() -> None:
    """As beams need it: the next request is the same and one token more, and computes that one alone."""
    prompt = tuple(range(10, 21))
    for salt, starts in ((b"", 11), (b"else", 0)):
        scheduler = make(GroupSpec("full", 4, 40))
        ask(scheduler, "a", prompt, out=1)
        first = scheduler.schedule()
        page = first.grants[0].pages[2]
        land(scheduler, first)
        assert not scheduler.stats().running
        for name in ("b", "c"):
            ask(scheduler, name, (*prompt, 50), out=1, salt=salt)
        plan = scheduler.schedule()
        assert plan.spans[0][1:3] == (starts, 12 - starts)
        if not salt:
            targets = {copy.target for copy in plan.copies}
            assert {copy.source for copy in plan.copies} <= {page} and len(targets) == len(plan.copies)
        land(scheduler, plan)
        finish(scheduler)
    ask(scheduler, "d", (*prompt[:-1], 60), out=1)
    assert scheduler.schedule().spans[0].start == 8  # whole pages only: what was left behind is another text


def test_what_differs_is_not_copied() -> None:
    prompt = tuple(range(10, 21))
    for other, salt, starts in ((prompt[:9] + (99, 98), b"", 9), (prompt, b"else", 0), ((1, *prompt[1:]), b"", 0)):
        scheduler = make(GroupSpec("full", 4, 40))
        ask(scheduler, "a", prompt)
        step(scheduler)
        ask(scheduler, "b", other, salt=salt)
        assert shape(scheduler.schedule())[1][1] == starts
    scheduler = make(GroupSpec("full", 4, 40), enable_prefix_caching=False)
    ask(scheduler, "a", prompt)
    step(scheduler)
    ask(scheduler, "b", prompt)
    assert shape(scheduler.schedule())[1][1] == 0

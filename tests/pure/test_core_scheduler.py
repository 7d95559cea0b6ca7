"""The scheduler's decisions, one at a time. What they add up to is the simulation's business."""

from __future__ import annotations

import itertools

import pytest
from core_steps import ask, finish, land, make, say, shape, step

from quire.core.params import PoolingParams, SamplingParams
from quire.core.plan import GroupSpec, Span, SpanResult, TokenLogprobs
from quire.errors import CapacityError, ConfigError, ValidationError

# ---- catching up


def test_a_request_from_its_prompt_to_its_end() -> None:
    times = itertools.count(100.0)
    scheduler = make(clock=lambda: next(times))
    ask(scheduler, "a", (1, 2, 3, 4, 6), out=2, arrival=99.0)
    plan = scheduler.schedule()
    assert plan.admitted[0].token_ids == (1, 2, 3, 4, 6) and plan.admitted[0].prompt_len == 5
    assert [(grant.index, len(grant.pages)) for grant in plan.grants] == [(0, 2)]
    assert shape(plan) == [(0, 0, 5, True)]
    assert plan.num_tokens == 5
    (event,) = land(scheduler, plan)
    assert (event.request_id, event.tokens, event.finish_reason) == ("a", (5,), None)
    assert event.times == {"arrival": 99.0, "scheduled": 100.0, "first_token": 101.0}
    plan = scheduler.schedule()
    assert shape(plan) == [(0, 5, 1, True)] and not plan.admitted and not plan.grants
    (event,) = land(scheduler, plan)
    assert (event.tokens, event.finish_reason, event.stop_reason) == ((5,), "length", None)
    assert set(event.times) == {"arrival", "scheduled", "first_token", "finished"}
    assert not scheduler.has_work() and scheduler.schedule() is None
    assert scheduler.stats().finished == {"length": 1}


def test_a_long_prompt_is_computed_in_chunks_beside_those_who_generate() -> None:
    scheduler = make(max_num_batched_tokens=8)
    ask(scheduler, "a", 3)
    step(scheduler)
    ask(scheduler, "b", 18)
    assert shape(step(scheduler)) == [(0, 3, 1, True), (1, 0, 7, False)]
    assert shape(step(scheduler)) == [(0, 4, 1, True), (1, 7, 7, False)]
    assert shape(step(scheduler)) == [(0, 5, 1, True), (1, 14, 4, True)]
    assert shape(step(scheduler)) == [(0, 6, 1, True), (1, 18, 1, True)]


def test_a_long_prompt_leaves_a_position_to_everybody_behind_it() -> None:
    scheduler = make(max_num_batched_tokens=8, policy="priority")
    for name in "ab":
        ask(scheduler, name, 2, priority=1)
    step(scheduler)
    ask(scheduler, "long", 40, priority=0)
    step(scheduler)
    assert shape(step(scheduler)) == [(2, 6, 6, False), (0, 3, 1, True), (1, 3, 1, True)]


def test_the_threshold_for_long_prompts_counts_only_in_company() -> None:
    scheduler = make(long_prefill_token_threshold=4)
    ask(scheduler, "a", 12)
    assert shape(step(scheduler)) == [(0, 0, 12, True)]
    ask(scheduler, "b", 12)
    assert shape(step(scheduler)) == [(0, 12, 1, True), (1, 0, 4, False)]


def test_without_chunks_a_prompt_waits_for_a_step_that_takes_it_whole() -> None:
    scheduler = make(chunked_prefill=False, max_num_batched_tokens=100)
    ask(scheduler, "a", 60)
    ask(scheduler, "b", 60)
    assert shape(step(scheduler)) == [(0, 0, 60, True)]
    assert shape(step(scheduler)) == [(0, 60, 1, True), (1, 0, 60, True)]


def test_no_more_requests_run_than_there_are_rows() -> None:
    scheduler = make(max_num_seqs=2)
    for name in "abc":
        ask(scheduler, name, 2, out=2)
    assert len(step(scheduler).spans) == 2
    assert scheduler.stats().waiting == 1
    step(scheduler)
    plan = step(scheduler)
    assert sorted(plan.released) == [0, 1]
    assert [admission.request_id for admission in plan.admitted] == ["c"]


# ---- one step ahead


def test_a_step_is_planned_while_one_runs() -> None:
    scheduler = make(max_in_flight=2)
    ask(scheduler, "a", 4, out=3)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shape(first) == [(0, 0, 4, True)]
    assert shape(second) == [(0, 4, 1, True)]
    assert scheduler.schedule() is None, "two are in flight"
    land(scheduler, first)
    third = scheduler.schedule()
    assert shape(third) == [(0, 5, 1, True)]
    land(scheduler, second)
    assert scheduler.schedule() is None, "the third token ends it"
    (event,) = land(scheduler, third)
    assert event.finish_reason == "length"
    assert not scheduler.has_work()


def test_what_was_planned_behind_the_end_is_dropped() -> None:
    scheduler = make(max_in_flight=2)
    ask(scheduler, "a", 4, params=SamplingParams(max_tokens=9, stop_token_ids=[5]))
    first, second = scheduler.schedule(), scheduler.schedule()
    (event,) = land(scheduler, first)
    assert (event.finish_reason, event.stop_reason, event.tokens) == ("stop", 5, (5,))
    ask(scheduler, "b", 4, out=1)
    third = scheduler.schedule()
    assert third.released == (0,) and third.admitted[0].slot == 0
    assert land(scheduler, second) == [], "row 0 is another's now, and this result is not its own"
    assert [event.request_id for event in land(scheduler, third)] == ["b"]


def test_results_of_an_earlier_life_are_dropped() -> None:
    # Three in flight: a request is preempted and admitted again while its first life is still being computed.
    scheduler = make(max_in_flight=3, enable_prefix_caching=False)
    ask(scheduler, "a", 8, out=12)
    ask(scheduler, "b", 8, out=12)
    early = scheduler.schedule()
    assert len(early.spans) == 2
    victim = scheduler._running[-1]
    scheduler._preempt(victim)
    again = scheduler.schedule()
    assert again.admitted[0].request_id == "b" and again.admitted[0].slot == 1
    assert [event.request_id for event in land(scheduler, early)] == ["a"]
    assert {event.request_id: event.tokens for event in land(scheduler, again)} == {"a": (5,), "b": (5,)}
    assert {event.request_id: event.preemptions for event in finish(scheduler)} == {"a": 0, "b": 1}


def test_results_must_come_in_order() -> None:
    scheduler = make(max_in_flight=2)
    ask(scheduler, "a", 4)
    scheduler.schedule()
    second = scheduler.schedule()
    with pytest.raises(AssertionError, match="order"):
        land(scheduler, second)


# ---- drafts


def test_drafts_are_verified_and_rejected_ones_subtracted() -> None:
    scheduler = make()
    ask(scheduler, "a", 4, out=20)
    step(scheduler, lambda span: SpanResult(span.slot, (5,), drafts=(6, 7, 8)))
    plan = scheduler.schedule()
    assert plan.spans == (Span(0, 4, 4, True, (6, 7, 8)),)
    (event,) = land(scheduler, plan, lambda span: SpanResult(span.slot, (6, 9)))
    assert event.tokens == (6, 9)
    assert shape(step(scheduler)) == [(0, 6, 1, True)]
    stats = scheduler.stats()
    assert (stats.drafts, stats.draft_tokens, stats.accepted_tokens) == (1, 3, 1)


def test_drafts_are_cut_at_the_limit_and_tokens_at_a_stop() -> None:
    scheduler = make()
    ask(scheduler, "a", 4, params=SamplingParams(max_tokens=4, stop_token_ids=[6]))
    step(scheduler, lambda span: SpanResult(span.slot, (5,), drafts=(1, 6, 3, 4, 5)))
    plan = scheduler.schedule()
    assert plan.spans[0].drafts == (1, 6), "three tokens are left, so two drafts and one more"
    (event,) = land(scheduler, plan, lambda span: SpanResult(span.slot, (1, 6, 3)))
    assert (event.tokens, event.finish_reason, event.stop_reason) == ((1, 6), "stop", 6)


def test_a_request_with_drafts_is_not_planned_ahead() -> None:
    scheduler = make(max_in_flight=2)
    ask(scheduler, "a", 4, out=20)

    def propose(span: Span) -> SpanResult:
        return SpanResult(span.slot, (5,), drafts=(1,))

    first, second = scheduler.schedule(), scheduler.schedule()
    land(scheduler, first, propose)
    assert scheduler.schedule() is None, "the next one's position depends on what the drafter says"
    land(scheduler, second, propose)
    third = scheduler.schedule()
    assert third.spans == (Span(0, 5, 2, True, (1,)),), "now they fit the tokens"
    assert scheduler.schedule() is None
    land(scheduler, third)


# ---- ends


def test_abort_anywhere() -> None:
    scheduler = make(max_in_flight=2, max_num_seqs=1)
    ask(scheduler, "runs", 4)
    ask(scheduler, "waits", 4)
    plan = scheduler.schedule()
    assert scheduler.abort("waits").finish_reason == "abort"
    event = scheduler.abort("runs")
    scheduler.check()
    assert (event.finish_reason, event.tokens) == ("abort", ())
    assert scheduler.abort("runs") is None and scheduler.abort("nobody") is None
    assert scheduler.has_work(), "its step is still in flight"
    assert land(scheduler, plan) == []
    assert not scheduler.has_work()
    assert scheduler.stats().free_pages == (100,)


def test_an_error_ends_one_request() -> None:
    scheduler = make()
    ask(scheduler, "bad", 4)
    ask(scheduler, "good", 4)
    plan = scheduler.schedule()
    events = land(scheduler, plan, lambda span: SpanResult(0, error="broken") if span.slot == 0 else say(span))
    assert [(event.request_id, event.finish_reason, event.error) for event in events] == [
        ("bad", "error", "broken"),
        ("good", None, None),
    ]
    assert scheduler.stats().finished == {"error": 1}
    (event,) = land(scheduler, scheduler.schedule(), lambda span: SpanResult(span.slot, (5,), error="late"))
    assert (event.finish_reason, event.error, event.tokens) == ("error", "late", ()), "a token does not excuse it"


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (SpanResult(0), "neither a token nor a vector"),
        (SpanResult(0, (1, 2)), "2 tokens from 0 drafts"),
        (SpanResult(3, (1,)), "row 3"),
    ],
)
def test_an_answer_that_does_not_fit_its_span_is_an_error(outcome: SpanResult, message: str) -> None:
    scheduler = make()
    ask(scheduler, "a", 4)
    (event,) = land(scheduler, scheduler.schedule(), lambda span: outcome)
    assert event.finish_reason == "error" and message in event.error


def test_a_vector() -> None:
    scheduler = make(max_num_batched_tokens=8, max_in_flight=2)
    ask(scheduler, "a", 12, params=PoolingParams())
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None
    assert land(scheduler, first) == []
    (event,) = land(scheduler, second, lambda span: SpanResult(span.slot, pooled=(0.5,)))
    assert (event.pooled, event.tokens, event.finish_reason) == ((0.5,), (), "stop")
    assert not scheduler.has_work()


def test_prompt_logprobs_come_once_even_after_a_preemption() -> None:
    scheduler = make(max_num_batched_tokens=6)
    params = SamplingParams(max_tokens=3, prompt_logprobs=0)

    def tell(span: Span) -> SpanResult:
        places = range(span.start + 1, min(span.start + span.count + 1, 10))
        entries = tuple(TokenLogprobs((place,), (0.0,), (1,)) for place in places)
        return SpanResult(span.slot, (5,) if span.sample else (), prompt_logprobs=entries)

    ask(scheduler, "a", 10, params=params)
    events = land(scheduler, scheduler.schedule(), tell)
    scheduler._preempt(scheduler._running[-1])
    while (plan := scheduler.schedule()) is not None:
        events += land(scheduler, plan, tell)
    told = [entry.token_ids[0] for event in events for entry in event.prompt_logprobs]
    assert told == list(range(1, 10))


# ---- restarts


def test_a_request_goes_on_after_a_restart() -> None:
    scheduler = make()
    assert ask(scheduler, "a", 6, out=5, generated=(5, 5, 5)) is None
    plan = scheduler.schedule()
    assert plan.admitted[0].prompt_len == 6 and len(plan.admitted[0].token_ids) == 9
    assert shape(plan) == [(0, 0, 9, True)]
    land(scheduler, plan)
    (event,) = land(scheduler, scheduler.schedule())
    assert event.finish_reason == "length"


def test_a_request_that_was_over_before_the_restart_ends_at_once() -> None:
    scheduler = make()
    event = ask(scheduler, "a", 6, out=2, generated=(5, 5))
    assert (event.request_id, event.finish_reason, event.tokens) == ("a", "length", ())
    params = SamplingParams(max_tokens=9).resolved(eos_token_ids=[5])
    assert ask(scheduler, "b", 6, params=params, generated=(1, 5)).finish_reason == "stop"
    assert not scheduler.has_work()


# ---- order


def test_first_come_first_served() -> None:
    scheduler = make(max_num_seqs=1)
    for name, arrival in (("late", 2.0), ("early", 1.0), ("early too", 1.0)):
        ask(scheduler, name, 2, out=1, arrival=arrival, priority=-int(arrival))
    assert [event.request_id for event in finish(scheduler)] == ["early", "early too", "late"]


def test_priority() -> None:
    scheduler = make(max_num_seqs=1, policy="priority")
    for name, priority, arrival in (("b", 1, 1.0), ("a", 0, 2.0), ("c", 1, 3.0)):
        ask(scheduler, name, 2, out=1, arrival=arrival, priority=priority)
    assert [event.request_id for event in finish(scheduler)] == ["a", "b", "c"]


def test_deadline() -> None:
    scheduler = make(max_num_seqs=1, policy="deadline")
    for name, deadline in (("whenever", None), ("later", 9.0), ("soon", 3.0)):
        ask(scheduler, name, 2, out=1, deadline=deadline)
    assert [event.request_id for event in finish(scheduler)] == ["soon", "later", "whenever"]


def test_many_aborts_in_line() -> None:
    scheduler = make(max_num_seqs=1)
    for number in range(300):
        ask(scheduler, str(number), 2, out=1)
    for number in range(299):
        scheduler.abort(str(number))
        assert scheduler.stats().waiting == 299 - number
    scheduler.check()
    assert scheduler.stats().waiting_tokens == 2
    assert [event.request_id for event in finish(scheduler)] == ["299"]


# ---- refusals


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ((), ValidationError, "no tokens"),
        (100, ValidationError, "maximum model length is 100"),
        (101, ValidationError, "maximum model length is 100"),
    ],
)
def test_impossible_prompts_are_refused(prompt: object, error: type[Exception], message: str) -> None:
    scheduler = make()
    with pytest.raises(error, match=message):
        ask(scheduler, "a", prompt)
    assert not scheduler.has_work()


def test_what_needs_more_pages_than_exist_is_refused() -> None:
    scheduler = make(GroupSpec("full", 4, 6))
    ask(scheduler, "fits", 10, out=11)  # the last token is never computed, so 20 positions
    with pytest.raises(CapacityError, match="takes 6 pages .* the whole cache has 5"):
        ask(scheduler, "a", 10, out=12)
    finish(scheduler)


def test_an_id_is_used_once_at_a_time() -> None:
    scheduler = make()
    ask(scheduler, "a", 4, out=1)
    with pytest.raises(ValidationError, match="request_id"):
        ask(scheduler, "a", 4)
    finish(scheduler)
    ask(scheduler, "a", 4, out=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"policy": "lottery"}, "lottery"),
        ({"chunked_prefill": False}, "max_model_len"),
        ({"groups": (GroupSpec("window", 4, 10),)}, "window"),
        ({"groups": (GroupSpec("full", 4, 1),)}, "null page"),
    ],
)
def test_options_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_page_usage_is_that_of_the_fullest_group() -> None:
    scheduler = make(GroupSpec("full", 4, 101), GroupSpec("window", 4, 11, window=40))
    ask(scheduler, "a", 16, out=3)
    step(scheduler)
    assert scheduler.stats().page_usage == pytest.approx(0.4)
    finish(scheduler)
    assert scheduler.stats().page_usage == 0.0

"""What the tests of the scheduler share: a small scheduler, requests, and steps by hand."""

from __future__ import annotations

from collections.abc import Callable

from quire.core.params import SamplingParams
from quire.core.plan import Event, GroupSpec, Span, SpanResult, StepPlan, StepResult
from quire.core.scheduler import CoreRequest, Scheduler, SchedulerOptions

FULL = GroupSpec("full", 4, 101)
Say = Callable[[Span], SpanResult]


def make(*groups: GroupSpec, clock: Callable[[], float] = lambda: 0.0, **changes: object) -> Scheduler:
    """A scheduler with room for four requests and a budget of 16, if nothing else is said."""
    given = {"groups": groups or (FULL,), "max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 100}
    return Scheduler(SchedulerOptions(**(given | changes)), clock=clock)


def ask(
    scheduler: Scheduler, name: str, prompt: int | tuple[int, ...], out: int = 8, params: object = None, **more: object
) -> Event | None:
    """Add a request; a number as prompt means so many tokens that no other request has."""
    if isinstance(prompt, int):
        prompt = tuple(hash((name, place)) % 1000 + 10 for place in range(prompt))
    chosen = params or SamplingParams(max_tokens=out)
    return scheduler.add(CoreRequest(name, prompt, chosen, seed=0, **more))


def say(span: Span) -> SpanResult:
    """A worker that always says 5."""
    return SpanResult(span.slot, (5,) if span.sample else ())


def land(scheduler: Scheduler, plan: StepPlan, how: Say = say) -> list[Event]:
    events = scheduler.apply(plan, StepResult(plan.step, tuple(how(span) for span in plan.spans)))
    scheduler.check()
    return events


def step(scheduler: Scheduler, how: Say = say) -> StepPlan:
    """One step, planned and applied."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.check()
    land(scheduler, plan, how)
    return plan


def finish(scheduler: Scheduler) -> list[Event]:
    events = []
    while (plan := scheduler.schedule()) is not None:
        events += land(scheduler, plan)
    assert not scheduler.has_work()
    return events


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(span.slot, span.start, span.count, span.sample) for span in plan.spans]

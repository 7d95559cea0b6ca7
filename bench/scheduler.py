"""What one step of scheduling costs: schedule() and apply() over running decode requests, with others waiting.

The model is left out: results are made beforehand, outside the timed part. Prints medians in microseconds.

    python bench/scheduler.py [--running 256] [--steps 400] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass

from quire.core.params import SamplingParams
from quire.core.plan import GroupSpec, Singles, SpanResult, StepPlan, StepResult
from quire.core.scheduler import CoreRequest, Scheduler, SchedulerOptions

PROMPT = 64
PAGE = 16
LONGEST = 4096
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Cost:
    """One setting, in microseconds per step; medians but for the last two."""

    name: str
    running: int
    waiting: int
    schedule: float
    apply: float
    step: float
    mean: float  # the steps in which every request needs a new page are the dear ones
    p99: float


def answer(plan: StepPlan) -> StepResult:
    """A worker that always says token 7."""
    if all(span.sample for span in plan.spans):
        return StepResult(plan.step, Singles(plan.spans, [7] * len(plan.spans)))
    return StepResult(plan.step, tuple(SpanResult(span.slot, (7,) if span.sample else ()) for span in plan.spans))


def measure(name: str, running: int, waiting: int, steps: int, groups: tuple[GroupSpec, ...], slots: int) -> Cost:
    """Time `steps` steps in which `running` requests decode and `waiting` ones cannot get in."""
    options = SchedulerOptions(groups, slots, 8192, LONGEST, max_in_flight=2)
    scheduler = Scheduler(options)
    params = SamplingParams(max_tokens=LONGEST - PROMPT, temperature=0.0)
    for number in range(running + waiting):
        prompt = tuple(range(number, number + PROMPT))
        scheduler.add(CoreRequest(str(number), prompt, params, seed=0))
    plans: deque[StepPlan] = deque()
    for turn in range(WARM_UP):
        while (plan := scheduler.schedule()) is not None:
            plans.append(plan)
        if turn < WARM_UP - 1:
            plan = plans.popleft()
            scheduler.apply(plan, answer(plan))
    costs: list[tuple[float, float]] = []
    for _ in range(steps):
        plan = plans.popleft()
        result = answer(plan)
        begin = time.thread_time()
        scheduler.apply(plan, result)
        middle = time.thread_time()
        following = scheduler.schedule()
        costs.append((middle - begin, time.thread_time() - middle))
        assert following is not None and len(following.spans) == running
        plans.append(following)
    assert scheduler.stats().waiting == waiting
    whole = sorted(sum(cost) for cost in costs)
    return Cost(
        name,
        running,
        waiting,
        schedule=1e6 * statistics.median(cost[1] for cost in costs),
        apply=1e6 * statistics.median(cost[0] for cost in costs),
        step=1e6 * statistics.median(whole),
        mean=1e6 * statistics.fmean(whole),
        p99=1e6 * whole[int(0.99 * (len(whole) - 1))],
    )


def main() -> None:
    """Measure the settings and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256, help="requests that decode")
    parser.add_argument("--steps", type=int, default=400, help="steps measured per setting")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    args = parser.parse_args()
    pages = args.running * (LONGEST // PAGE) + 1
    full = GroupSpec("full", PAGE, pages)
    window = GroupSpec("window", PAGE, pages, 1024)
    settings = [
        ("full attention", 0, (full,), args.running),
        ("full attention", 1024, (full,), args.running),
        ("full attention", 10_000, (full,), args.running),
        ("full and window", 1024, (full, window), args.running),
        ("no page for the next in line", 1024, (full, GroupSpec("state", PAGE, args.running + 1)), 2 * args.running),
    ]
    costs = [
        measure(name, args.running, waiting, args.steps, groups, slots) for name, waiting, groups, slots in settings
    ]
    if args.json:
        print(json.dumps([asdict(cost) for cost in costs], indent=2))
        return
    columns = "".join(f"{name:>10}" for name in ("running", "waiting", "schedule", "apply", "step", "mean", "p99"))
    print(f"{'groups':30}{columns}   microseconds of CPU time")
    for cost in costs:
        times = (cost.schedule, cost.apply, cost.step, cost.mean, cost.p99)
        print(f"{cost.name:30}{cost.running:10}{cost.waiting:10}" + "".join(f"{value:10.0f}" for value in times))


if __name__ == "__main__":
    main()

"""The seeded simulation: the real Scheduler against a fake model that really uses its pages.

One seed is one scenario: a layout of layer groups, a pool size, a budget, a policy, requests that share prefixes, and
what goes wrong: aborts at any moment, failing spans, right and wrong drafts, late results, restarts. After every step the
scheduler's invariants are checked; at the end every request must have the tokens that it would have had alone.

    python tests/pure/simulation.py --seed 123          one scenario again, as a failure asked for
    python tests/pure/simulation.py --minutes 10        as many as fit; --forever until stopped; --requests N
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # run as a script, from any folder
    sys.path[:0] = [str(Path(__file__).parents[2] / "src")]

from simulated_model import EOS, OUT_OF_LUCK, VOCABULARY, FakeModel, Habits, PagedWorker

from quire.core.params import SamplingParams
from quire.core.plan import Event, GroupSpec, StepPlan, StepResult
from quire.core.request import CoreRequest
from quire.core.scheduler import Scheduler, SchedulerOptions
from quire.errors import CapacityError

LONGEST = 40
LAYOUTS = (
    ("full",),
    ("full", "window"),
    ("window",),
    ("full", "state"),
    ("state",),
    ("full", "window", "state"),
    ("full", "cross"),
    ("window", "window"),
)


class SimulationFailure(AssertionError):
    """A scenario went wrong; the message says with which seed to see it again."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything a seed decides before the first step."""

    options: SchedulerOptions
    requests: int
    arrivals: float  # mean requests per turn
    crowd: int  # no more arrive while so many live
    aborts: float  # probabilities per turn
    restarts: float
    resets: float
    errors: float
    drafts: float
    lazy: float  # probability that a result is not fetched yet although it could be
    eager: float  # probability that a request is short
    gather_copies: bool


@dataclass(slots=True)
class Case:
    """One simulated request: what was asked, what must come, what has come."""

    request: CoreRequest
    expected: list[int]
    finish: str
    stop: int | None
    born: int = 0  # turn
    ahead: int = 0  # requests that lived then
    tokens: list[int] = field(default_factory=list)
    logprobs: list[int] = field(default_factory=list)  # prompt positions whose log-probabilities came


def draw_scenario(rng: random.Random) -> Scenario:
    """A scenario from its seed's random numbers."""
    kinds = rng.choice(LAYOUTS)
    size = rng.choice((2, 4, 4, 8))
    slots = rng.choice((1, 3, 6, 8, 12))
    tight = rng.random() < 0.7
    groups = []
    for kind in kinds:
        own = size if rng.random() < 0.8 else rng.choice((2, 4, 8))
        whole = -(-LONGEST // own)
        pages = rng.randint(whole * 2 // 3, whole + 1) if tight else whole * (slots + 2)
        window = rng.randint(1, 14) if kind == "window" else None
        if kind == "window" and rng.random() < 0.5:
            least = -(-(window - 1) // own) + 1
            pages = rng.randint(least, least + whole)
        if kind == "state":
            pages = rng.randint(1, slots + 4)
        groups.append(GroupSpec(kind, own, pages + 1, window))
    chunked = rng.random() < 0.85
    budget = rng.choice((1, 3, 6, 9, 16, 25, 40, 100)) if chunked else rng.choice((LONGEST, 2 * LONGEST))
    options = SchedulerOptions(
        tuple(groups),
        max_num_seqs=slots,
        max_num_batched_tokens=budget,
        max_model_len=LONGEST,
        policy=rng.choice(("fcfs", "fcfs", "priority", "deadline", "fair", "fair")),
        enable_prefix_caching=rng.random() < 0.85,
        chunked_prefill=chunked,
        long_prefill_token_threshold=rng.choice((0, 0, 0, 3, 7)),
        max_in_flight=rng.choice((1, 2, 2, 3)),
    )
    return Scenario(
        options,
        requests=rng.randint(30, 90),
        crowd=slots + rng.choice((2, 6, 12)),
        arrivals=rng.choice((0.5, 3.0, 8.0, 30.0)),
        aborts=rng.choice((0.0, 0.0, 0.02, 0.1)),
        restarts=rng.choice((0.0, 0.0, 0.0, 0.01)),
        resets=rng.choice((0.0, 0.0, 0.01)),
        errors=rng.choice((0.0, 0.0, 0.01, 0.05)),
        drafts=rng.choice((0.0, 0.0, 0.3, 0.9)),
        lazy=rng.choice((0.0, 0.5, 0.9)),
        eager=rng.choice((0.1, 0.6)),
        gather_copies=rng.random() < 0.5,
    )


class Simulation:
    """One scenario, run to its end by run()."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.scenario = draw_scenario(self.rng)
        self.model = FakeModel(seed, self.scenario.options.groups)
        self.live: dict[str, Case] = {}
        self.counts: Counter[str] = Counter()
        self.turn = 0
        self.latest: tuple[int, ...] = ()  # the last prompt that came
        self.draining = False  # no arrivals, until all are gone and the prefix cache is reset
        self.flights: list[tuple[StepPlan, StepResult]] = []
        self.stems = [[tuple(self.rng.randrange(1, VOCABULARY) for _ in range(23)) for _ in range(2)] for _ in range(2)]
        self._open()

    def run(self) -> Counter[str]:
        """Run to the end. Raises SimulationFailure with the seed."""
        try:
            self._loop()
        except Exception as error:
            raise SimulationFailure(
                f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
                f"Again: python tests/pure/simulation.py --seed {self.seed}\n{self.scenario}"
            ) from error
        return self.counts

    def _open(self) -> None:
        """A scheduler and a worker without any memory, as at the start and after a crash."""
        self.clock = 0.0
        self.scheduler = Scheduler(self.scenario.options, clock=lambda: self.clock)
        habits = Habits(
            random.Random(self.rng.random()),
            lambda request_id, index: self.live[request_id].expected[index:] if request_id in self.live else (),
            drafts=self.scenario.drafts,
            errors=self.scenario.errors,
            gather_copies=self.scenario.gather_copies,
        )
        self.worker = PagedWorker(self.model, habits, LONGEST)
        self.flights.clear()

    def _loop(self) -> None:
        rng, scenario, most = self.rng, self.scenario, self.scenario.options.max_in_flight
        while self.counts["requests"] < scenario.requests or self.scheduler.has_work():
            self.turn += 1
            self.clock += 1.0
            if self.turn % 1000 == 0:
                for case in self.live.values():
                    self._check_wait(case)
            if self._may_arrive():
                for _ in range(max(not self.live, int(rng.expovariate(1.0 / scenario.arrivals) + 0.5))):
                    self._arrive()
            self._mishap()
            plan = self.scheduler.schedule()
            if rng.random() < 0.25:  # between plan and result; after every result is enough for the rest
                self.scheduler.check()
            if plan is not None:
                self._check_plan(plan)
                self.flights.append((plan, self.worker.run(plan)))
            elif not self.flights:
                assert not self.scheduler.has_work(), "nothing is planned although requests wait and nothing runs"
            self._mishap()
            if self.flights and (plan is None or len(self.flights) >= most or rng.random() >= scenario.lazy):
                oldest, result = self.flights.pop(0)
                for event in self.scheduler.apply(oldest, result):
                    self._hear(event)
                self.scheduler.check()
        self._close()

    # ---- what happens

    def _may_arrive(self) -> bool:
        full = len(self.live) >= self.scenario.crowd
        return self.counts["requests"] < self.scenario.requests and not full and not self.draining

    def _arrive(self) -> None:
        """A new request: a shared beginning, an own end, and limits that mostly fit."""
        rng = self.rng
        salt = int(rng.random() < 0.25)
        stem = rng.choice(self.stems[salt if rng.random() < 0.5 else 0])
        short = rng.random() < self.scenario.eager
        own = tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(1, 4 if short else 10)))
        prompt = stem[: rng.choice((0, 0, 4, 8, 8, 12, 16, 23))] + own
        if rng.random() < 0.15 and self.latest:
            prompt = self.latest  # one more answer to the same prompt
        self.latest = prompt
        output = rng.randint(1, 6 if short else 30)
        params = SamplingParams(
            max_tokens=None if rng.random() < 0.02 else output,
            min_tokens=min(output, rng.choice((0, 0, 0, 3))),
            ignore_eos=rng.random() < 0.1,
            stop_token_ids=(1,) if rng.random() < 0.05 else (),
            eos_token_ids=(EOS, 2) if rng.random() < 0.05 else (EOS,),
            prompt_logprobs=1 if rng.random() < 0.1 else None,
        )
        number = self.counts["requests"]
        request = CoreRequest(
            str(number),
            prompt,
            params,
            seed=number,
            priority=rng.randint(0, 2),
            arrival=self.clock,
            salt=b"%d" % salt,
            adapter=salt,
            tenant=rng.choice(("", "a", "a", "a", "b")),
            deadline=self.clock + rng.random() * 50 if rng.random() < 0.5 else None,
            encoder_tokens=rng.randint(1, 5),
        )
        self.counts["requests"] += 1
        case = self._judge(request)
        try:
            self.scheduler.add(request)
        except CapacityError:
            assert self._cannot_fit(request), "a request that fits was refused"
            self.counts["refused"] += 1
            return
        case.born, case.ahead = self.turn, len(self.live)
        self.live[request.request_id] = case

    def _judge(self, request: CoreRequest) -> Case:
        """What the request must get, by the stop rules told once more, in other words."""
        params, length = request.params, len(request.prompt_token_ids)
        limit = min(LONGEST - length, params.max_tokens or LONGEST)
        expected = self.model.alone(request.prompt_token_ids, request.adapter, limit)
        extra = set(params.stop_token_ids) | set(() if params.ignore_eos else params.eos_token_ids[1:])
        for count, token in enumerate(expected, 1):
            if count < params.min_tokens:
                continue
            if token == EOS and not params.ignore_eos:
                return Case(request, expected[:count], "stop", None)
            if token in extra:
                return Case(request, expected[:count], "stop", token)
        return Case(request, expected, "length", None)

    def _cannot_fit(self, request: CoreRequest) -> bool:
        positions = min(LONGEST, len(request.prompt_token_ids) + (request.params.max_tokens or LONGEST)) - 1
        for group in self.scenario.options.groups:
            usable = (group.num_pages - 1) * group.page_size
            if group.kind == "cross":
                needed = request.encoder_tokens
            elif group.kind == "window" and self.scenario.options.chunked_prefill:
                needed = min(positions, group.window + group.page_size - 1)  # it may begin at the end of a page
            else:
                needed = positions if group.kind != "state" else 0
            if usable < needed:
                return True
        return False

    def _mishap(self) -> None:
        """Something that may come at any moment, in flight or not."""
        rng, scenario = self.rng, self.scenario
        if self.live and rng.random() < scenario.aborts:
            event = self.scheduler.abort(rng.choice(list(self.live)))
            assert event is not None and event.finish_reason == "abort"
            self.counts["aborts in flight"] += bool(self.flights)
            self._hear(event)
        self.draining |= rng.random() < scenario.resets
        if self.draining and not self.live:
            self.draining = False
            assert self.scheduler.reset_prefix_cache()
            # As if other weights were loaded: a page from before would now be wrong.
            self.model = FakeModel(self.rng.randrange(1 << 30), self.scenario.options.groups)
            self.worker.model = self.model
            self.counts["resets"] += 1
        if self.live and rng.random() < scenario.restarts:
            self._restart()

    def _restart(self) -> None:
        """The engine dies with everything in flight; live requests are handed in again with what they have."""
        self._tally()
        self._open()
        self.clock = float(self.turn)
        for request_id, case in list(self.live.items()):
            old = case.request
            case.request = CoreRequest(
                old.request_id,
                old.prompt_token_ids,
                old.params,
                old.seed,
                old.priority,
                old.arrival,
                old.salt,
                old.adapter,
                tuple(case.tokens),
                tenant=old.tenant,
                deadline=old.deadline,
                encoder_tokens=old.encoder_tokens,
            )
            case.born, case.ahead = self.turn, len(self.live)
            if not case.tokens:
                case.logprobs.clear()
            assert self.scheduler.add(case.request) is None, f"{request_id} was over before the restart"
        self.counts["restarts"] += 1
        self.scheduler.check()

    def _hear(self, event: Event) -> None:
        """Take an event as the engine does, and judge the last one."""
        case = self.live[event.request_id]
        case.tokens += event.tokens
        case.logprobs += [entry.ranks[0] for entry in event.prompt_logprobs]
        assert case.tokens == case.expected[: len(case.tokens)], (
            f"request {event.request_id} got {case.tokens}, alone it gets {case.expected}"
        )
        self.counts["tokens"] += len(event.tokens)
        if event.finish_reason is None:
            return
        del self.live[event.request_id]
        self.counts[event.finish_reason] += 1
        self._check_wait(case)
        prompt = len(case.request.prompt_token_ids)
        if case.request.params.prompt_logprobs is not None:
            due = list(range(1, prompt))
            assert case.logprobs == due[: len(case.logprobs)], f"prompt logprobs of positions {case.logprobs}"
            assert not case.tokens or case.logprobs == due, f"prompt logprobs only of positions {case.logprobs}"
        if event.finish_reason in ("abort", "error"):
            assert event.finish_reason == "abort" or event.error == OUT_OF_LUCK, event.error
            return
        assert (event.finish_reason, event.stop_reason) == (case.finish, case.stop), f"{event} instead of {case.finish}"
        assert case.tokens == case.expected, f"{case.tokens} instead of {case.expected}"

    # ---- what must hold

    def _check_plan(self, plan: StepPlan) -> None:
        """Limits of the options."""
        options = self.scenario.options
        assert plan.num_tokens <= options.max_num_batched_tokens, "the plan is over its budget"
        assert len(self.flights) < options.max_in_flight, "too many plans in flight"
        self.counts["begun pages copied"] += sum(options.groups[copy.group].kind != "state" for copy in plan.copies)
        if not options.chunked_prefill:
            for span in plan.spans:
                assert span.count == 1 or span.start == 0, "a chunk, for a model that cannot do chunks"

    def _check_wait(self, case: Case) -> None:
        """Nobody starves. A turn computes at least one position, or fetches a result, of the first in line who can go
        on, so first come is bounded by the work of those that were there before; any order by all the work there is.
        """
        ahead = case.ahead if self.scenario.options.policy == "fcfs" else self.scenario.requests
        waited = self.turn - case.born
        assert waited <= 6 * LONGEST * (ahead + 1), f"waited {waited} turns, {ahead} requests were ahead"

    def _tally(self) -> None:
        """Add up what the scheduler that ends now has seen."""
        stats = self.scheduler.stats()
        self.counts["steps"] += stats.steps
        self.counts["preemptions"] += stats.preemptions
        self.counts["cached tokens"] += stats.cache_hits
        self.counts["drafts accepted"] += stats.accepted_tokens
        self.counts["drafts rejected"] += stats.draft_tokens - stats.accepted_tokens

    def _close(self) -> None:
        """Everything must have been given back."""
        assert not self.live, f"never finished: {list(self.live)}"
        stats = self.scheduler.stats()
        assert stats.free_pages == stats.pages, "pages were not given back"
        assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
        self._tally()
        self.counts["scenarios"] += 1


def simulate(first_seed: int, requests: int | None = None, seconds: float | None = None) -> Counter[str]:
    """Run scenarios from `first_seed` on until so many requests or seconds have passed. Returns what was seen."""
    total: Counter[str] = Counter()
    begin, seed = time.monotonic(), first_seed
    while (requests is None or total["requests"] < requests) and (
        seconds is None or time.monotonic() - begin < seconds
    ):
        total += Simulation(seed).run()
        seed += 1
    return total


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="run this one scenario; with another limit, begin with it")
    parser.add_argument("--requests", type=int, help="run about so many requests")
    parser.add_argument("--minutes", type=float, help="run so long")
    parser.add_argument("--forever", action="store_true", help="run until stopped")
    args = parser.parse_args(argv)
    first = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 40)
    begin = time.monotonic()
    if args.seed is not None and args.requests is None and args.minutes is None and not args.forever:
        print(Simulation(args.seed).scenario)
        total = simulate(args.seed, requests=1)
    elif args.forever:
        total = Counter()
        while True:
            total += simulate(first + total["scenarios"], seconds=60.0)
            print(f"{total['requests']} requests in {time.monotonic() - begin:.0f} s, none wrong", flush=True)
    else:
        minutes = 1.0 if args.minutes is None and args.requests is None else args.minutes
        total = simulate(first, args.requests, None if minutes is None else 60.0 * minutes)
    took = time.process_time()
    print(f"first seed {first}: {total['requests'] / took:.0f} requests per second of one core, none wrong")
    for name, count in total.most_common():
        print(f"{count:12} {name}")


if __name__ == "__main__":
    main()

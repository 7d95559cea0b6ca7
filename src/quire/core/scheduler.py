"""Scheduler: decides what the next step computes (schedule) and takes in what came out (apply).

One sentence: every request has tokens, some of them are computed, and each step lets it catch up. There is no prefill,
no decode and no resumption. Integers only: nothing here knows tensors, text or devices. One thread uses it.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise

from quire.core.landing import (
    append,
    contradiction,
    last_event,
    lone_token,
    next_event,
    quiet_until,
    step_on,
    take_drafts,
    times,
    unsent,
)
from quire.core.options import SchedulerOptions
from quire.core.picture import Picture, draw
from quire.core.plan import (
    NO_TIMES,
    Admission,
    Event,
    FinishReason,
    Singles,
    Span,
    SpanResult,
    StepPlan,
    StepResult,
)
from quire.core.planning import Flight, Sketch
from quire.core.queue import WaitingLine
from quire.core.request import GONE, NOWHERE, CoreRequest, Request
from quire.core.room import Room, longest_hit
from quire.core.siblings import copies, find_begun, leave_behind
from quire.core.stats import Queue, Stats
from quire.core.stop import check_stop, stop_rules
from quire.core.tables import PageTables
from quire.errors import ValidationError

__all__ = ["CoreRequest", "Scheduler", "SchedulerOptions"]


class Scheduler:
    """Requests in line, requests running, plans in flight.

    `running` and the line are both ordered by the request's key. The largest key is preempted first and the smallest is
    served first, so the first request always gets on: it can take the pages of all others, and add() has refused those
    that could not run alone. Because victims come from the end, a victim has never been given a span in the same step.
    """

    def __init__(self, options: SchedulerOptions, clock: Callable[[], float] = time.monotonic) -> None:
        self.options = options
        self._clock = clock
        # A hit, like a draft, is a span of several positions that does not begin at 0: some models cannot do that.
        caching = options.enable_prefix_caching and options.chunked_prefill
        self._tables = PageTables(options.groups, options.max_num_batched_tokens, caching)
        # A rejected draft cannot be subtracted from a recurrent state.
        self._use_drafts = options.chunked_prefill and not self._tables.has_state
        self._room = Room(self._tables)
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._waiting = WaitingLine(options.policy)
        self._slots = list(range(options.max_num_seqs - 1, -1, -1))
        self._released: list[int] = []
        self._flights: deque[Flight] = deque()
        self._steps = 0
        self._totals = Stats()

    # ---- requests in and out

    def add(self, request: CoreRequest) -> Event | None:
        """Put a request in line. Returns its last event if its `generated` tokens already end it, else None.

        Raises ValidationError for what can never run because of its length or id, CapacityError for what needs more
        pages than exist.
        """
        if request.request_id in self._requests:
            raise ValidationError(
                "A request with this id is running; choose another, or wait for its end",
                "request_id",
                request.request_id,
            )
        self.options.refuse_length(request)
        tokens = [*request.prompt_token_ids, *request.generated]
        rules = stop_rules(request.params, len(request.prompt_token_ids), self.options.max_model_len)
        least = self._tables.least(rules.limit - 1, request.encoder_tokens, self.options.chunked_prefill)
        self.options.refuse_pages(request, rules.limit, least)
        known = Request(
            request,
            key=self._waiting.key_of(request),
            tokens=tokens,
            rules=rules,
            limit=rules.limit,
            watched=rules.watched,
            watch_from=0 if rules.repetition else rules.limit,
            tables=self._tables.new_tables(),
            known=len(tokens),
            logprobs_sent=len(request.prompt_token_ids) - 1 if request.generated else 0,
        )
        stop = check_stop(tokens, rules) if request.generated else None
        if stop is not None:
            return last_event(known, stop.reason, self._clock(), stop_token=stop.token)
        self._requests[request.request_id] = known
        self._waiting.push(known, self._running)
        return None

    def abort(self, request_id: str) -> Event | None:
        """End a request at once, wherever it is; what is in flight for it is dropped. None if it is not known."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.slot == NOWHERE:
            self._waiting.remove(request)
        else:
            self._running.remove(request)
        self._remove(request, "abort")
        return last_event(request, "abort", self._clock())

    def has_work(self) -> bool:
        """True while a request waits or runs, or a plan is in flight."""
        return bool(self._requests or self._flights)

    def stats(self) -> Stats:
        """The counters so far and the gauges of this moment."""
        pools = [group.pool for group in self._tables.groups]
        return dataclasses.replace(
            self._totals,
            running=len(self._running),
            waiting=len(self._waiting),
            waiting_tokens=self._waiting.tokens,
            queues=self._waiting.queues(),
            in_flight=len(self._flights),
            pages=tuple(pool.num_pages - 1 for pool in pools),
            free_pages=tuple(pool.free for pool in pools),
            named_pages=tuple(pool.named for pool in pools),
            steps=self._steps,
            finished=dict(self._totals.finished),
        )

    def picture(self) -> Picture:
        """Whose each page is at this moment, and who waits."""
        return draw(self._steps, self._tables.groups, self._running, self._waiting)

    def before(self, request_id: str) -> Queue | None:
        """What has its turn before a request that waits; None for one that does not."""
        found = Queue()
        for request in self._waiting.in_order():
            if request.given.request_id == request_id:
                return found
            found = found.plus(1, len(request.tokens))
        return None

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. False if running requests go on with pages computed before this call."""
        self._tables.forget()
        self._room.forget()
        return not self._running

    def check(self) -> None:
        """Assert every invariant; for tests, which call it after each step."""
        running = self._running
        assert all(a.key < b.key for a, b in pairwise(running)), "running requests are out of order"
        slots = [request.slot for request in running]
        assert len(set(slots)) == len(slots), "two requests share a slot"
        assert sorted(slots + self._slots) == list(range(self.options.max_num_seqs)), "slots were lost or doubled"
        waiting = list(self._waiting)
        assert len(waiting) == len(self._waiting), "the waiting line counts wrong"
        assert self._waiting.tokens == sum(len(request.tokens) for request in waiting), "waiting tokens count wrong"
        assert set(running).union(waiting) == set(self._requests.values()), "a request is lost, or lives after its end"
        for request in waiting:
            assert request.slot == NOWHERE and request.epoch == GONE and request.in_flight == 0, "waits, yet runs"
            assert request.computed == request.planned == 0, "waits with something computed"
            assert request.known == len(request.tokens), "waits with tokens in flight"
            for table in request.tables:
                assert not table.pages, "waits with pages"
        for request in running:
            flights = sum(request in flight.rows for flight in self._flights if flight.plan.step >= request.epoch)
            assert request.in_flight == flights, "spans in flight count wrong"
            assert request.computed <= request.planned and request.computed < request.limit
            assert request.in_flight or request.computed == request.planned < request.known == len(request.tokens)
        self._tables.check(running)

    # ---- planning

    def schedule(self) -> StepPlan | None:
        """The next step; None when there is nothing to compute before a plan in flight has been applied, or at all."""
        if len(self._flights) >= self.options.max_in_flight:
            return None
        self._make_way()
        sketch = Sketch(self.options.max_num_batched_tokens)
        if self._serve_running(sketch):
            self._admit_waiting(sketch)
        if not sketch.spans:
            return None
        plan = StepPlan(
            self._steps,
            tuple(self._released),
            tuple(sketch.admitted),
            tuple(sketch.grants),
            tuple(sketch.copies),
            tuple(sketch.spans),
        )
        self._released.clear()
        self._flights.append(Flight(plan, sketch.rows))
        self._steps += 1
        self._totals.computed_tokens += self.options.max_num_batched_tokens - sketch.left
        return plan

    def _serve_running(self, sketch: Sketch) -> bool:
        """A span for each running request that is behind, first in order first. False if one had to be preempted."""
        running = self._running
        preemptions = self._totals.preemptions
        spans, rows, left = sketch.spans, sketch.rows, sketch.left
        singles = NOWHERE  # requests to come that need one position; counted when a longer span might crowd them out
        for index, request in enumerate(running):  # which may lose its end on the way
            if not left:
                break
            start, known = request.planned, request.known
            if start >= known or known >= request.limit or (request.drafting and request.in_flight):
                continue  # up to date, or about to end, or its next position depends on what is in flight
            if start + 1 == known and not request.drafts:
                singles -= 1
                if start < request.room:
                    spans.append(Span(request.slot, start, 1, True))
                    rows.append(request)
                    request.planned = known
                    request.known = known + 1
                    request.in_flight += 1
                    left -= 1
                    continue
                share = left
            else:
                if singles < 0:
                    singles = sum(
                        other.planned + 1 == other.known < other.limit and not other.drafts
                        for other in running[index + 1 :]
                    )
                share = max(1, left - singles)
            sketch.left = left
            self._catch_up(request, share, sketch)
            left = sketch.left
        sketch.left = left
        return self._totals.preemptions == preemptions

    def _catch_up(self, request: Request, share: int, sketch: Sketch) -> None:
        """Plan at most `share` positions of a running request, taking pages from those behind it if need be."""
        tables = self._tables
        end = self._span_end(request, share)
        if end <= request.planned:
            return
        if request.drafts:
            most = min(share - 1, request.limit - request.known - 1)
            request.drafts = request.drafts[: max(0, most)]
            if not tables.fits(request, end + len(request.drafts)):
                request.drafts = ()
        while not tables.fits(request, end + len(request.drafts)):
            if request.in_flight:
                return  # its own window may give pages back when that lands; before that nobody need suffer
            victim = self._running[-1]
            self._preempt(victim)
            if victim is request:
                return
        self._plan_span(request, end, sketch)

    def _span_end(self, request: Request, share: int) -> int:
        """How far the next span may go: not past what is known, the budget, the pool, or a state to be kept."""
        start = request.planned
        threshold = self.options.long_prefill_token_threshold
        if threshold and self.options.chunked_prefill and len(self._requests) > 1:
            share = min(share, threshold)
        end = min(request.known, start + share, self._tables.reach(request))
        if start < request.snapshot_at < end:
            end = request.snapshot_at
        return end

    def _plan_span(self, request: Request, end: int, sketch: Sketch) -> None:
        """Take the pages up to `end` plus the request's drafts, and add the span to the plan."""
        start, drafts = request.planned, request.drafts
        sketch.grants += self._tables.extend(request, end + len(drafts))
        if start == request.snapshot_at:
            sketch.copies += self._tables.keep_states(request)
        sample = end == request.known
        count = end - start + len(drafts)
        sketch.spans.append(Span(request.slot, start, count, sample, drafts))
        sketch.rows.append(request)
        sketch.left -= count
        request.planned = start + count
        request.known += sample
        request.in_flight += 1
        if drafts:
            request.drafts = ()
            self._totals.drafts += 1
            self._totals.draft_tokens += len(drafts)

    def _make_way(self) -> None:
        """Where tenants share the engine: if the front of the line finds no slot or no pages, and its tenant is far behind
        another one that runs, the last request of that one gives its place up.
        """
        front = self._waiting.front()
        if front is None or (self._slots and not self._room.was_refused(front, self._room.slack(self._running))):
            return
        victim = self._waiting.who_makes_way(front, self._running, recomputes=not self._tables.caching)
        if victim is not None:
            self._dislodge(victim)
            self._waiting.step_down(victim)

    def _preempt(self, request: Request) -> None:
        """Take the last running request's place; it goes back to the front of the line."""
        assert self._running[-1] is request
        self._dislodge(request)
        self._waiting.push_back(request)

    def _dislodge(self, request: Request) -> None:
        """Take a running request's slot and pages; it will compute its tokens again."""
        self._running.remove(request)
        self._vacate(request)
        request.preemptions += 1
        request.known = len(request.tokens)
        self._totals.preemptions += 1

    def _vacate(self, request: Request) -> None:
        """Slot and pages go back; whatever is in flight for the request will be dropped because of its epoch."""
        self._room.let_go(request)
        self._released.append(request.slot)
        self._slots.append(request.slot)
        request.slot, request.epoch, request.in_flight = NOWHERE, GONE, 0
        request.drafts, request.drafting, request.quiet_until = (), False, 0

    def _admit_waiting(self, sketch: Sketch) -> None:
        """Let requests in from the front of the line while slots, budget and pages last.

        One whose next page another is just computing is set aside for a step, with slot and pages kept for it.
        """
        if not (len(self._waiting) and self._slots and sketch.left):
            return
        self._waiting.charge_output(self._running)
        slack = self._room.slack(self._running)
        aside: list[Request] = []
        while len(self._slots) > len(aside) and sketch.left:
            request = self._waiting.front()
            if request is None or (self._running and self._room.was_refused(request, slack)):
                break
            if not self.options.chunked_prefill and request.known > sketch.left:
                break  # it waits for a step that can take it whole
            spoken_for = self._room.find(request, longest_hit(request), slack)
            if spoken_for is None:
                break
            if not self._running:
                slack = self._room.with_reserve(slack)
            slack = [free - pages for free, pages in zip(slack, spoken_for, strict=True)]
            self._waiting.pop()
            if self._tables.follows(request, self._running, longest_hit(request)):
                self._room.let_go(request)
                aside.append(request)
            else:
                self._admit(request, sketch)
        for request in aside:
            self._waiting.push_back(request)

    def _admit(self, request: Request, sketch: Sketch) -> None:
        """Give a request, whose shared pages are found, a slot and its first span."""
        # What was admitted in this step has nothing yet that could be copied.
        settled = (other for other in self._running if other.epoch < self._steps)
        begun = find_begun(request, settled, self._tables, longest_hit(request))
        if begun is not None:
            request.computed = request.planned = begun.start + begun.count
        bisect.insort(self._running, request, key=lambda other: other.key)
        given, hit = request.given, request.planned
        request.slot = self._slots.pop()
        request.epoch = self._steps
        self._totals.cache_queries += len(request.tokens)
        self._totals.cache_hits += hit
        if request.cached_tokens == NOWHERE:
            request.cached_tokens = min(hit, request.rules.prompt_len)
            request.scheduled = self._clock()
            self._totals.prompt_tokens += request.rules.prompt_len
            self._totals.cached_tokens += request.cached_tokens
            self._waiting.charge_prompt(request, hit)
        sketch.admitted.append(
            Admission(
                request.slot,
                given.request_id,
                tuple(request.tokens),
                request.rules.prompt_len,
                given.params,
                given.seed,
                given.adapter,
                given.salt,
            )
        )
        self._plan_span(request, self._span_end(request, sketch.left), sketch)
        sketch.copies += self._tables.restore(request)
        if begun is not None:
            sketch.copies += copies(request, begun, self._tables)

    # ---- results

    def apply(self, plan: StepPlan, result: StepResult) -> list[Event]:
        """Take in the result of the oldest plan in flight; an event for each request that something happened to."""
        flight = self._flights.popleft()
        assert flight.plan.step == plan.step == result.step, "results must be applied in the order of their plans"
        events: list[Event] = []
        step, now, before = plan.step, self._clock(), len(self._requests)
        outcomes, totals = result.spans, self._totals
        assert len(outcomes) == len(flight.rows), "each span has a result"
        singles = outcomes.tokens if isinstance(outcomes, Singles) else None
        for index, (request, span) in enumerate(zip(flight.rows, flight.plan.spans, strict=True)):
            if request.epoch > step:
                continue  # ended or preempted meanwhile: computed for an earlier life
            if span.count == 1 and span.sample:  # drafts would make it more
                token = lone_token(span, outcomes[index]) if singles is None else singles[index]
                if token is not None and step_on(request, token):
                    events.append(Event(request.given.request_id, (token,)))
                    totals.generated_tokens += 1
                    continue
            event = self._land(request, span, outcomes[index], now)
            if event is not None:
                events.append(event)
                if event.finish_reason is not None:
                    self._remove(request, event.finish_reason)
        if len(self._requests) < before:
            self._running = [request for request in self._running if request.slot != NOWHERE]
        return events

    def _land(self, request: Request, span: Span, outcome: SpanResult, now: float) -> Event | None:
        """Count what a span computed and append its tokens. Returns what there is to tell."""
        error = outcome.error or contradiction(span, outcome)
        if error is not None:
            return last_event(request, "error", now, error=error)
        request.in_flight -= 1
        request.computed += span.count
        tokens, logprobs, prompt_logprobs = outcome.tokens, outcome.logprobs, outcome.prompt_logprobs
        if prompt_logprobs:
            prompt_logprobs = unsent(request, span, prompt_logprobs)
        stamps, stop = NO_TIMES, None
        if span.sample:
            length = len(request.tokens)
            stop = append(request, span, tokens, self._totals)
            kept = len(request.tokens) - length
            if kept < len(tokens):
                tokens, logprobs = tokens[:kept], logprobs[:kept]
            self._totals.generated_tokens += kept
            if request.first_token is None:
                request.first_token = now
                stamps = times(request)
            if self._use_drafts:
                take_drafts(request, outcome.drafts)
        if request.computed >= request.publish_at:
            self._tables.publish(request)
        request.quiet_until = quiet_until(request)
        if stop is not None:
            return last_event(
                request,
                stop.reason,
                now,
                tokens=tokens,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                pooled=outcome.pooled,
                stop_token=stop.token,
            )
        if not (tokens or prompt_logprobs):
            return None
        return next_event(request, tokens, logprobs, prompt_logprobs, stamps)

    def _remove(self, request: Request, reason: FinishReason) -> None:
        """The request has ended: nothing of it stays but a count. The caller takes it out of its list or line."""
        del self._requests[request.given.request_id]
        self._waiting.charge_output((request,))
        if request.slot != NOWHERE:
            if reason != "error":
                leave_behind(request, self._tables)
            self._vacate(request)
        self._totals.finished[reason] = self._totals.finished.get(reason, 0) + 1

"""Engine: prompts in, outputs out, one plain step(). Owns the text side of every live request.

Everything runs in the caller's thread, except prepare(), which touches nothing and may run anywhere. The asyncio and
the batch drivers (async_engine.py, llm.py) only call what is here.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count

from quire.config import EngineOptions
from quire.core.params import SamplingParams, ThinkingMarks
from quire.core.picture import Picture
from quire.core.plan import Event, FinishReason
from quire.core.request import CoreRequest
from quire.core.stats import Queue, Stats
from quire.engine import prefetch
from quire.engine.admission import LATE, AdmissionControl, Limits
from quire.engine.core import Core
from quire.engine.generation import Completion, Generation
from quire.engine.heap import uncollected
from quire.engine.observe import Observer
from quire.engine.outputs import RequestOutput
from quire.engine.prompts import Prompt, PromptLimits, ReadPrompt, read_prompt
from quire.engine.step_figures import StepNotes, finished
from quire.errors import ValidationError
from quire.grammar import Grammars
from quire.text.answer_format import thinking_marks
from quire.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the Engine itself must know, settled before it starts."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()  # the tokenizer's own first, then those of the generation config
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    seed: int = 0
    default_params: SamplingParams = field(default_factory=SamplingParams)  # for requests that bring none
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    with_metrics: bool = True  # fill RequestOutput.metrics
    fair: bool = False  # tenants share the engine
    model_names: tuple[str, ...] = ()  # under which clients know the model; the first one is reported


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that was checked and tokenized, ready for submit()."""

    request_id: str
    prompt: ReadPrompt
    params: SamplingParams
    priority: int
    arrival_time: float
    arrival: float
    tenant: str = ""
    deadline: float | None = None  # on the clock of `arrival`
    generated: tuple[int, ...] = ()  # the output so far, behind which it goes on


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the queue: 1 is next. `wait`: seconds until its turn, as far as that can be known."""

    number: int
    wait: float | None


class Engine:
    """The whole engine behind add(), abort() and step().

    >>> engine = Engine.from_options(EngineOptions())
    >>> engine.add("1", "Once upon a time")
    >>> while engine.has_work():
    ...     for output in engine.step():
    ...         print(output.outputs[0].text)
    """

    def __init__(
        self,
        core: Core,
        tokenizer: Tokenizer | None,
        settings: EngineSettings,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
        grammars: Grammars | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.observer = observer
        self._core = core
        self._clock = clock
        self._grammars = grammars
        self._limits = PromptLimits(settings.max_model_len, settings.vocab_size)
        self._generations: dict[str, Generation] = {}
        self._completions: dict[str, Completion] = {}  # live ones, by their id in the core
        # What is on its way through a step, kept here so that nothing is lost when one raises in its middle.
        self._events: deque[Event] = deque()
        self._changed: dict[str, Generation] = {}  # requests with news
        self._ready: list[RequestOutput] = []
        self._notes = StepNotes()
        self._told: Stats | None = None  # what the observer heard last
        self._numbers = count()
        self._deadlines: list[tuple[float, str]] = []  # of requests that have one, the earliest first
        self._admission = AdmissionControl(
            Limits(settings.max_num_queued_reqs, settings.max_num_queued_tokens, settings.fair)
        )
        # Many requests bring the same wishes; making them costs as much as a token of a small model.
        self._resolve = lru_cache(256)(self._resolved)

    @classmethod
    def from_options(
        cls,
        options: EngineOptions,
        observer: Observer | None = None,
        on_phase: Callable[[str, float | None], None] | None = None,
    ) -> Engine:
        """Find, load and start a model; `on_phase` is told each phase and its seconds. Raises as start_engine does."""
        prefetch.begin(options)
        # Imported here: torch and the model come with it, and an Engine over another executor needs neither.
        with uncollected():
            from quire.engine.start import start_engine

        return start_engine(options, observer, on_phase)

    # ---------------------------------------------------------------- requests in

    def prepare(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        add_special_tokens: bool = True,
        tenant: str = "",
        timeout: float | None = None,
    ) -> Prepared:
        """Check and tokenize a request without touching the engine; safe in any thread. Raises ValidationError.

        `tenant`: with whom the engine is shared fairly. `timeout`: seconds from now on that the request may take.
        """
        now, today = self._clock(), time.time()
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValidationError("timeout must be a number of seconds above 0", "timeout", timeout)
        if params is None:
            params = self.settings.default_params
        elif not isinstance(params, SamplingParams):
            raise ValidationError(f"params must be SamplingParams, found {type(params).__name__}", "params")
        if params.structured_outputs is not None:
            if self._grammars is None:
                raise ValidationError("structured_outputs needs a tokenizer with an end token", "structured_outputs")
            self._grammars.check(params.structured_outputs)
        read = read_prompt(prompt, self.tokenizer, self._limits, add_special_tokens)
        params.check_prompt(len(read.token_ids))
        room = self.settings.max_model_len - len(read.token_ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        deadline = None if timeout is None else now + timeout
        return Prepared(request_id, read, self._resolve(params, limit), priority, today, now, tenant, deadline)

    def _resolved(self, params: SamplingParams, limit: int) -> SamplingParams:
        """Fill in what only the engine knows: ids of stops and bad words, the longest output."""
        params.check(self.settings.vocab_size, self.settings.max_logprobs)
        if self.tokenizer is None:
            if params.stop or params.bad_words:
                name = "stop" if params.stop else "bad_words"
                raise ValidationError(f"{name} needs a tokenizer, and this engine runs without one", name)
            if params.detokenize:
                params = replace(params, detokenize=False)
        return params.resolved(
            max_tokens=limit,
            thinking=self._thinking_marks(params),
            eos_token_ids=self.settings.eos_token_ids,
            bad_words_token_ids=self._bad_word_ids(params.bad_words),
        )

    def _thinking_marks(self, params: SamplingParams) -> ThinkingMarks | None:
        """How thoughts are marked where a budget needs that and nobody has said it: as the chat template shows."""
        if params.thinking_token_budget is None or params.thinking is not None:
            return params.thinking
        found = None if self.tokenizer is None else thinking_marks(self.tokenizer)
        if found is None:
            raise ValidationError(
                "thinking_token_budget needs a model whose chat template shows how thoughts are marked, or the option "
                "reasoning_parser",
                "thinking_token_budget",
            )
        return found

    def _bad_word_ids(self, words: Sequence[str]) -> list[tuple[int, ...]]:
        """Token sequences that spell the words, at the start of a text and after a space."""
        if not words:
            return []
        assert self.tokenizer is not None, "bad words were refused without a tokenizer"
        found: list[tuple[int, ...]] = []
        for word in words:
            bare = tuple(self.tokenizer.encode(word.lstrip(" "), add_special_tokens=False))
            spaced = tuple(self.tokenizer.encode(" " + word.lstrip(" "), add_special_tokens=False))
            found.append(bare)
            if spaced[-len(bare) :] != bare:  # else forbidding `bare` forbids it too
                found.append(spaced)
        return [ids for ids in dict.fromkeys(found) if ids]

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0) -> None:
        """Take in a request; its outputs come from step(). Raises ValidationError, CapacityError, OverloadedError."""
        self.submit(self.prepare(request_id, prompt, params, priority))

    def submit(self, prepared: Prepared) -> None:
        """Take in a prepared request.

        Raises ValidationError for an id in use, OverloadedError for a full queue, DeadlineError for too little time.
        """
        if prepared.request_id in self._generations:
            raise ValidationError(f"A request with id {prepared.request_id!r} is already running", "request_id")
        self._check_queue(prepared)
        params = prepared.params
        generation = Generation(
            prepared.request_id,
            prepared.prompt,
            params,
            prepared.arrival_time,
            prepared.arrival,
            queued_ts=self._clock(),
            unfinished=params.n,
            deadline=prepared.deadline,
        )
        seed = params.seed if params.seed is not None else self._draw_seed()
        added: list[str] = []
        try:
            for index in range(params.n):
                core_id = prepared.request_id if params.n == 1 else f"{index}_{prepared.request_id}"
                self._core.add(
                    CoreRequest(
                        request_id=core_id,
                        prompt_token_ids=prepared.prompt.token_ids,
                        params=params,
                        seed=_wrap(seed + index),
                        priority=prepared.priority,
                        arrival=prepared.arrival,
                        salt=prepared.prompt.salt,
                        generated=prepared.generated,
                        tenant=prepared.tenant,
                        deadline=prepared.deadline,
                    )
                )
                added.append(core_id)
                generation.completions.append(Completion(generation, index, core_id, self.tokenizer))
        except Exception:
            for core_id in added:
                self._core.abort(core_id)
            raise
        self._generations[prepared.request_id] = generation
        if prepared.deadline is not None:
            heapq.heappush(self._deadlines, (prepared.deadline, prepared.request_id))
        self._completions.update((completion.core_id, completion) for completion in generation.completions)

    def _check_queue(self, prepared: Prepared) -> None:
        if self._admission.has_limits or prepared.deadline is not None:
            left = None if prepared.deadline is None else prepared.deadline - self._clock()
            self._admission.check(self._core.stats(), len(prepared.prompt.token_ids), prepared.tenant, left)

    def _draw_seed(self) -> int:
        """A seed for a request that brings none: a function of the engine's seed and the number of such requests."""
        text = f"{self.settings.seed}:{next(self._numbers)}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)

    def abort(self, request_ids: str | Iterable[str]) -> None:
        """End requests now. Each gets a last output with finish_reason "abort" from the next step; unknown ids pass."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            if request_id in self._generations:
                self._break_off(self._generations[request_id], "abort")

    def _break_off(self, generation: Generation, reason: FinishReason, error: str | None = None) -> None:
        """End what still runs of a request; its last output says why."""
        for completion in generation.completions:
            if completion.finish_reason is None:
                self._note_news(completion)
                self._core.abort(completion.core_id)
                completion.push(Event(completion.core_id, finish_reason=reason, error=error))
                self._end(completion, self._clock())

    def _note_news(self, completion: Completion) -> None:
        parent = completion.parent
        parent.news[completion.index] = completion
        self._changed[parent.request_id] = parent

    def _end_late(self, now: float) -> None:
        """End the requests whose time is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            generation = self._generations.get(request_id)
            if generation is not None and generation.deadline == deadline:  # else the id is another request's by now
                self._break_off(generation, "error", LATE)

    # ---------------------------------------------------------------- outputs out

    @property
    def resumable(self) -> bool:
        """Whether step() may be called again after it has raised anything but EngineDeadError."""
        return self._core.resumable

    @property
    def has_more(self) -> bool:
        """Whether step(at_most) has not yet told all that the core did last."""
        return bool(self._events)

    def has_work(self) -> bool:
        """Whether step() would bring anything."""
        return bool(self._events or self._changed or self._ready) or self._core.has_work()

    def interrupt(self) -> None:
        """Let a step() that waits in another thread return. Safe in any thread."""
        self._core.interrupt()

    def step(self, at_most: int | None = None) -> list[RequestOutput]:
        """Run one step of the core and return what changed. A failed request ends with finish_reason "error".

        With `at_most` no more than so many of its events are told. Then has_more says so, and the next call goes on with
        them in place of another step.
        """
        if not self._events:
            self._events.extend(self._core.step())
        now = self._clock()
        for _ in range(min(len(self._events), at_most or len(self._events))):
            self._take(self._events[0], now)
            self._events.popleft()
        self._end_late(now)
        for request_id, generation in list(self._changed.items()):
            output = self._output(generation)
            if output is not None:
                self._ready.append(output)
            del self._changed[request_id]
        if not self._events:
            self._observe(now)
        outputs, self._ready = self._ready, []
        return outputs

    def _take(self, event: Event, now: float) -> None:
        """One event. Whatever goes wrong on the way to its text ends its completion and no other."""
        completion = self._completions.get(event.request_id)
        if completion is None:  # ended by a stop string or an abort while the step ran
            return
        parent = completion.parent
        try:
            if event.prompt_logprobs and completion.index == 0:
                parent.note_prompt_logprobs(event.prompt_logprobs, self.tokenizer)
            if event.tokens:
                if self.observer is not None:
                    self._notes.tokens(completion, event, now)
                completion.first_token = completion.first_token or now
                completion.last_token = now
            if event.times:
                parent.scheduled_ts = parent.scheduled_ts or event.times.get("scheduled", 0.0)
                if completion.index == 0:
                    parent.cached_tokens = event.cached_tokens
            stopped = completion.push(event)
            if completion.finish_reason is not None:
                parent.preemptions += event.preemptions
                if stopped:
                    self._core.abort(completion.core_id)
                self._end(completion, now)
            if parent.streams or not parent.unfinished:
                self._note_news(completion)
        except Exception as error:
            logger.exception("request %s failed on the way from tokens to text", event.request_id)
            self._fail(completion, error, now)
            self._note_news(completion)

    def _fail(self, completion: Completion, error: Exception, now: float) -> None:
        """End a completion with an error, unless it has ended."""
        if completion.core_id not in self._completions:
            return
        completion.finish_reason, completion.stop_reason = "error", None
        completion.error = f"turning tokens into text failed: {type(error).__name__}: {error}"
        self._core.abort(completion.core_id)
        self._end(completion, now)

    def _end(self, completion: Completion, now: float) -> None:
        """The completion takes no more events."""
        del self._completions[completion.core_id]
        completion.parent.unfinished -= 1
        self._notes.finished.append(finished(completion, now))

    def _output(self, generation: Generation) -> RequestOutput | None:
        """What a request has to tell. One whose output cannot be made ends with an error."""
        try:
            output = generation.output(self.settings.with_metrics)
        except Exception as error:
            logger.exception("the output of request %s cannot be made", generation.request_id)
            for completion in generation.completions:
                self._fail(completion, error, self._clock())
            output = generation.failure(f"{type(error).__name__}: {error}")
        if generation.unfinished == 0:
            self._generations.pop(generation.request_id).completions.clear()  # they know it: all are gone at once
        return output

    def _observe(self, now: float) -> None:
        """Tell the observer, whose mistakes are its own."""
        notes, self._notes = self._notes, StepNotes()
        if self.observer is None:
            return
        stats = self._core.stats()
        self._admission.note(stats, now)
        try:
            if notes.finished or stats != self._told:  # a core in another process may have nothing new to say
                self._told = stats
                self.observer.observe(stats, notes.figures(now))
        except Exception:
            logger.exception("the figures of a step are lost")

    # ---------------------------------------------------------------- the rest

    def stats(self) -> Stats:
        """Counters of the scheduler."""
        return self._core.stats()

    def place(self, request_id: str) -> Place | None:
        """Where a request stands in the queue; None for one that does not wait."""
        generation = self._generations.get(request_id)
        waiting = [item.core_id for item in generation.completions if not item.token_ids] if generation else []
        found = [before for before in map(self._core.before, waiting) if before is not None]
        if not found:
            return None
        first = min(found, key=_requests)
        return Place(first.requests + 1, self._admission.wait_behind(self._core.stats(), first))

    def picture(self) -> Picture | None:
        """How the pages lie, now or a moment ago; None while that is not known."""
        return self._core.picture()

    def reset_prefix_cache(self) -> bool:
        """Forget all cached pages. False when requests still hold some."""
        return self._core.reset_prefix_cache()

    def close(self) -> None:
        """Stop the workers and free what they hold. Requests still running get no further output."""
        if self._grammars is not None:
            self._grammars.close()
        self._core.close()


def _requests(queue: Queue) -> int:
    return queue.requests


def _wrap(seed: int) -> int:
    """`seed` as a signed 64-bit integer, which is what the generator takes."""
    return (seed + 2**63) % 2**64 - 2**63

"""Executor: carries a plan to the workers and the result back. LocalExecutor runs one worker in this process;
FakeExecutor runs no model at all: its "model" is a function of the tokens so far.

Of this folder only this file and those that start an engine may know that there is a worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from quire.core.plan import SpanResult, StepPlan, StepResult, TokenLogprobs
from quire.errors import EngineError

if TYPE_CHECKING:
    from quire.resolve import EngineConfig
    from quire.worker.worker import Worker


def load_worker(config: EngineConfig) -> Worker:
    """A worker for this configuration, with nothing loaded yet."""
    # Imported here: the fake executor of this file must not need torch.
    from quire.worker.worker import Worker, WorkerSetup

    return Worker(
        WorkerSetup(
            files=config.files,
            options=config.options.model,
            device=config.device,
            dtype=config.dtype,
            cache_dtype=config.cache_dtype,
            threads=config.threads,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            max_num_batched_tokens=config.max_num_batched_tokens,
            speculation=config.speculation,
            draft=config.draft,
        )
    )


class Handle(Protocol):
    """A submitted plan."""

    def result(self) -> StepResult:
        """Wait for the step. Raises what the step raised."""
        ...


class Executor(Protocol):
    """Plans go in by submit() and are run in that order."""

    def submit(self, plan: StepPlan) -> Handle:
        """Start the plan, without waiting for it where the executor can."""
        ...

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of every worker and return what the first one returned."""
        ...

    def close(self) -> None:
        """Stop the workers and give back what they hold."""
        ...


@dataclass(slots=True)
class Done:
    """A handle whose step has run: it holds the result, or what was raised."""

    outcome: StepResult | None
    error: Exception | None = None

    def result(self) -> StepResult:
        """The result; raises what the step raised."""
        if self.outcome is None:
            raise self.error or EngineError("the step brought no result")
        return self.outcome


class LocalExecutor:
    """One worker in this process: in the caller's thread, or in a thread of its own so that plans can queue up."""

    def __init__(self, worker: Worker, threaded: bool = False) -> None:
        self._worker = worker
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quire-worker") if threaded else None

    def submit(self, plan: StepPlan) -> Handle:
        """Run the plan at once, or queue it for the worker's thread."""
        if self._pool is not None:
            return self._pool.submit(self._worker.run, plan)
        try:
            return Done(self._worker.run(plan))
        except Exception as error:
            return Done(None, error)

    def call(self, method: str, *args: Any) -> Any:
        """Run a method of the worker, behind the plans that were submitted before."""
        function = getattr(self._worker, method)
        if self._pool is not None:
            return self._pool.submit(function, *args).result()
        return function(*args)

    def close(self) -> None:
        """Wait for running plans, then close the worker."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None
        self._worker.close()


NextToken = Callable[[tuple[int, ...]], int]


class FakeExecutor:
    """An executor for tests and demonstrations: next_token(tokens so far) is the model.

    Rows hold their tokens exactly as a worker's slots do, so a plan that does not follow the rules fails here too.
    A next_token that raises fails its own request. `delay` is slept in each step, in seconds. Asked for logprobs, it
    reports the chosen token with log-probability -1.0 and nothing else.
    """

    def __init__(self, next_token: NextToken, delay: float = 0.0, threaded: bool = False) -> None:
        self._next_token = next_token
        self._delay = delay
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="quire-fake") if threaded else None
        self._rows: dict[int, _FakeRow] = {}
        self.plans: list[StepPlan] = []  # every plan that was run, for tests to look at

    def submit(self, plan: StepPlan) -> Handle:
        """Run the plan at once, or in the thread."""
        if self._pool is not None:
            return self._pool.submit(self._run, plan)
        return Done(self._run(plan))

    def call(self, method: str, *args: Any) -> Any:
        """There is no worker to call."""
        raise EngineError(f"a FakeExecutor has no method {method!r}")

    def close(self) -> None:
        """Stop the thread, if any."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)
            self._pool = None

    def _run(self, plan: StepPlan) -> StepResult:
        began = time.perf_counter()
        self.plans.append(plan)
        for slot in plan.released:
            self._rows.pop(slot, None)
        for new in plan.admitted:
            assert new.slot not in self._rows, f"slot {new.slot} is taken"
            logprobs = getattr(new.params, "logprobs", None)
            self._rows[new.slot] = _FakeRow(list(new.token_ids), new.prompt_len, logprobs is not None)
        results = tuple(self._run_span(span.slot, span.start + span.count, span.sample) for span in plan.spans)
        if self._delay:
            time.sleep(self._delay)
        return StepResult(plan.step, results, time.perf_counter() - began)

    def _run_span(self, slot: int, end: int, sample: bool) -> SpanResult:
        row = self._rows[slot]
        assert end <= len(row.tokens), "a span reaches past the tokens known"
        if not sample:
            return SpanResult(slot)
        try:
            token = int(self._next_token(tuple(row.tokens[:end])))
        except Exception as error:
            return SpanResult(slot, error=f"{type(error).__name__}: {error}")
        row.tokens[end:] = [token]
        logprobs = (TokenLogprobs((token,), (-1.0,), (1,)),) if row.logprobs else ()
        return SpanResult(slot, (token,), logprobs)


@dataclass(slots=True)
class _FakeRow:
    """One row of the fake worker."""

    tokens: list[int]
    prompt_len: int
    logprobs: bool

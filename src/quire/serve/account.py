"""Account: where the time of one request went, as its answer and the log tell it.

Made of the times that come with the engine's outputs. Knows no engine and no route.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from quire.engine.outputs import RequestMetrics, RequestOutput
from quire.serve.caller import Caller
from quire.serve.progress import Progress


@dataclass(slots=True)
class Account:
    """One request, from its begin to its end. Of several prompts, the times are those of the last one to finish."""

    id: str = ""
    caller: Caller = field(default_factory=Caller)
    progress: Progress = field(default_factory=Progress)
    began: float = field(default_factory=time.monotonic)
    ended: float | None = None
    ending: str = "client left"
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    _times: RequestMetrics | None = None
    _steps: int = 0
    _rows: int = 0
    _restarts: int = 0

    def open(self, request_id: str, caller: Caller, progress: Progress) -> None:
        """The request goes to the engine now."""
        self.id, self.caller, self.progress = request_id, caller, progress
        self.began = time.monotonic()
        self._steps, self._rows, self._restarts = progress.steps, progress.rows, progress.stats.restarts

    def note(self, output: RequestOutput) -> None:
        """Something came."""
        for completion in output.outputs:
            self.output_tokens += len(completion.token_ids)
        if not output.finished:
            return
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self._times = output.metrics
        if output.metrics is not None:
            self.preemptions += output.metrics.num_preemptions
        reasons = [completion.finish_reason for completion in output.outputs if completion.finish_reason]
        self.ending = "/".join(dict.fromkeys(reasons)) or self.ending

    def fail(self, error: BaseException) -> None:
        """It ended otherwise than by its last output."""
        if isinstance(error, Exception):
            self.ending = f"failed ({type(error).__name__})"
        elif not isinstance(error, GeneratorExit):
            self.ending = "client left"

    def close(self) -> None:
        """It is over."""
        self.ended = time.monotonic()

    # ---------------------------------------------------------------- what it tells

    @property
    def seconds(self) -> float:
        """From its begin to its end, or until now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.began

    @property
    def phases(self) -> tuple[float, float, float]:
        """Seconds in the queue, on the prompt, and on the output; a phase that is not known is 0."""
        times = self._times
        if times is None or not times.scheduled_ts or not times.first_token_ts:
            return 0.0, 0.0, 0.0
        return (
            max(0.0, times.scheduled_ts - self.began),
            max(0.0, times.first_token_ts - times.scheduled_ts),
            max(0.0, times.last_token_ts - times.first_token_ts),
        )

    @property
    def restarts(self) -> int:
        """How often the engine was started anew meanwhile, and this request with it."""
        return self.progress.stats.restarts - self._restarts

    @property
    def mates(self) -> float:
        """How many other requests ran beside it, on average over the steps of its life."""
        steps = self.progress.steps - self._steps
        return max(0.0, (self.progress.rows - self._rows) / steps - 1) if steps > 0 else 0.0

    def usage(self) -> dict[str, Any]:
        """What an answer carries as usage.quire."""
        queue, prefill, decode = self.phases
        return {
            "queue_ms": round(1e3 * queue, 3),
            "prefill_ms": round(1e3 * prefill, 3),
            "decode_ms": round(1e3 * decode, 3),
            "total_ms": round(1e3 * self.seconds, 3),
            "cached_tokens": self.cached_tokens,
            "preemptions": self.preemptions,
            "restarts": self.restarts,
            "mean_batch_mates": round(self.mates, 2),
            "why": self.why(),
        }

    def why(self) -> str:
        """One sentence on what took most of the time."""
        queue, prefill, decode = self.phases
        total = max(self.seconds, 1e-9)
        if not queue + prefill + decode:
            return f"It took {total:.2f} s; the engine tells no times of its parts."
        longest = max(queue, prefill, decode)
        share = f"{longest / total:.0%} of {total:.2f} s"
        if longest == queue:
            text = f"{share} went by waiting for room, {self._company()}"
        elif longest == prefill:
            computed = self.prompt_tokens - self.cached_tokens
            text = f"{share} went into its prompt: {computed} of {self.prompt_tokens} tokens had to be computed"
        else:
            each = 1e3 * decode / max(1, self.output_tokens - 1)
            text = f"{share} went into its {self.output_tokens} tokens, one every {each:.1f} ms, {self._company()}"
        if self.preemptions:
            text += f"; it gave way {self.preemptions} times and was computed again"
        if self.restarts:
            text += f"; the engine was started anew {self.restarts} times meanwhile"
        return f"{text}."

    def _company(self) -> str:
        return "alone" if self.mates < 0.05 else f"beside {self.mates:.1f} other requests"

    def line(self) -> str:
        """What the log says at the end."""
        queue, prefill, decode = self.phases
        return (
            f"{self.id} {self.ending}: {self.prompt_tokens} tokens in ({self.cached_tokens} cached), "
            f"{self.output_tokens} out, {self.seconds:.2f} s "
            f"(queue {queue:.2f}, prefill {prefill:.2f}, decode {decode:.2f})"
        )

    def record(self) -> dict[str, Any]:
        """The same for a log in JSON."""
        return {
            "id": self.id,
            "tenant": self.caller.tenant or None,
            "trace_id": None if self.caller.trace is None else self.caller.trace.trace_id,
            "ending": self.ending,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            **self.usage(),
        }

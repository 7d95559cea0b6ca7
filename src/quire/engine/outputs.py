"""What a caller gets back: RequestOutput with its CompletionOutputs, log-probabilities and times.

Plain data, made by engine.py and read by llm.py, serve/ and users. Knows nothing of schedulers or workers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.core.plan import FinishReason
from quire.engine.logprobs import PromptLogprobs, SampleLogprobs


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request: arrival in Unix seconds, the `_ts` fields on the monotonic clock, 0.0 when not reached."""

    arrival_time: float = 0.0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    num_generation_tokens: int = 0
    num_preemptions: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One continuation of a prompt.

    `token_ids` includes the token that ended it; `text` does not, unless include_stop_str_in_output was asked for.
    With output_kind DELTA, text, token_ids and logprobs hold only what is new since the last output.
    When `finish_reason` is "error", `error` says what happened; other requests were not touched.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: SampleLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request. `outputs` is sorted by index.

    FINAL_ONLY: one RequestOutput with all n completions. CUMULATIVE and DELTA: one per step, with the completions
    that changed in it. Only the last one has `finished` set, and with DELTA it alone has `metrics`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: PromptLogprobs | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    # For prompt_logprob_token_ids: a row for each scored token of the prompt, in it a value for each id; -inf for id -1.
    prompt_token_id_logprobs: list[list[float]] | None = None

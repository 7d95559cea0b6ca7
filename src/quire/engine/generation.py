"""One request on its way: its completions, their text and log-probabilities, and the outputs made from them.

Owned by the Engine's thread. Knows Streams and events; knows no scheduler and no executor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from quire.core.params import RequestOutputKind, SamplingParams
from quire.core.plan import Event, FinishReason, TokenLogprobs
from quire.engine.logprobs import FlatLogprobs, PromptLogprobs, SampleLogprobs, named_logprobs
from quire.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from quire.engine.prompts import ReadPrompt
from quire.text.stream import Stream
from quire.text.tokenizer import Tokenizer


class Completion:
    """One of the n continuations of a prompt: everything that has come so far."""

    __slots__ = (
        "core_id",
        "cumulative_logprob",
        "error",
        "finish_reason",
        "first_token",
        "index",
        "last_token",
        "logprobs",
        "parent",
        "stop_reason",
        "token_ids",
        "_read_tokens",
        "_reads_at_once",
        "_shown_tokens",
        "_stream",
        "_tokenizer",
    )

    def __init__(self, parent: Generation, index: int, core_id: str, tokenizer: Tokenizer | None) -> None:
        params = parent.params
        self.parent = parent
        self.index = index
        self.core_id = core_id
        self.token_ids: list[int] = []
        self.logprobs: SampleLogprobs | None = None
        if params.logprobs is not None:
            self.logprobs = FlatLogprobs() if params.flat_logprobs else []
        self.cumulative_logprob = None if params.logprobs is None else 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.first_token = 0.0
        self.last_token = 0.0
        self._tokenizer = tokenizer
        self._stream = (
            Stream(tokenizer, params, parent.prompt.token_ids) if tokenizer is not None and params.detokenize else None
        )
        # Where no text can end the completion, tokens are read when their text is shown, many in one go.
        self._reads_at_once = bool(params.stop)
        self._read_tokens = 0  # by the stream
        self._shown_tokens = 0  # by an output

    def push(self, event: Event) -> bool:
        """Take in an event. True when a stop string ended the completion, which the core does not know yet."""
        self.token_ids.extend(event.tokens)
        if event.logprobs and self.logprobs is not None:
            for entry in event.logprobs:
                if isinstance(self.logprobs, FlatLogprobs):
                    self.logprobs.add(entry, self._tokenizer)
                else:
                    self.logprobs.append(named_logprobs(entry, self._tokenizer))
                self.cumulative_logprob = (self.cumulative_logprob or 0.0) + entry.logprobs[0]
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.stop_reason = event.stop_reason
            self.error = event.error
        if self._reads_at_once or event.finish_reason is not None:
            return self._read(ended=event.finish_reason == "stop" and bool(event.tokens))
        return False

    def _read(self, ended: bool = False) -> bool:
        """Turn new tokens into text. `ended`: the last of them ended the completion, and shows only when asked for.

        True when a stop string did, which the core does not know yet.
        """
        stream = self._stream
        if stream is None:
            return False
        tokens = self.token_ids[self._read_tokens :]
        self._read_tokens = len(self.token_ids)
        delta = stream.push(tokens, ended)
        if delta.stop is not None:
            ended_by_core = self.finish_reason is not None
            self.finish_reason, self.stop_reason = "stop", delta.stop
            self._drop(len(tokens) - delta.used)
            return not ended_by_core
        if self.finish_reason is not None:
            stream.finish()
        return False

    def _drop(self, count: int) -> None:
        """Take back the last tokens: they came after a stop string."""
        if count:
            del self.token_ids[-count:]
            if self.logprobs is not None:
                self.logprobs = self.logprobs[:-count]
                self.cumulative_logprob = sum(next(iter(entry.values())).logprob for entry in self.logprobs if entry)

    def is_due(self, interval: int) -> bool:
        """Whether there is enough to show: the first token, `interval` of them, or the end."""
        fresh = len(self.token_ids) - self._shown_tokens
        return fresh >= interval or not self._shown_tokens or self.finish_reason is not None

    def output(self, delta: bool) -> CompletionOutput:
        """What to show now: everything, or, each time with `delta`, only what is new since the last call."""
        first = self._shown_tokens if delta else 0
        self._shown_tokens = len(self.token_ids)
        text = ""
        if self._stream is not None:
            if self._read_tokens < len(self.token_ids):
                self._read()
            text = self._stream.take() if delta else self._stream.text
        token_ids = self.token_ids[first:]
        logprobs = None if self.logprobs is None else self.logprobs[first:]
        return CompletionOutput(
            self.index,
            text,
            token_ids,
            self.cumulative_logprob,
            logprobs,
            self.finish_reason,
            self.stop_reason,
            self.error,
        )


@dataclass(slots=True)
class Generation:
    """A request as the caller made it, with its n completions."""

    request_id: str
    prompt: ReadPrompt
    params: SamplingParams
    arrival_time: float  # Unix seconds
    arrival: float  # monotonic seconds
    completions: list[Completion] = field(default_factory=list)
    news: dict[int, Completion] = field(default_factory=dict)  # those that changed since the last output, by index
    prompt_logprobs: PromptLogprobs | None = None
    prompt_rows: list[list[float]] | None = None  # those of the tokens that the request names
    prompt_scored: int = 0  # tokens of the prompt
    cached_tokens: int = 0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    preemptions: int = 0
    unfinished: int = 0
    deadline: float | None = None  # monotonic seconds
    prompt_token_ids: list[int] = field(init=False)  # one list for all outputs: copying it in each step would add up
    streams: bool = field(init=False)  # whether the caller wants outputs before the end
    delta: bool = field(init=False)  # and in each of them only what is new

    def __post_init__(self) -> None:
        """Fill in what follows from the rest."""
        self.prompt_token_ids = list(self.prompt.token_ids)
        self.streams = self.params.output_kind is not RequestOutputKind.FINAL_ONLY
        self.delta = self.params.output_kind is RequestOutputKind.DELTA
        if self.params.prompt_logprob_token_ids is not None:
            self.prompt_rows = []
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
            if self.params.flat_logprobs:
                self.prompt_logprobs = FlatLogprobs()
                self.prompt_logprobs.add(None, None)

    def note_prompt_logprobs(self, entries: tuple[TokenLogprobs, ...], tokenizer: Tokenizer | None) -> None:
        """Append the log-probabilities of further prompt tokens, up to the prompt's end."""
        room = len(self.prompt.token_ids) - 1 - self.prompt_scored
        for entry in entries[:room]:
            row = self.params.prompt_row(self.prompt_scored)
            self.prompt_scored += 1
            if row:  # the last tokens of the entry
                best = len(entry.token_ids) - len(row)
                values = zip(row, entry.logprobs[best:], strict=True)
                assert self.prompt_rows is not None, "a request that names tokens has rows"
                self.prompt_rows.append([-math.inf if token == -1 else value for token, value in values])
                entry = TokenLogprobs(entry.token_ids[:best], entry.logprobs[:best], entry.ranks[:best])
            if isinstance(self.prompt_logprobs, FlatLogprobs):
                self.prompt_logprobs.add(entry, tokenizer)
            elif self.prompt_logprobs is not None:
                self.prompt_logprobs.append(named_logprobs(entry, tokenizer))

    def output(self, with_metrics: bool) -> RequestOutput | None:
        """The RequestOutput for the completions with news, None when the caller wants to wait for the end."""
        changed = list(self.news.values())
        if len(changed) > 1:
            changed.sort(key=lambda completion: completion.index)
        self.news.clear()
        finished = self.unfinished == 0
        if not self.streams:
            if not finished:
                return None
            changed = self.completions
        elif self.params.stream_interval is not None:
            changed = [completion for completion in changed if completion.is_due(self.params.stream_interval)]
        delta = self.delta
        outputs: list[CompletionOutput] = []
        for completion in changed:
            item = completion.output(delta)
            # Text may be held back for a stop string, or wait for the rest of a character.
            if item.token_ids or item.text or item.finish_reason or finished or not delta:
                outputs.append(item)
        if not outputs:
            return None
        return RequestOutput(
            self.request_id,
            self.prompt.text,
            self.prompt_token_ids,
            self.prompt_logprobs,
            outputs,
            finished,
            self.metrics() if with_metrics and (finished or not delta) else None,
            self.cached_tokens,
            self.prompt_rows,
        )

    def failure(self, error: str) -> RequestOutput:
        """The last output of a request whose outputs cannot be made."""
        lost = [CompletionOutput(index, "", [], None, None, "error", None, error) for index in range(self.params.n)]
        return RequestOutput(self.request_id, self.prompt.text, self.prompt_token_ids, None, lost, True)

    def metrics(self) -> RequestMetrics:
        """The times so far."""
        firsts = [completion.first_token for completion in self.completions if completion.first_token]
        first = min(firsts, default=0.0)
        return RequestMetrics(
            arrival_time=self.arrival_time,
            queued_ts=self.queued_ts,
            scheduled_ts=self.scheduled_ts,
            first_token_ts=first,
            last_token_ts=max((completion.last_token for completion in self.completions), default=0.0),
            first_token_latency=first - self.arrival if first else 0.0,
            num_generation_tokens=sum(len(completion.token_ids) for completion in self.completions),
            num_preemptions=self.preemptions,
        )

"""Metrics: what the engine tells after each step, added up and shown to Prometheus under the prefix `quire:`.

Adding up must be cheap, for it happens in the engine's thread: plain numbers here, families of prometheus-client only
when somebody asks. Knows the Observer's figures, no request and no text.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from quire.core.stats import Stats
from quire.engine.observe import FinishedRequest, StepFigures
from quire.engine.tallies import Tallies

PREFIX = "quire:"
COUNTS = PREFIX + "counts"  # the name of the plain counters among the tallies
REASONS = ("stop", "length", "abort", "error", "repetition")

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
BETWEEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    80.0,
)
REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
COMPLETIONS = (1, 2, 5, 10, 20)


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    bounds: list[int] = []
    scale = 1
    while scale <= most:
        bounds.extend(step * scale for step in (1, 2, 5) if step * scale <= most)
        scale *= 10
    return tuple(bounds)


class Histogram:
    """Counts of values by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count a value that was seen so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), as Prometheus wants them."""
        shown, seen = [], 0
        for bound, count in zip([*map(float, self.bounds), "+Inf"], list(self.counts), strict=True):
            seen += count
            shown.append((str(bound), float(seen)))
        return shown


class Counted(Collector):
    """A collector of what one process counts, which can show what several have counted together."""

    @abstractmethod
    def tallies(self) -> Tallies:
        """What was counted so far, under names that no other collector of the process has."""

    @abstractmethod
    def showing(self, tallies: Tallies) -> Counted:
        """A collector of the same kind that shows these instead of its own; names that are not its own pass."""


class Metrics(Counted):
    """The Observer of one engine. `registry` holds what /metrics shows; labels are model_name and engine."""

    def __init__(self, model_name: str, max_model_len: int, engine: str = "0") -> None:
        self.registry = CollectorRegistry()
        self._labels = [model_name, engine]
        self._most = max_model_len
        self._stats = Stats()
        self._generated = 0
        self._prompt = 0
        self._cached = 0
        self._reasons = dict.fromkeys(REASONS, 0)
        tokens = token_bounds(max_model_len)
        self._first = Histogram(FIRST_TOKEN_SECONDS)
        self._between = Histogram(BETWEEN_SECONDS)
        self._per_token = Histogram(BETWEEN_SECONDS)
        self._whole = Histogram(REQUEST_SECONDS)
        self._queued = Histogram(REQUEST_SECONDS)
        self._inference = Histogram(REQUEST_SECONDS)
        self._prefill = Histogram(REQUEST_SECONDS)
        self._decode = Histogram(REQUEST_SECONDS)
        self._step_tokens = Histogram(STEP_TOKENS)
        self._prompt_sizes = Histogram(tokens)
        self._generation_sizes = Histogram(tokens)
        self._computed_sizes = Histogram(tokens)
        self._limits = Histogram(tokens)
        self._completions = Histogram(COMPLETIONS)
        self._config: dict[str, str] = {}
        self.registry.register(self)

    def set_config(self, config: dict[str, object]) -> None:
        """Settings of the page pool, shown as labels of cache_config_info."""
        self._config = {name: str(value) for name, value in config.items()}

    # ---------------------------------------------------------------- the engine's thread

    def observe(self, stats: Stats, figures: StepFigures) -> None:
        """Add up one step."""
        self._stats = stats
        self._prompt += figures.prompt_tokens
        self._cached += figures.cached_tokens
        self._generated += figures.generation_tokens
        tokens = figures.prompt_tokens + figures.generation_tokens
        if tokens:
            self._step_tokens.add(tokens)
        for seconds in figures.first_token_seconds:
            self._first.add(seconds)
        for seconds, tokens in figures.between_seconds.items():
            self._between.add(seconds, tokens)
        for request in figures.finished:
            self._finished(request)

    def _finished(self, request: FinishedRequest) -> None:
        self._reasons[request.reason] += 1
        self._whole.add(request.whole)
        self._queued.add(request.queued)
        self._prefill.add(request.prefill)
        self._decode.add(request.decode)
        self._inference.add(request.prefill + request.decode)
        if request.generation_tokens > 1:
            self._per_token.add(request.decode / (request.generation_tokens - 1))
        self._prompt_sizes.add(request.prompt_tokens)
        self._generation_sizes.add(request.generation_tokens)
        self._computed_sizes.add(request.prompt_tokens - request.cached_tokens)
        self._completions.add(request.n)
        if request.max_tokens is not None:
            self._limits.add(request.max_tokens)

    # ---------------------------------------------------------------- whoever asks

    def tallies(self) -> Tallies:
        """What this process has counted; the scheduler's figures are the same for all that share an engine."""
        counts: list[float] = [self._prompt, self._cached, self._generated, *self._reasons.values()]
        return {COUNTS: counts} | {
            PREFIX + name: [*histogram.counts, histogram.total] for name, _, histogram in self._histograms()
        }

    def showing(self, tallies: Tallies) -> Metrics:
        """Metrics of the same model with the counts of several processes."""
        found = Metrics(self._labels[0], self._most, self._labels[1])
        found._config, found._stats = self._config, self._stats
        found._prompt, found._cached, found._generated, *reasons = map(int, tallies[COUNTS])
        found._reasons = dict(zip(self._reasons, reasons, strict=True))
        for name, _, histogram in found._histograms():
            *counts, histogram.total = tallies[PREFIX + name]
            histogram.counts = list(map(int, counts))
        return found

    @property
    def stats(self) -> Stats:
        """The scheduler's figures after the latest step."""
        return self._stats

    def collect(self) -> Iterator[Metric]:
        """All families, for Prometheus."""
        yield from self._gauges()
        yield from self._counters()
        for name, help_text, histogram in self._histograms():
            family = HistogramMetricFamily(PREFIX + name, help_text, labels=["model_name", "engine"])
            family.add_metric(self._labels, histogram.buckets(), histogram.total)
            yield family

    def _gauges(self) -> Iterator[Metric]:
        stats = self._stats
        for name, help_text, value in (
            ("num_requests_running", "Requests that are being computed", stats.running),
            ("num_requests_waiting", "Requests that wait for room", stats.waiting),
            ("kv_cache_usage_perc", "Share of the pages in use, 0 to 1", stats.page_usage),
        ):
            family = GaugeMetricFamily(PREFIX + name, help_text, labels=["model_name", "engine"])
            family.add_metric(self._labels, value)
            yield family
        if self._config:
            info = GaugeMetricFamily(
                PREFIX + "cache_config_info", "Settings of the page pool", labels=["engine", *self._config]
            )
            info.add_metric([self._labels[1], *self._config.values()], 1)
            yield info

    def _counters(self) -> Iterator[Metric]:
        stats = self._stats
        for name, help_text, value in (
            ("prompt_tokens", "Prompt tokens processed", self._prompt),
            ("prompt_tokens_cached", "Prompt tokens found in the prefix cache", self._cached),
            ("generation_tokens", "Tokens generated", self._generated),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache", stats.cache_queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache", stats.cache_hits),
            ("num_preemptions", "Requests that gave their pages back and came again", stats.preemptions),
            ("spec_decode_num_drafts", "Spans that carried guessed tokens", stats.drafts),
            ("spec_decode_num_draft_tokens", "Guessed tokens", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Guessed tokens that were right", stats.accepted_tokens),
        ):
            family = CounterMetricFamily(PREFIX + name, help_text, labels=["model_name", "engine"])
            family.add_metric(self._labels, value)
            yield family
        success = CounterMetricFamily(
            PREFIX + "request_success",
            "Completions that ended, by reason",
            labels=["model_name", "engine", "finished_reason"],
        )
        for reason, count in self._reasons.items():
            success.add_metric([*self._labels, reason], count)
        yield success

    def _histograms(self) -> tuple[tuple[str, str, Histogram], ...]:
        return (
            ("time_to_first_token_seconds", "Arrival to first token", self._first),
            ("inter_token_latency_seconds", "Between two tokens of a completion", self._between),
            ("request_time_per_output_token_seconds", "Mean between two tokens of a completion", self._per_token),
            ("e2e_request_latency_seconds", "Arrival to last token", self._whole),
            ("request_queue_time_seconds", "Arrival to first scheduled", self._queued),
            ("request_inference_time_seconds", "First scheduled to last token", self._inference),
            ("request_prefill_time_seconds", "First scheduled to first token", self._prefill),
            ("request_decode_time_seconds", "First token to last token", self._decode),
            ("iteration_tokens_total", "Tokens of one step", self._step_tokens),
            ("request_prompt_tokens", "Prompt tokens of a completion", self._prompt_sizes),
            ("request_generation_tokens", "Generated tokens of a completion", self._generation_sizes),
            ("request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache", self._computed_sizes),
            ("request_params_max_tokens", "max_tokens of a completion", self._limits),
            ("request_params_n", "n of a completion's request", self._completions),
        )

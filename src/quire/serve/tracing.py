"""Tracing: one OpenTelemetry span for each request, under the names that vLLM's users know. An extra: quire[otel].

A request with a traceparent header continues the caller's trace. Knows accounts, no route and no engine.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import quire
from quire.core.params import SamplingParams
from quire.errors import ConfigError
from quire.serve.account import Account
from quire.serve.caller import Trace

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

SPAN = "llm_request"
LAST_SECONDS = 2.0  # that the last spans get


class Tracing:
    """Tells a provider of each finished request; `model` is the name that clients use."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._model = model
        self._tracer = provider.get_tracer("quire", quire.__version__)

    def note(self, account: Account, params: SamplingParams) -> None:
        """A request is over. Cheap: spans are sent by a thread of the provider."""
        # Imported here, as everywhere in this file: only who traces has the package.
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = time.time_ns()
        span = self._tracer.start_span(
            SPAN,
            context=_parent(account.caller.trace),
            kind=SpanKind.SERVER,
            start_time=end - int(1e9 * account.seconds),
            attributes={**self._attributes(account), **_wishes(params)},
        )
        if account.ending.startswith("failed"):
            span.set_status(Status(StatusCode.ERROR, account.ending))
        span.end(end)

    def _attributes(self, account: Account) -> dict[str, str | int | float]:
        queue, prefill, decode = account.phases
        return {
            "gen_ai.response.model": self._model,
            "gen_ai.request.id": account.id,
            "gen_ai.response.finish_reason": account.ending,
            "gen_ai.usage.prompt_tokens": account.prompt_tokens,
            "gen_ai.usage.completion_tokens": account.output_tokens,
            "gen_ai.usage.cached_tokens": account.cached_tokens,
            "gen_ai.latency.e2e": account.seconds,
            "gen_ai.latency.time_in_queue": queue,
            "gen_ai.latency.time_to_first_token": queue + prefill,
            "gen_ai.latency.time_in_model_prefill": prefill,
            "gen_ai.latency.time_in_model_decode": decode,
            "gen_ai.latency.time_in_model_inference": prefill + decode,
            "quire.preemptions": account.preemptions,
            "quire.restarts": account.restarts,
            "quire.mean_batch_mates": account.mates,
        }

    def close(self) -> None:
        """Send what is left, and give up after a moment: a collector that is not there holds up nobody's end."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(LAST_SECONDS)


def _wishes(params: SamplingParams) -> dict[str, int | float]:
    found: dict[str, int | float] = {
        "gen_ai.request.n": params.n,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
    }
    if params.max_tokens is not None:
        found["gen_ai.request.max_tokens"] = params.max_tokens
    return found


def _parent(trace: Trace | None) -> Context | None:
    """The caller's span, as OpenTelemetry wants it."""
    if trace is None:
        return None
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    flags = TraceFlags(int(trace.flags, 16))
    return set_span_in_context(
        NonRecordingSpan(SpanContext(int(trace.trace_id, 16), int(trace.span_id, 16), True, flags))
    )


def open_tracing(endpoint: str, model: str) -> Tracing:
    """Send spans to a collector: by HTTP where the address has a path, such as /v1/traces, else by gRPC.

    Raises ConfigError without the packages.
    """
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

        exporter: SpanExporter
        if urlsplit(endpoint).path.strip("/"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

            exporter = HttpExporter(endpoint)
        else:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

            exporter = GrpcExporter(endpoint, insecure=not endpoint.startswith("https"))
    except ImportError as error:
        raise ConfigError(
            f"--otlp-traces-endpoint needs OpenTelemetry, and it is not installed ({error}). Run: pip install 'quire[otel]'"
        ) from error
    provider = TracerProvider(resource=Resource.create({"service.name": "quire"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider, model)

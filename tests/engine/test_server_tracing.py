"""Traces: the caller's context goes through, and each request is a span where OpenTelemetry is wanted."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import Running, served

from quire.errors import ConfigError
from quire.serve.caller import read_trace
from quire.serve.tracing import Tracing, open_tracing
from waiting import until

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture
def traced() -> Iterator[tuple[Running, InMemorySpanExporter]]:
    """A server whose spans stay in memory."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    with served() as server:
        server.service.tracing = Tracing(provider, "parrot")
        yield server, memory


def test_a_request_is_a_span_of_the_callers_trace(traced: tuple[Running, InMemorySpanExporter]) -> None:
    server, memory = traced
    body = {"prompt": "say:hello;|", "temperature": 0.5, "max_tokens": 9}
    answer = server.http.post("/v1/completions", json=body, headers={"traceparent": PARENT, "X-Request-Id": "mine"})
    assert answer.headers["traceparent"] == PARENT
    (span,) = memory.get_finished_spans()
    assert span.name == "llm_request" and format(span.context.trace_id, "032x") == TRACE
    assert span.parent is not None and format(span.parent.span_id, "016x") == SPAN
    found = dict(span.attributes or {})
    assert found["gen_ai.request.id"] == "cmpl-mine" and found["gen_ai.response.model"] == "parrot"
    assert found["gen_ai.usage.completion_tokens"] == 6 and found["gen_ai.usage.prompt_tokens"] == 12
    assert found["gen_ai.request.temperature"] == 0.5 and found["gen_ai.request.max_tokens"] == 9
    assert found["gen_ai.latency.e2e"] >= found["gen_ai.latency.time_to_first_token"] > 0
    assert span.status.is_ok and span.end_time - span.start_time == pytest.approx(
        1e9 * float(found["gen_ai.latency.e2e"]), abs=1e8
    )


def test_a_request_that_fails_is_a_span_with_an_error(traced: tuple[Running, InMemorySpanExporter]) -> None:
    server, memory = traced
    assert server.http.post("/v1/completions", json={"prompt": "crash;|"}).status_code == 500
    until(lambda: bool(memory.get_finished_spans()))
    (span,) = memory.get_finished_spans()
    assert span.parent is None and not span.status.is_ok


@pytest.mark.parametrize(
    "header", ["", "x", PARENT.upper(), PARENT[:-1], f"00-{'0' * 32}-{SPAN}-01", f"ff-{TRACE}-{SPAN}-01"]
)
def test_a_malformed_header_counts_as_none(header: str) -> None:
    assert read_trace(header) is None


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry.sdk"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"quire\[otel\]"):
        open_tracing("http://localhost:4317", "parrot")

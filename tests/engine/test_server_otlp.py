"""Spans on their way to a collector: a small one listens here, over HTTP and over gRPC, and reads what arrives."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from served import served

from quire.serve.tracing import Tracing, open_tracing
from waiting import until

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
Take = Callable[[ExportTraceServiceRequest], None]


@contextmanager
def http_collector(take: Take) -> Iterator[str]:
    """A collector behind HTTP; its address."""

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/v1/traces" and self.headers["Content-Type"] == "application/x-protobuf"
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            take(ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/traces"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def grpc_collector(take: Take) -> Iterator[str]:
    """A collector behind gRPC; its address."""

    class Collector(TraceServiceServicer):
        def Export(self, request: ExportTraceServiceRequest, _: Any) -> ExportTraceServiceResponse:
            take(request)
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def values(attributes: Any) -> dict[str, Any]:
    """Attributes as a dictionary."""
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@pytest.mark.parametrize("collector", [http_collector, grpc_collector])
def test_spans_arrive_at_a_collector(collector: Callable[[Take], Any]) -> None:
    taken: list[ExportTraceServiceRequest] = []
    with collector(taken.append) as endpoint:
        with served() as server:
            server.service.tracing = open_tracing(endpoint, "parrot")
            headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "X-Request-Id": "mine"}
            body = {"prompt": "say:hello;|", "temperature": 0.5, "max_tokens": 9}
            assert server.http.post("/v1/completions", json=body, headers=headers).is_success
            assert server.http.post("/v1/completions", json={"prompt": "crash;|"}).status_code == 500
        until(lambda: sum(len(scope.spans) for one in taken for scope in one.resource_spans[0].scope_spans) >= 2)
    (resource,) = {one.resource_spans[0].resource.SerializeToString() for one in taken}
    assert b"service.name" in resource and b"quire" in resource
    scopes = [scope for one in taken for group in one.resource_spans for scope in group.scope_spans]
    assert {scope.scope.name for scope in scopes} == {"quire"}
    answered, failed = sorted((span for scope in scopes for span in scope.spans), key=lambda span: span.status.code)
    assert answered.name == failed.name == "llm_request" and answered.kind == Span.SPAN_KIND_SERVER
    assert answered.trace_id.hex() == TRACE and answered.parent_span_id.hex() == SPAN
    assert failed.trace_id.hex() != TRACE and not failed.parent_span_id
    assert answered.status.code == Status.STATUS_CODE_UNSET and failed.status.code == Status.STATUS_CODE_ERROR
    found = values(answered.attributes)
    assert found["gen_ai.request.id"] == "cmpl-mine" and found["gen_ai.response.model"] == "parrot"
    assert found["gen_ai.usage.prompt_tokens"] == 12 and found["gen_ai.usage.completion_tokens"] == 6
    assert found["gen_ai.request.temperature"] == 0.5 and found["gen_ai.request.max_tokens"] == 9
    seconds = (answered.end_time_unix_nano - answered.start_time_unix_nano) / 1e9
    assert seconds == pytest.approx(found["gen_ai.latency.e2e"], abs=0.1)
    assert abs(answered.end_time_unix_nano / 1e9 - time.time()) < 60
    assert not any("hello" in str(value) for value in found.values()), "no text of a request leaves the server"


def test_nobody_waits_for_a_collector_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        tracing: Tracing = open_tracing(f"http://127.0.0.1:{taken.getsockname()[1]}/v1/traces", "parrot")
        with served() as server:
            server.service.tracing = tracing
            for _ in range(20):
                assert server.http.post("/v1/completions", json={"prompt": "say:hello;|"}).is_success

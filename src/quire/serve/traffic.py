"""HTTP figures for Prometheus: answers by route, method and kind of status, and how long they took.

Routes that are asked by machines all the time (health, metrics) are left out. Knows no engine.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quire.engine.metrics import Counted, Histogram
from quire.engine.tallies import Tallies

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
LEFT_OUT = frozenset(("/metrics", "/health", "/livez", "/readyz", "/load", "/ping", "/version"))


class Traffic(Counted):
    """Adds up answers; one for each server."""

    def __init__(self) -> None:
        self._answers: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._seconds: defaultdict[tuple[str, str], Histogram] = defaultdict(lambda: Histogram(SECONDS))

    def note(self, route: str, method: str, status: int, seconds: float) -> None:
        """One answer was sent."""
        self._answers[route, method, f"{status // 100}xx"] += 1
        self._seconds[route, method].add(seconds)

    def tallies(self) -> Tallies:
        """What this process has counted: under "answers" and "seconds", with the labels behind."""
        found: Tallies = {_name("answers", *labels): [count] for labels, count in self._answers.items()}
        for route, histogram in self._seconds.items():
            found[_name("seconds", *route)] = [*histogram.counts, histogram.total]
        return found

    def showing(self, tallies: Tallies) -> Traffic:
        """The answers of several processes."""
        found = Traffic()
        for name, numbers in tallies.items():
            kind, *labels = name.split(" ")
            if kind == "answers":
                route, method, status = labels
                found._answers[route, method, status] = int(numbers[0])
            elif kind == "seconds":
                route, method = labels
                histogram = found._seconds[route, method]
                *counts, histogram.total = numbers
                histogram.counts = list(map(int, counts))
        return found

    def collect(self) -> Iterator[Metric]:
        """Both families."""
        counter = CounterMetricFamily("http_requests", "Answers by route", labels=["handler", "method", "status"])
        for labels, count in self._answers.items():
            counter.add_metric(labels, count)
        yield counter
        family = HistogramMetricFamily(
            "http_request_duration_seconds", "From the request to the end of its answer", labels=["handler", "method"]
        )
        for route, histogram in self._seconds.items():
            family.add_metric(route, histogram.buckets(), histogram.total)
        yield family


def _name(kind: str, *labels: str) -> str:
    """Routes, methods and kinds of status have no spaces."""
    return " ".join((kind, *labels))


class TrafficLayer:
    """ASGI layer that tells Traffic of every answer."""

    def __init__(self, app: ASGIApp, traffic: Traffic) -> None:
        self._app = app
        self._traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, watching the status."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, began = 500, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "none")  # the template, so that clients cannot invent labels
            if route not in LEFT_OUT:
                self._traffic.note(route, scope["method"], status, time.monotonic() - began)

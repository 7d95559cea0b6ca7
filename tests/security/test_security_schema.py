"""Requests made from our own OpenAPI document, right and wrong ones: no 5xx but an honest 503, the engine alive after.

Some of each route here; as a program for as long as asked: python tests/security/test_security_schema.py --minutes 5
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from schemathesis.generation import GenerationMode
from served import Running, Setup, served

from quire.config import ServeOptions

EXAMPLES = 12  # of each operation and mode


@dataclass
class Fuzzed:
    """What came of it."""

    statuses: Counter[int] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def line(self) -> str:
        """For people."""
        shown = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        return f"{self.statuses.total()} requests, 5xx {len(self.failed)}, slowest {self.slowest:.2f} s: {shown}"


def setup() -> Setup:
    return Setup(options=ServeOptions(trust_request_chat_template=True, template_timeout=1.0), most_tokens=8)


def fuzz(server: Running, examples: int, number: int = 0, until: float | None = None) -> Fuzzed:
    """Ask every operation, in both modes."""
    found = Fuzzed()
    schema: Any = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @seed(number)
            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],
                verbosity=Verbosity.quiet,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                if until is None or time.monotonic() < until:
                    _ask(server, case, found)

            try:
                ask()
            except schemathesis.errors.SchemathesisError:
                continue  # the operation takes nothing that could be wrong
            except Exception as error:
                if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                    raise
    return found


def _ask(server: Running, case: Any, found: Fuzzed) -> None:
    began = time.monotonic()
    response = case.call(base_url=server.url, timeout=30)
    found.slowest = max(found.slowest, time.monotonic() - began)
    found.statuses[response.status_code] += 1
    if response.status_code >= 500 and response.status_code != 503:
        found.failed.append(f"{case.method} {case.formatted_path} {case.body!r}: {response.text[:300]}"[:2000])


def alive(server: Running) -> None:
    """The engine answers, and nothing of the fuzzing runs."""
    assert server.client.completions.create(model="", prompt="say:hello;|").choices[0].text == "hello"
    server.wait_idle(30)
    assert server.metrics.stats.free_pages == server.metrics.stats.pages


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served(setup()) as running:
        yield running


@pytest.mark.slow
def test_requests_made_from_our_own_document(server: Running, capsys: pytest.CaptureFixture[str]) -> None:
    found = fuzz(server, EXAMPLES)
    with capsys.disabled():
        print("\n" + found.line())
    assert not found.failed, found.failed[:5]
    assert found.statuses[200] and found.statuses[400]
    alive(server)


def main() -> int:
    """Fuzz for as long as asked, with other seeds each time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=5.0)
    end = time.monotonic() + parser.parse_args().minutes * 60
    total, number = Fuzzed(), 1
    with served(setup()) as running:
        while time.monotonic() < end:
            found = fuzz(running, 50, number, end)
            total.statuses += found.statuses
            total.failed += found.failed
            total.slowest = max(total.slowest, found.slowest)
            number += 1
        alive(running)
    print("\n".join(total.failed[:20]))
    print(f"OpenAPI fuzz, {number - 1} rounds: {total.line()}")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Requests made from our own OpenAPI document, right and wrong ones: no 5xx but an honest 503, the engine alive after.

Some of each route here; as a program for as long as asked: python tests/security/test_security_schema.py --minutes 5
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
    right: Counter[int] = field(default_factory=Counter)  # of these, bodies that the document allows
    failed: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def line(self) -> str:
        """For people."""
        shown = ", ".join(f"{count} x {status}" for status, count in sorted(self.statuses.items()))
        answered = f"{self.right[200]} of {self.right.total()} right bodies answered"
        counts = f"{self.statuses.total()} requests, 5xx {len(self.failed)}, slowest {self.slowest:.2f} s"
        return f"{counts}, {answered}: {shown}"


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
            required = required_fields(schema.raw_schema, operation) if mode is GenerationMode.POSITIVE else None
            cases = operation.as_strategy(generation_mode=mode)

            def send(case: Any, required: list[str] | None = required) -> None:
                if until is None or time.monotonic() < until:
                    if required is not None:
                        case.body = _thin(case.body, required)
                    _ask(server, case, found, required is not None)

            _try_all(cases, send, examples, number)
    return found


def _try_all(cases: Any, send: Callable[[Any], None], examples: int, number: int) -> None:
    """So many cases of one operation."""

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
        verbosity=Verbosity.quiet,
    )
    @given(case=cases)
    def ask(case: Any) -> None:
        send(case)

    try:
        ask()
    except schemathesis.errors.SchemathesisError:
        return  # the operation takes nothing that could be wrong
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
            raise


def required_fields(document: Any, operation: Any) -> list[str] | None:
    """The fields without which a body is wrong; None where there is no body."""
    body = document["paths"][operation.path][operation.method.lower()].get("requestBody")
    if body is None:
        return None
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schema = document["components"]["schemas"][name]
    return [field for part in (schema, *schema.get("oneOf", ())) for field in part.get("required", ())]


def _thin(body: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """A body with few of its fields, and known ones: of all together, two always contradict each other."""
    draw = random.Random(repr(body))
    optional = [name for name in body if name not in required]
    kept = {*required, *draw.sample(optional, min(len(optional), draw.randrange(5)))}
    return {name: value for name, value in body.items() if name in kept}


def _ask(server: Running, case: Any, found: Fuzzed, is_right: bool) -> None:
    began = time.monotonic()
    response = case.call(base_url=server.url, timeout=60)
    found.slowest = max(found.slowest, time.monotonic() - began)
    found.statuses[response.status_code] += 1
    found.right[response.status_code] += is_right
    if response.status_code >= 500 and response.status_code != 503:
        found.failed.append(f"{case.method} {case.formatted_path} {case.body!r}: {response.text[:300]}"[:2000])


def alive(server: Running) -> None:
    """The engine answers, and nothing of the fuzzing runs."""
    assert server.client.completions.create(model="", prompt="say:hello;|").choices[0].text == "hello"
    server.wait_idle()
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
    assert found.statuses[400] and found.right[200] > found.right.total() / 2, "the fuzz reaches the engine"
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
            total.right += found.right
            total.failed += found.failed
            total.slowest = max(total.slowest, found.slowest)
            number += 1
        alive(running)
    print("\n".join(total.failed[:20]))
    print(f"OpenAPI fuzz, {number - 1} rounds: {total.line()}")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())

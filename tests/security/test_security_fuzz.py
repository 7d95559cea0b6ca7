"""Bodies that nobody would write: whatever comes, the answer is no 5xx, and the engine is alive after.

Some for each route here; as a program others, and more: python tests/security/test_security_fuzz.py --examples 1000
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from served import Running, served

from quire.serve.messages import MessagesRequest, TokensRequest
from quire.serve.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from quire.serve.responses_body import ResponsesRequest

EXAMPLES = 60  # of each route

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(
        ["user", "assistant", "text", "input_text", "message", "\ud800", "say:a;", "/etc/passwd", "auto"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "format", "effort", "id", "\ud800", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
    optional={
        "content": st.text(max_size=5) | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": ODD})) | ODD,
        "type": st.just("message") | ODD,
    },
)
TALK = st.lists(MESSAGE | ODD, max_size=3) | ODD

ROUTES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "say:a;|", "max_tokens": 3}),
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "say:a;"}], "max_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1]}),
    "/v1/responses": (ResponsesRequest, {"input": "say:a;", "max_output_tokens": 3}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "say:a;"}], "max_tokens": 3}),
    "/v1/messages/count_tokens": (TokensRequest, {"messages": [{"role": "user", "content": "say:a;"}]}),
}


def ask_all(server: Running, path: str, examples: int, number: int = 0) -> Counter[int]:
    """So many odd bodies for a route; how often each status came, which is no 5xx but an honest 503."""
    model, base = ROUTES[path]
    names = sorted({*model.model_fields, "tools", "tool_choice", "thinking", "truncation", "prompt", "n", "logprobs"})
    values = {name: TALK if name in ("input", "messages", "system") else ODD for name in names}
    found: Counter[int] = Counter()

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.fixed_dictionaries({}, optional=values))
    def ask(fields: dict[str, Any]) -> None:
        content = json.dumps(base | fields).encode()
        response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        found[response.status_code] += 1
        assert response.status_code < 500 or response.status_code == 503, (response.text, fields)

    ask()
    return found


def alive(server: Running) -> None:
    """The engine answers, and nothing of the fuzzing runs."""
    assert server.client.completions.create(model="", prompt="say:hello;|").choices[0].text == "hello"
    server.wait_idle()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running
        alive(running)


@pytest.mark.parametrize("path", ROUTES)
def test_any_body(server: Running, path: str) -> None:
    assert ask_all(server, path, EXAMPLES)[400]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_any_id(server: Running, method: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.text(min_size=1, max_size=20), st.sampled_from(["/v1/requests/", "/v1/responses/", "/v1/models/"]))
    def ask(name: str, route: str) -> None:
        path = route + quote(name.encode("utf-8", "surrogatepass"), safe="")
        assert server.http.request(method, path).status_code in (200, 307, 404, 405, 400)

    ask()


def main() -> int:
    """So many bodies for each route, others each time."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--examples", type=int, default=1000)
    examples, began, total = parser.parse_args().examples, time.monotonic(), Counter[int]()
    with served() as running:
        for path in ROUTES:
            total += ask_all(running, path, examples, time.time_ns())
        alive(running)
    shown = ", ".join(f"{count} x {status}" for status, count in sorted(total.items()))
    print(f"odd bodies: {total.total()} requests in {time.monotonic() - began:.0f} s, 5xx 0: {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

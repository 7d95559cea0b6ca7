"""Bodies that nobody would write: whatever comes, the answer is no 5xx, and the engine is alive after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import Running, served

from quire.serve.messages import MessagesRequest, TokensRequest
from quire.serve.responses_body import ResponsesRequest

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
    "/v1/responses": (ResponsesRequest, {"input": "say:a;", "max_output_tokens": 3}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "say:a;"}], "max_tokens": 3}),
    "/v1/messages/count_tokens": (TokensRequest, {"messages": [{"role": "user", "content": "say:a;"}]}),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running
        assert running.client.completions.create(model="", prompt="say:hello;|").choices[0].text == "hello"
        running.wait_idle()


@pytest.mark.parametrize("path", ROUTES)
def test_any_body(server: Running, path: str) -> None:
    model, base = ROUTES[path]
    names = sorted({*model.model_fields, "tools", "tool_choice", "thinking", "truncation", "prompt", "n", "logprobs"})
    values = {name: TALK if name in ("input", "messages", "system") else ODD for name in names}

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.fixed_dictionaries({}, optional=values))
    def ask(fields: dict[str, Any]) -> None:
        content = json.dumps(base | fields).encode()
        response = server.http.post(path, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code < 500, (response.text, fields)

    ask()


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_any_id(server: Running, method: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.text(min_size=1, max_size=20), st.sampled_from(["/v1/requests/", "/v1/responses/", "/v1/models/"]))
    def ask(name: str, route: str) -> None:
        path = route + quote(name.encode("utf-8", "surrogatepass"), safe="")
        assert server.http.request(method, path).status_code in (200, 307, 404, 405, 400)

    ask()

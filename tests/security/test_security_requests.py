"""One bad request must never hurt anybody else: the requests that stopped other servers, named by their advisories.

After each of them the engine must be alive and answer right.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import CHAT, HELLO, Running, Setup, refused, served

from quire.errors import ValidationError
from quire.serve.middleware import DEEPEST_JSON, MOST_JSON_PARTS, check_json_shape, check_json_text


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with served() as running:
        yield running


@pytest.fixture(autouse=True)
def alive(request: pytest.FixtureRequest) -> Iterator[None]:
    """The engine answers right after every test."""
    yield
    if "server" in request.fixturenames:
        running: Running = request.getfixturevalue("server")
        assert running.http.get("/health").is_success
        assert running.client.completions.create(model="", prompt=HELLO).choices[0].text == "hello"
        running.wait_idle()


def post(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> httpx.Response:
    content = json.dumps({"prompt": HELLO, "messages": CHAT} | body)
    return server.http.post(path, content=content, headers={"Content-Type": "application/json"})


def answered(server: Running, body: dict[str, Any], path: str = "/v1/completions") -> int:
    """The status, which is that of an answer or of a refusal."""
    response = post(server, body, path)
    if response.status_code != 200:
        refused(response, 400)
    return response.status_code


# -------------------------------------------------------------------- the engine's boundary


@pytest.mark.parametrize("salt", ["\ud800", "\0", "../..", "@x", "ß" * 128, "x" * 129, "", " ", "\u202e"])
def test_cve_2026_105756_odd_cache_salts(server: Running, salt: str) -> None:
    answered(server, {"cache_salt": salt})
    answered(server, {"cache_salt": salt, "stream": True}, "/v1/chat/completions")


@pytest.mark.parametrize("fields", [{"min_tokens": 10**6}, {"min_tokens": 2**31 - 1}, {"min_tokens": 600}])
@pytest.mark.parametrize("most", [None, 5])
def test_cve_2026_114051_min_tokens_beyond_every_limit(
    server: Running, fields: dict[str, Any], most: int | None
) -> None:
    """With a limit it is a contradiction; without one the context is the limit, and no thread dies of it."""
    limits = {"max_tokens": most, "max_completion_tokens": most}
    assert answered(server, fields | limits, "/v1/chat/completions") in ((200, 400) if most is None else (400,))


def test_cve_2026_116173_many_candidate_tokens(server: Running) -> None:
    assert answered(server, {"allowed_token_ids": list(range(200)), "max_tokens": 2}) == 200
    assert answered(server, {"allowed_token_ids": [5] * 5000, "max_tokens": 2}) in (200, 400)
    assert answered(server, {"allowed_token_ids": list(range(10**5))}) == 400
    assert answered(server, {"logprobs": 129}) == 400
    assert answered(server, {"logprob_token_ids": list(range(200))}) == 400


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["x", ""]])
def test_cve_2024_8768_empty_prompts(server: Running, prompt: Any) -> None:
    assert answered(server, {"prompt": prompt}) == 400


def test_cve_2025_62164_cve_2026_56340_cve_2026_55514_tensors_are_not_taken(server: Running) -> None:
    """prompt_embeds went through torch.load."""
    assert answered(server, {"prompt_embeds": "gASVAAAA"}) == 400
    assert answered(server, {"prompt_embeds": ["gASVAAAA"]}, "/v1/chat/completions") == 400


@pytest.mark.parametrize("name", ["logits_processors", "custom_logit_processor", "vllm_xargs", "extra_args"])
def test_cve_2026_7304_no_code_comes_with_a_request(server: Running, name: str) -> None:
    assert answered(server, {name: ["gASVAAAA"]}) in (200, 400)  # refused or, being unknown, without any effect


SCHEMAS: list[Any] = [
    {"type": "regex", "pattern": "(a+)+b"},
    {"type": "string", "pattern": "(" * 500 + ")" * 500},
    {"type": "string", "pattern": "["},
    {"type": "no such type"},
    {"type": ["string", 3]},
    {"$ref": "#"},
    {"$ref": "http://127.0.0.1:1/x"},
    {"anyOf": [{"anyOf": [{"anyOf": [{}] * 10}] * 10}] * 10},
    {"type": "array", "minItems": 10**9},
    7,
    None,
    "x" * 10**6,
]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: str(schema)[:30])
def test_cve_2026_105757_cve_2026_55574_cve_2025_48942_cve_2025_48943_cve_2025_48944_odd_schemas(
    server: Running, schema: Any
) -> None:
    """Schemas and patterns that other servers ran into the ground with. They are refused, or answered soon."""
    pattern = schema.get("pattern") if isinstance(schema, dict) else "(a+)+b"
    for fields in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}},
        {"structured_outputs": {"json": schema}},
        {"structured_outputs": {"regex": pattern}},
        {"guided_regex": pattern or "("},
        {"guided_json": schema if schema is not None else 5},
        {"tools": [{"type": "function", "function": {"name": "x", "parameters": schema}}], "tool_choice": "required"},
    ):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answered(server, fields | {"max_tokens": 4}, path)


def nested(depth: int) -> bytes:
    return b'{"prompt":"x","messages":[{"role":"user","content":"x"}],"extra":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize("depth", [DEEPEST_JSON, 1000, 100_000, 5_000_000])
def test_cve_2026_25048_json_has_a_depth(server: Running, depth: int) -> None:
    headers = {"Content-Type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        refused(server.http.post(path, content=nested(depth), headers=headers), 400)
        refused(server.http.post(path, content=nested(depth)[: depth + 60], headers=headers), 400)


def test_json_has_a_size_in_parts(server: Running) -> None:
    content = b'{"prompt":[' + b"[1]," * (MOST_JSON_PARTS + 5) + b"[1]]}"
    refused(server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"}))


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner, max_size=4), max_leaves=400))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_shape_of_json_is_seen_through_any_text(value: Any) -> None:
    """Brackets within strings count for nothing."""

    def depth(part: Any) -> int:
        return 1 + max(map(depth, part), default=0) if isinstance(part, list) else 0

    deep: Any = value
    for _ in range(DEEPEST_JSON - depth(value)):
        deep = [deep, ']]]\\"[[[' * 20]
    for ascii_only in (False, True):
        check_json_shape(json.dumps(deep, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
        with pytest.raises(ValidationError, match="deep"):
            check_json_shape(json.dumps([deep], ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "body", [rb'{"a": "\ud800"}', rb'{"\uDFff": 1}', b'{"a": "\xed\xa0\x80"}', rb'["\ud83d", "\ude00"]']
)
def test_half_a_surrogate_pair_is_refused_anywhere(body: bytes) -> None:
    with pytest.raises(ValidationError, match="Unicode"):
        check_json_text(body)


@pytest.mark.parametrize(
    "body", [rb'{"a": "\ud83d\ude00"}', rb'{"a": "\\ud800"}', '{"a": "\ud55c"}'.encode(), b'{"\\ud8']
)
def test_whole_pairs_and_what_is_no_json_pass(body: bytes) -> None:
    check_json_text(body)


# -------------------------------------------------------------------- counts and sizes


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1025}, "n"),  # CVE-2026-34756
        ({"n": 2**31 - 1}, "n"),
        ({"n": 1024, "prompt": ["x"] * 17}, "prompt"),
        ({"best_of": 10**6}, "best_of"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"bad_words": ["x"] * 1025}, "bad_words"),
        ({"bad_words": ["x" * 5000]}, "bad_words"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"allowed_token_ids": [1] * (2**20 + 1)}, "allowed_token_ids"),
    ],
)
def test_cve_2026_34756_every_list_has_a_length(server: Running, fields: dict[str, Any], param: str) -> None:
    assert refused(post(server, fields))["param"] == param


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_have_a_size(server: Running, name: str) -> None:
    tool = {"type": "function", "function": {"name": "x"}}
    for given_value in ([tool] * 2000, [tool | {"text": "x" * 300_000}]):
        response = post(server, {name: given_value, "tool_choice": "none"}, "/v1/chat/completions")
        assert refused(response)["param"] == name
    refused(post(server, {"tools": [tool] * 200, "prompt": None}, "/tokenize"))


def test_bodies_have_a_size() -> None:
    from quire.config import ServeOptions  # here, next to its only use

    with served(Setup(options=ServeOptions(max_request_bytes=10_000))) as small:
        refused(small.http.post("/v1/completions", content=b"x" * 10_001), 413)

        def parts() -> Iterator[bytes]:
            for _ in range(20):
                yield b"x" * 1000

        refused(small.http.post("/v1/completions", content=parts()), 413)


# -------------------------------------------------------------------- what the server would have to fetch


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.5)
        yield listening


def test_cve_2025_6242_cve_2026_24779_cve_2026_25960_nothing_is_fetched(
    server: Running, listener: socket.socket
) -> None:
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
    for given_url in (url, url.replace("127.0.0.1", "localhost"), "file:///etc/passwd", "data:image/png;base64,AAAA"):
        for part in (
            {"type": "image_url", "image_url": {"url": given_url}},
            {"type": "image_url", "image_url": given_url},
            {"type": "audio_url", "audio_url": {"url": given_url}},
            {"type": "video_url", "video_url": {"url": given_url}},
            {"type": "input_image", "image_url": given_url},
            {"type": "image_embeds", "image_embeds": given_url},  # CVE-2025-62372
        ):
            body = {"messages": [{"role": "user", "content": [part]}]}
            refused(post(server, body, "/v1/chat/completions"))
    with pytest.raises(TimeoutError):
        listener.accept()


# -------------------------------------------------------------------- many at once


def test_sglang_28341_everybody_leaves_at_once(server: Running) -> None:
    """An abort that meets an end on its way stopped a server."""
    rng = random.Random(28341)

    async def leave(http: httpx.AsyncClient, number: int) -> None:
        body = {"prompt": f"{number}|", "max_tokens": rng.choice((1, 2, 20, 400)), "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            left = rng.randrange(4)
            async for _ in response.aiter_lines():
                left -= 1
                if left < 0:
                    return

    async def storm() -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as http:
            for _ in range(3):
                await asyncio.gather(*(leave(http, number) for number in range(60)))

    asyncio.run(storm())
    server.wait_idle()


def test_odd_requests_do_not_disturb_a_stream(server: Running) -> None:
    """Somebody streams all the while that others send what is wrong."""
    expected = server.client.completions.create(model="", prompt="z|", max_tokens=100, temperature=0).choices[0].text
    found: list[str] = []

    def stream() -> None:
        for _ in range(3):
            chunks = server.client.completions.create(model="", prompt="z|", max_tokens=100, temperature=0, stream=True)
            found.append("".join(chunk.choices[0].text for chunk in chunks))

    thread = threading.Thread(target=stream)
    thread.start()
    while thread.is_alive():
        for fields in ({"min_tokens": 10**6}, {"cache_salt": "\ud800"}, {"prompt": "crash;|"}, {"n": 10**6}):
            assert post(server, fields).status_code in (400, 500)
    thread.join()
    assert found == [expected] * 3

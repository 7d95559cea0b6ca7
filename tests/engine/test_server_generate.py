"""Completions and chat through the openai library over a real socket: shapes, streams, every parameter that shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import HELLO, MAX_MODEL_LEN, TOKENIZER, Running, Setup, served

from quire.config import ServeOptions
from quire.core.params import SamplingParams


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def count(text: str, special: bool = True) -> int:
    return len(TOKENIZER.encode(text, special))


def events(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, decoded; the closing one as the string [DONE]."""
    with server.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


# -------------------------------------------------------------------- completions


def test_a_completion(server: Running) -> None:
    answer = server.client.completions.create(model="parrot", prompt=HELLO, max_tokens=50)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "parrot"
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [(0, "hello", "stop")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (count(HELLO), 6)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6
    assert answer.system_fingerprint == "quire-test"


def test_nulls_are_present_in_the_body(server: Running) -> None:
    body = server.http.post("/v1/completions", json={"prompt": HELLO}).json()
    choice = body["choices"][0]
    for name in ("logprobs", "stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids"):
        assert choice[name] is None
    assert body["service_tier"] is None and body["usage"]["prompt_tokens_details"] is None
    message = server.http.post("/v1/chat/completions", json={"messages": chat("say:x;")}).json()["choices"][0][
        "message"
    ]
    assert message["reasoning"] is None and message["refusal"] is None and "tool_calls" not in message


def test_sixteen_tokens_unless_asked(server: Running) -> None:
    answer = server.client.completions.create(model="", prompt="x|")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == "abcdefghijabcdef"


def test_a_stream_has_the_same_text(server: Running) -> None:
    stream = server.client.completions.create(model="bird", prompt="say:grüß 🙂 dich;|", max_tokens=50, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "grüß 🙂 dich"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert {chunk.model for chunk in chunks} == {"parrot"}
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_the_events_of_a_completion_stream(server: Running) -> None:
    found = events(server, "/v1/completions", {"prompt": "say:ab;|", "stream": True})
    assert found[-1] == "[DONE]"
    first, last = found[0], found[-2]
    assert first["choices"] == [
        {
            "index": 0,
            "text": "a",
            "logprobs": None,
            "finish_reason": None,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
    ]
    assert "usage" not in first and "system_fingerprint" not in first
    assert last["system_fingerprint"] == "quire-test" and last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_in_streams(server: Running, path: str) -> None:
    body = {"prompt": "say:ab;|", "messages": chat("say:ab;"), "stream": True}
    body.pop("messages" if path == "/v1/completions" else "prompt")
    found = events(server, path, body | {"stream_options": {"include_usage": True}})
    assert found[-2]["choices"] == [] and found[-2]["usage"]["completion_tokens"] == 3
    assert all("usage" not in chunk for chunk in found[:-2])
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(server, path, body | {"stream_options": options})
    counted = [chunk["usage"]["completion_tokens"] for chunk in found[:-1]]
    assert counted == sorted(counted) and counted[-1] == 3
    assert all(chunk["usage"]["prompt_tokens"] == found[-2]["usage"]["prompt_tokens"] for chunk in found[:-1])


def test_usage_can_be_forced_and_detailed() -> None:
    options = ServeOptions(enable_force_include_usage=True, enable_prompt_tokens_details=True)
    with served(Setup(options=options)) as server:
        found = events(server, "/v1/completions", {"prompt": "say:ab;|", "stream": True})
        assert found[0]["usage"]["completion_tokens"] == 1 and found[-2]["choices"] == []
        prompt = "x" * 40 + "say:ab;|"
        for cached in (0, 48):
            usage = server.client.completions.create(model="", prompt=prompt).usage
            assert usage is not None and usage.prompt_tokens_details is not None
            assert usage.prompt_tokens_details.cached_tokens == cached


def test_many_prompts_keep_their_order(server: Running) -> None:
    prompts = [f"say:{'x' * (9 - number)}{number};|" for number in range(8)]
    answer = server.client.completions.create(model="parrot", prompt=prompts, max_tokens=20)
    assert [choice.index for choice in answer.choices] == list(range(8))
    assert [choice.text[-1] for choice in answer.choices] == [str(number) for number in range(8)]
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(count, prompts))
    stream = server.client.completions.create(model="parrot", prompt=prompts, max_tokens=20, stream=True)
    texts = [""] * 8
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_long_prompts_are_cut_in_a_thread(server: Running) -> None:
    prompts = ["z" * 30_000 + f"say:{number};|" for number in range(3)]
    body = {"prompt": prompts, "truncate_prompt_tokens": 100}
    choices = server.http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["text"] for choice in choices] == ["0", "1", "2"]
    messages = [{"role": "system", "content": "z" * 30_000}, *chat("say:hello;")]
    answer = server.http.post("/v1/chat/completions", json={"messages": messages, "truncate_prompt_tokens": 100}).json()
    assert answer["choices"][0]["message"]["content"] == "hello"


def test_several_choices_of_each_prompt(server: Running) -> None:
    prompts = ["say:a;|", "say:b;|"]
    answer = server.client.completions.create(model="parrot", prompt=prompts, n=3, temperature=1.0)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate("aaabbb"))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2 * count(prompts[0])
    assert answer.usage.completion_tokens == 12
    found = events(server, "/v1/completions", {"prompt": prompts, "n": 3, "stream": True})
    seen = [(chunk["choices"][0]["index"], chunk["choices"][0]["text"]) for chunk in found[:-1]]
    assert {index for index, _ in seen} == set(range(6))
    assert all("".join(text for i, text in seen if i == index) == "aaabbb"[index] for index in range(6))


def test_prompts_of_token_ids(server: Running) -> None:
    ids = TOKENIZER.encode(HELLO, add_special_tokens=False)
    for prompt, texts in ((ids, ["hello"]), ([ids, ids], ["hello", "hello"])):
        answer = server.client.completions.create(model="parrot", prompt=prompt)
        assert [choice.text for choice in answer.choices] == texts
    with_bos = server.client.completions.create(model="parrot", prompt=HELLO).usage
    without = server.client.completions.create(
        model="parrot", prompt=HELLO, extra_body={"add_special_tokens": False}
    ).usage
    assert with_bos is not None and without is not None
    assert with_bos.prompt_tokens == len(ids) + 1 == without.prompt_tokens + 1


def test_echo(server: Running) -> None:
    create = server.client.completions.create
    assert create(model="", prompt=HELLO, echo=True).choices[0].text == HELLO + "hello"
    only = create(model="", prompt=HELLO, echo=True, max_tokens=0)
    assert only.choices[0].text == HELLO
    assert only.usage is not None and only.usage.completion_tokens == 0
    ids = TOKENIZER.encode(HELLO, add_special_tokens=False)
    assert create(model="", prompt=ids, echo=True).choices[0].text == HELLO + "hello"
    stream = create(model="", prompt=HELLO, echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == HELLO + "hello"
    stream = create(model="", prompt=HELLO, echo=True, max_tokens=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == HELLO


def test_logprobs_of_a_completion(server: Running) -> None:
    for stream in (False, True):
        body = {"prompt": "say:hé;|", "logprobs": 0, "stream": stream}
        if stream:
            parts = [chunk["choices"][0]["logprobs"] for chunk in events(server, "/v1/completions", body)[:-1]]
            shown = {name: [item for part in parts for item in part[name]] for name in parts[0]}
        else:
            shown = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
        assert shown["tokens"] == ["h", "\ufffd", "\ufffd", "</s>"]
        assert shown["token_logprobs"] == [-1.0] * 4
        assert shown["text_offset"] == [0, 1, 2, 3]
        assert shown["top_logprobs"] == [{token: -1.0} for token in shown["tokens"]]


def test_logprobs_with_echo_begin_with_null(server: Running) -> None:
    body = {"prompt": [[TOKENIZER.encode("|", False)[0]]], "logprobs": 1, "echo": True, "max_tokens": 2}
    shown = server.http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert shown["tokens"] == ["|", "a", "b"]
    assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
    assert shown["text_offset"] == [0, 1, 2]


def test_tokens_as_ids(server: Running) -> None:
    body = {"prompt": "say:h;|", "logprobs": 0, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = server.http.post("/v1/completions", json=body).json()["choices"][0]
    ids = [*TOKENIZER.encode("h", False), TOKENIZER.eos_token_id]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    assert choice["token_ids"] == ids
    assert choice["prompt_token_ids"] == TOKENIZER.encode("say:h;|")
    found = events(server, "/v1/completions", body | {"stream": True})[:-1]
    assert [token for chunk in found for token in chunk["choices"][0]["token_ids"]] == ids
    assert found[0]["choices"][0]["prompt_token_ids"] and found[1]["choices"][0]["prompt_token_ids"] is None


def test_stops(server: Running) -> None:
    create = server.client.completions.create
    for stream in (False, True):
        for stop in ("fg", ["zz", "fg"]):
            given = create(model="", prompt="x|", max_tokens=50, stop=stop, stream=stream)
            chunks = list(given) if stream else [given]
            assert "".join(chunk.choices[0].text for chunk in chunks) == "abcde"
            assert chunks[-1].choices[0].finish_reason == "stop"
            assert chunks[-1].choices[0].stop_reason == "fg"
    kept = create(model="", prompt="x|", stop="fg", extra_body={"include_stop_str_in_output": True})
    assert kept.choices[0].text == "abcdefg"
    later = create(model="", prompt="x|", stop="b", extra_body={"min_tokens": 5})
    assert later.choices[0].text == "abcdefghija"
    stop_id = TOKENIZER.encode("d", False)[0]
    token = create(model="", prompt="x|", extra_body={"stop_token_ids": [stop_id]})
    assert (token.choices[0].text, token.choices[0].stop_reason) == ("abc", stop_id)


def test_special_tokens_can_be_shown(server: Running) -> None:
    body = {"skip_special_tokens": False, "include_stop_str_in_output": True}
    answer = server.client.completions.create(model="", prompt=HELLO, extra_body=body)
    assert answer.choices[0].text == "hello</s>"


def test_truncation(server: Running) -> None:
    def prompt_tokens(**extra: Any) -> int:
        answer = server.client.completions.create(model="", prompt="z" * 2000 + "|", max_tokens=10, extra_body=extra)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    assert prompt_tokens(truncate_prompt_tokens=20) == 20
    assert prompt_tokens(truncate_prompt_tokens=-1) == MAX_MODEL_LEN - 10
    body = {"prompt": "abc|", "truncate_prompt_tokens": 2, "return_token_ids": True}
    for side, meant in (("left", "c|"), ("right", "<s>a")):
        choice = server.http.post("/v1/completions", json=body | {"truncation_side": side}).json()["choices"][0]
        assert TOKENIZER.decode(choice["prompt_token_ids"], skip_special_tokens=False) == meant


# -------------------------------------------------------------------- chat


def test_a_chat(server: Running) -> None:
    answer = server.client.chat.completions.create(model="parrot", messages=chat("say:hi you;"))
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "hi you", "stop")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == count("<|turn|>user:say:hi you;<|end|><|turn|>assistant|", special=False)


def test_a_chat_stream(server: Running) -> None:
    found = events(server, "/v1/chat/completions", {"messages": chat("say:ab;"), "stream": True})
    assert found[-1] == "[DONE]"
    choices = [chunk["choices"][0] for chunk in found[:-1]]
    assert choices[0] == {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
    assert [choice["delta"]["content"] for choice in choices[1:]] == ["a", "b", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]
    assert "stop_reason" in choices[-1]
    assert {chunk["object"] for chunk in found[:-1]} == {"chat.completion.chunk"}


def test_each_choice_of_a_chat_begins_with_its_role(server: Running) -> None:
    found = events(server, "/v1/chat/completions", {"messages": chat("say:ab;"), "stream": True, "n": 3})
    roles = [chunk["choices"][0]["index"] for chunk in found[:-1] if "role" in chunk["choices"][0]["delta"]]
    assert roles == [0, 1, 2]
    for index in range(3):
        mine = [c["choices"][0] for c in found[:-1] if c["choices"][0]["index"] == index]
        assert "role" in mine[0]["delta"]
        assert "".join(choice["delta"]["content"] for choice in mine) == "ab"
        assert mine[-1]["finish_reason"] == "stop"


def test_a_chat_may_fill_the_context(server: Running) -> None:
    answer = server.client.chat.completions.create(model="", messages=chat("on and on"))
    assert answer.usage is not None and answer.usage.total_tokens == MAX_MODEL_LEN
    assert answer.choices[0].finish_reason == "length"
    for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 50, "max_completion_tokens": 5}):
        answer = server.client.chat.completions.create(model="", messages=chat("on and on"), **limit)
        assert answer.choices[0].message.content == "abcde"


def test_logprobs_of_a_chat(server: Running) -> None:
    for stream in (False, True):
        body = {"messages": chat("say:hé;"), "logprobs": True, "top_logprobs": 1, "stream": stream}
        if stream:
            found = events(server, "/v1/chat/completions", body)[1:-1]
            content = [item for chunk in found for item in chunk["choices"][0]["logprobs"]["content"]]
        else:
            answer = server.http.post("/v1/chat/completions", json=body).json()
            content = answer["choices"][0]["logprobs"]["content"]
        assert [item["token"] for item in content] == ["h", "\ufffd", "\ufffd", "</s>"]
        assert b"".join(bytes(item["bytes"]) for item in content) == "hé</s>".encode()
        assert all(item["logprob"] == -1.0 for item in content)
        assert [item["top_logprobs"][0]["token"] for item in content] == [item["token"] for item in content]
    none = server.http.post("/v1/chat/completions", json={"messages": chat("say:h;"), "logprobs": True}).json()
    assert none["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_content_parts_tools_and_template_variables(server: Running) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "say:x;"}]}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "tool_choice": "none",
        "chat_template_kwargs": {"mood": "gay", "nobody_reads_this": 1},
        "return_prompt_text": True,
        "return_token_ids": True,
    }
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["prompt_text"] == "<|turn|>user:say:x;<|end|>[1 tools][gay]<|turn|>assistant|"
    assert answer["prompt_token_ids"] == TOKENIZER.encode(answer["prompt_text"], add_special_tokens=False)
    with_bos = server.http.post("/v1/chat/completions", json=body | {"add_special_tokens": True}).json()
    assert with_bos["prompt_token_ids"] == [TOKENIZER.bos_token_id, *answer["prompt_token_ids"]]


def test_going_on_with_a_message(server: Running) -> None:
    messages = [*chat("say:hello;"), {"role": "assistant", "content": "x|"}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 20}
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"] == "hello"
    echoed = server.http.post("/v1/chat/completions", json=body | {"echo": True}).json()
    assert echoed["choices"][0]["message"]["content"] == "x|hello"


# -------------------------------------------------------------------- both


def test_the_models_own_defaults() -> None:
    defaults = SamplingParams(temperature=0.6, repetition_penalty=1.3, top_k=7)
    with served(Setup(defaults=defaults)) as server:
        seen = []
        keep = server.service.engine.prepare

        def spy(prompt: Any, params: SamplingParams, *rest: Any) -> Any:
            seen.append(params)
            return keep(prompt, params, *rest)

        server.service.engine.prepare = spy  # type: ignore[method-assign, assignment]
        server.client.completions.create(model="", prompt=HELLO)
        server.client.chat.completions.create(model="", messages=chat("say:x;"), temperature=0.5, top_p=0.9, seed=3)
    assert (seen[0].temperature, seen[0].repetition_penalty, seen[0].max_tokens) == (0.6, 1.3, 16)
    assert (seen[1].temperature, seen[1].repetition_penalty, seen[1].top_k) == (0.5, 1.3, 7)
    assert (seen[1].top_p, seen[1].seed, seen[1].max_tokens) == (0.9, 3, None)


def test_the_operators_limit_on_outputs() -> None:
    with served(Setup(most_tokens=3)) as server:
        for given in ({}, {"max_tokens": 10}, {"max_tokens": None}):
            assert server.client.completions.create(model="", prompt="x|", **given).choices[0].text == "abc"
        assert server.client.chat.completions.create(model="", messages=chat("x")).choices[0].message.content == "abc"
        assert server.client.completions.create(model="", prompt="x|", max_tokens=2).choices[0].text == "ab"


def test_every_field_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [4, 5],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 9,
        "min_tokens": 2,
        "allowed_token_ids": [1, 2, 3],
        "bad_words": ["bad"],
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    with served() as server:
        seen: list[Any] = []
        keep = server.service.engine.prepare

        def spy(*given: Any) -> Any:
            seen.append(given)
            return keep(*given)

        server.service.engine.prepare = spy  # type: ignore[method-assign, assignment]
        extra = {"logit_bias": {"7": 200.0}, "priority": 3, "cache_salt": "me", "logprobs": 1}
        repetition = {"repetition_detection": {"max_pattern_size": 20, "min_pattern_size": 10, "min_count": 5}}
        response = server.http.post("/v1/completions", json={"prompt": HELLO, **fields, **extra, **repetition})
        assert response.status_code == 200, response.text
    prompt, params, _, priority, *_ = seen[0]
    for name, value in fields.items():
        assert getattr(params, name) == (tuple(value) if isinstance(value, list) else value), name
    assert params.logit_bias == ((7, 100.0),) and params.logprobs == 1
    assert params.repetition_detection.min_count == 5
    assert priority == 3 and prompt["cache_salt"] == "me"


def test_request_ids(server: Running) -> None:
    response = server.http.post("/v1/completions", json={"prompt": HELLO}, headers={"X-Request-Id": "my.id:7"})
    assert response.json()["id"] == "cmpl-my.id:7" and response.headers["x-request-id"] == "my.id:7"
    assert server.http.post("/v1/completions", json={"prompt": HELLO, "request_id": "mine"}).json()["id"] == "cmpl-mine"
    odd = server.http.post("/v1/completions", json={"prompt": HELLO}, headers={"X-Request-Id": "a b\tc"})
    assert " " not in odd.json()["id"]
    assert server.http.get("/health").headers["x-request-id"]


def test_the_same_request_id_twice_at_once() -> None:
    with served(Setup(delay=0.01)) as server:
        body = {"prompt": "x|", "max_tokens": 20, "stream": True, "request_id": "same"}
        with (
            server.http.stream("POST", "/v1/completions", json=body) as first,
            server.http.stream("POST", "/v1/completions", json=body) as second,
        ):
            assert first.status_code == second.status_code == 200
            assert "error" not in first.read().decode() + second.read().decode()

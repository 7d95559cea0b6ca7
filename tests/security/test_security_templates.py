"""Chat templates: whose they may be, and that none holds up or breaks into the server. Each test names its advisories."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from served import CHAT, TEMPLATE, TOKENIZER, Running, Setup, refused, served

from quire.config import ServeOptions
from quire.errors import ValidationError
from quire.serve.renderer import WORKER, RenderPool
from quire.text import ChatOptions, Tokenizer, prompt_text
from quire.text.chat import render_job
from quire.text.library_tokenizer import of_library
from quire.text.render_worker import MARK, answer
from waiting import when

SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LARGE = "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}"
ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(_x=1) }}",
    "{% set n = namespace() %}{% set n._x = 1 %}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__class__.__init__.__globals__ }}",
    "{{ raise_exception.__code__ }}",
    "{{ '{0.__class__}'.format(0) }}{{ 1 / 0 }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
)


@pytest.fixture(scope="module")
def trusting() -> Iterator[Running]:
    """A server that takes templates from clients and gives them little time."""
    options = ServeOptions(trust_request_chat_template=True, template_timeout=2.0)
    with served(Setup(options=options)) as running:
        yield running


def job(template: str, messages: Any = CHAT, **options: Any) -> dict[str, Any]:
    return render_job(TOKENIZER, messages, ChatOptions(template=template, **options))


def rendered(template: str, messages: Any = CHAT, **options: Any) -> str:
    """What the worker's code makes of it, in this process."""
    reply = answer(job(template, messages, **options) | {"chars": 10**6})
    if "error" in reply:
        raise ValidationError(reply["error"])
    return reply["text"]


# -------------------------------------------------------------------- whose templates


def test_cve_2026_115918_and_cve_2025_61620_clients_bring_no_templates() -> None:
    with served() as server:
        body = {"messages": CHAT, "chat_template": "{{ messages }}"}
        for path in ("/v1/chat/completions", "/tokenize"):
            assert refused(server.http.post(path, json=body))["param"] == "chat_template"
        response = server.http.post("/v1/responses", json={"input": "x", "chat_template": "{{ messages }}"})
        assert refused(response)["param"] == "chat_template"
        response = server.http.post("/v1/messages", json=body | {"max_tokens": 5})
        assert response.status_code == 400 and "chat_template" in response.text
        for kwargs in (
            {"chat_template": "x"},
            {"tokenize": True},
            {"conversation": []},
            {"messages": []},
            {"tools": []},
        ):
            for path in ("/v1/chat/completions", "/tokenize"):  # CVE-2025-62426
                response = server.http.post(path, json={"messages": CHAT, "chat_template_kwargs": kwargs})
                assert refused(response)["param"] == "chat_template_kwargs"
        assert server.http.post("/v1/chat/completions", json={"messages": CHAT}).is_success


def test_templates_of_clients_where_they_are_trusted(trusting: Running) -> None:
    body = {"messages": CHAT, "chat_template": "<{{ messages[0].content }}>|"}
    answered = trusting.http.post("/v1/chat/completions", json=body | {"return_prompt_text": True}).json()
    assert answered["prompt_text"] == "<say:hello;>|"
    assert answered["choices"][0]["message"]["content"] == "hello"
    assert trusting.http.post("/tokenize", json=body).json()["count"] == 13


# -------------------------------------------------------------------- time and size


@pytest.mark.parametrize(
    "template", [SLOW, LARGE, "{{ 'x' * 10 ** 10 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_cve_2026_115911_a_template_has_a_time_and_a_size(trusting: Running, template: str) -> None:
    refused(trusting.http.post("/v1/chat/completions", json={"messages": CHAT, "chat_template": template}))
    answered = trusting.client.chat.completions.create(model="", messages=CHAT)
    assert answered.choices[0].message.content == "hello"


def test_cve_2026_115911_slow_templates_do_not_hold_up_others() -> None:
    """Not even those that may take more time than the test has."""
    options = ServeOptions(trust_request_chat_template=True, template_timeout=600.0)

    async def ask(server: Running) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            asked = {"messages": CHAT, "chat_template": SLOW}
            slow = [asyncio.create_task(http.post("/v1/chat/completions", json=asked)) for _ in range(4)]
            await when(lambda: len(server.service.client_templates._busy) == 4)
            assert (await http.post("/v1/chat/completions", json={"messages": CHAT})).is_success
            assert not any(task.done() for task in slow)
            for task in slow:
                task.cancel()

    with served(Setup(options=options)) as server:
        asyncio.run(ask(server))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"x": [[]] * 200},
        {"x": "y" * 20_000},
        {"x": [[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]]},
    ],
)
def test_cve_2025_62426_template_variables_have_a_size(trusting: Running, kwargs: dict[str, Any]) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        response = trusting.http.post(path, json={"messages": CHAT, "chat_template_kwargs": kwargs})
        assert refused(response)["param"] == "chat_template_kwargs"


def test_a_worker_that_is_killed_is_started_again() -> None:
    async def run() -> None:
        pool = RenderPool(1, 20.0)
        assert await pool.render(job("a")) == "a"
        os.kill(pool._idle[0].process.pid, signal.SIGKILL)
        assert await pool.render(job("b")) == "b"
        assert await pool.render(job("c")) == "c"
        await pool.close()

    asyncio.run(run())


def test_whoever_leaves_does_not_spoil_the_worker() -> None:
    async def run() -> None:
        pool = RenderPool(1, 20.0)
        await pool.warm()
        child = pool._idle[0]
        task = asyncio.ensure_future(pool.render(job("x" * 1000)))
        await asyncio.sleep(0)
        task.cancel()
        assert [await pool.render(job(text)) for text in "abc"] == ["a", "b", "c"]
        assert pool._idle == [child]
        await pool.close()
        assert child.process.poll() is not None

    asyncio.run(run())


def test_the_worker_sees_no_keys_and_imports_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_API_KEY", "very-secret")

    async def environment() -> bytes:
        pool = RenderPool(1, 20.0)
        await pool.warm()
        pid = pool._idle[0].process.pid
        found = await asyncio.to_thread(Path(f"/proc/{pid}/environ").read_bytes)
        mapped = await asyncio.to_thread(Path(f"/proc/{pid}/maps").read_text)
        await pool.close()
        assert "torch" not in mapped and "tokenizers" not in mapped
        return found

    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    assert b"very-secret" not in asyncio.run(environment())


# -------------------------------------------------------------------- the sandbox


@pytest.mark.parametrize("template", ESCAPES)
def test_cve_2026_5760_templates_run_in_a_sandbox(trusting: Running, template: str) -> None:
    body = {"messages": CHAT, "chat_template": template, "max_tokens": 1}
    error = refused(trusting.http.post("/v1/chat/completions", json=body))
    assert "root:" not in error["message"]


def library_text(template: str, messages: Any, options: dict[str, Any]) -> str:
    """What the Transformers library makes of it."""
    variables = options.get("template_kwargs", {})
    rest = {name: value for name, value in options.items() if name != "template_kwargs"}
    given = {"add_generation_prompt": True, **rest, **variables}
    return TOKENIZER.library.apply_chat_template(messages, chat_template=template, tokenize=False, **given)


def test_what_the_worker_makes_is_what_the_library_makes() -> None:
    with_tools = TEMPLATE + "{{ bos_token }}{{ tools | tojson(indent=2) if tools }}{{ mood }}"
    scoped = (
        "{%- set n = namespace(x=1) %}\n  {% for m in messages -%}\n{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m.content | trim }}{% endgeneration %}{% set n.x = n.x + 1 %}\n{% endfor %}{{ n.x }}"
        "{{ dict(a=1).items() | list }}{{ messages[-1].thinking }}{{ messages[-1].reasoning_content }}"
    )
    said = [*CHAT, {"role": "assistant", "content": "I say  ", "reasoning_content": "Hm"}]
    for template in (TEMPLATE, with_tools, scoped):
        for options in (
            {},
            {"tools": [{"type": "function", "function": {"name": "ä<b>"}}], "template_kwargs": {"mood": "good"}},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            known = {"template": template, **options}
            made = rendered(messages=said, **known)
            assert made == library_text(template, said, options)
            assert made == prompt_text(TOKENIZER, said, ChatOptions(**known))


def test_a_message_that_is_continued() -> None:
    said = [{"role": "assistant", "content": "I say  "}]
    for template, expected in (
        ("<{{ messages[0].content }}>end", "<I say  "),
        ("<{{ messages[0].content | trim }}>end", "<I say"),
        ("{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}", "[I say  "),
    ):
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert rendered(template, said, **options) == expected
        assert prompt_text(TOKENIZER, said, ChatOptions(template=template, **options)) == expected
    for template in ("nothing of it", "{{ messages[0].content | upper }}"):
        with pytest.raises(ValidationError, match="continue"):
            rendered(template, said, **options)
    assert MARK not in rendered(TEMPLATE, said)


def test_a_template_that_calls_itself_without_end_is_the_clients_mistake() -> None:
    with pytest.raises(ValidationError, match="deep"):
        rendered("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    with pytest.raises(ValidationError):
        rendered("{{ " + "(" * 3000 + ")" * 3000 + " }}")


def test_tokenizers_with_their_own_rendering_are_known() -> None:
    class Own(type(TOKENIZER.library)):  # type: ignore[misc]
        def apply_chat_template(self, *_: Any, **__: Any) -> str:
            return "own"

    assert not TOKENIZER.renders_itself
    own = Tokenizer(of_library(Own(tokenizer_object=TOKENIZER.library.backend_tokenizer)), "{{ messages }}")
    assert own.renders_itself and prompt_text(own, CHAT) == "own"


def test_a_template_that_ends_its_process_twice_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "worker.py"
    broken.write_text("import sys\nsys.stdout.buffer.write(bytes(4))\nsys.stdout.flush()\nsys.stdin.buffer.read(9)\n")
    monkeypatch.setattr("quire.serve.renderer.WORKER", broken)

    async def run() -> None:
        pool = RenderPool(1, 20.0)
        with pytest.raises(ValidationError, match="cannot be rendered"):
            await pool.render(job("a"))
        await pool.close()

    asyncio.run(run())


def test_where_no_process_can_be_started_clients_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with served() as server:
        with monkeypatch.context() as patch:
            patch.setattr("quire.serve.renderer.WORKER", Path("/nowhere/worker.py"))
            response = server.http.post("/v1/chat/completions", json={"messages": CHAT})
            assert refused(response, 503) and int(response.headers["retry-after"]) > 0
        assert server.http.post("/v1/chat/completions", json={"messages": CHAT}).is_success


def test_a_worker_ends_with_its_server_in_the_middle_of_a_template() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen([sys.executable, "-P", str(WORKER)], stdin=theirs.fileno(), stdout=theirs.fileno())
    assert ours.recv(4) == bytes(4)
    content = json.dumps(job(SLOW) | {"chars": 9}).encode()
    ours.sendall(len(content).to_bytes(4) + content)
    ours.close()
    assert process.wait(60) == 0

"""A conversation partner for run, chat and complete: an engine in this process, or a server over HTTP.

Both have the same two methods, so the commands do not know which one they talk to.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from quire.cli.options import SampleOptions
from quire.config import EngineOptions
from quire.errors import ConfigError, QuireError, reason

Message = dict[str, str]
COMPLETION_TOKENS = 256  # a completion has no natural end, so it gets a limit when none is given


@dataclass(slots=True)
class Figures:
    """What the last answer took. Tokens are those that the engine counted."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0

    def line(self) -> str:
        """One line for --stats."""
        rate = self.output_tokens / max(1e-9, self.seconds - self.first_seconds)
        return (
            f"[{self.prompt_tokens} tokens in, {self.output_tokens} out, first after {self.first_seconds:.2f} s, "
            f"then {rate:.1f} tokens/s]"
        )


class Session(Protocol):
    """Answers as streams of text."""

    figures: Figures

    def complete(self, prompt: str) -> Iterator[str]:
        """Go on with a text."""
        ...

    def chat(self, messages: list[Message]) -> Iterator[str]:
        """Answer the last message of a conversation."""
        ...

    def close(self) -> None:
        """Let go of the model or the connection."""
        ...


class LocalSession:
    """An engine in this process."""

    def __init__(self, options: EngineOptions, sample: SampleOptions) -> None:
        # Imported here: torch comes with it, and a session with a server does without.
        from quire.engine.engine import Engine

        self.figures = Figures()
        self._engine = Engine.from_options(options)
        self._chosen = sample.chosen()
        self._template = options.model.chat_template

    def complete(self, prompt: str) -> Iterator[str]:
        """Go on with a text."""
        return self._stream(prompt, COMPLETION_TOKENS, add_special_tokens=True)

    def chat(self, messages: list[Message]) -> Iterator[str]:
        """Answer the last message; without max_tokens the answer may fill the context."""
        from quire.text.chat import ChatOptions, prompt_text, read_template

        if self._engine.tokenizer is None:
            raise ConfigError("A conversation needs a tokenizer; leave --skip-tokenizer-init out.")
        options = ChatOptions(template=read_template(self._template))
        return self._stream(prompt_text(self._engine.tokenizer, messages, options), None, add_special_tokens=False)

    def close(self) -> None:
        """Stop the engine."""
        self._engine.close()

    def _stream(self, prompt: str, max_tokens: int | None, add_special_tokens: bool) -> Iterator[str]:
        from quire.core.params import RequestOutputKind

        params = replace(
            self._engine.settings.default_params,
            **{"max_tokens": max_tokens, "output_kind": RequestOutputKind.DELTA, **self._chosen},
        )
        start = time.perf_counter()
        self.figures = figures = Figures()
        engine = self._engine
        engine.submit(engine.prepare("1", prompt, params, add_special_tokens=add_special_tokens))
        try:
            while engine.has_work():
                for output in engine.step():
                    completion = output.outputs[0]
                    figures.prompt_tokens = len(output.prompt_token_ids or ())
                    figures.output_tokens += len(completion.token_ids)
                    figures.seconds = time.perf_counter() - start
                    figures.first_seconds = figures.first_seconds or figures.seconds
                    if completion.finish_reason == "error":
                        raise QuireError("The request failed while it was running; the log says why.")
                    yield completion.text
        finally:
            engine.abort("1")


class RemoteSession:
    """A server that speaks the OpenAI API, reached with the standard library alone."""

    def __init__(self, url: str, model: str | None, api_key: str | None, sample: SampleOptions) -> None:
        self.figures = Figures()
        self._url = urllib.parse.urlsplit(url.rstrip("/"))
        if self._url.scheme not in ("http", "https") or not self._url.netloc:
            raise ConfigError(f"{url!r} is not a server's address; write it like http://localhost:8000/v1.")
        self._headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._chosen = sample.chosen()
        self._model = model or self._first_model()

    def complete(self, prompt: str) -> Iterator[str]:
        """Go on with a text."""
        for choice in self._events("/completions", {"prompt": prompt, "max_tokens": COMPLETION_TOKENS}):
            yield choice.get("text") or ""

    def chat(self, messages: list[Message]) -> Iterator[str]:
        """Answer the last message."""
        for choice in self._events("/chat/completions", {"messages": messages}):
            yield choice.get("delta", {}).get("content") or ""

    def close(self) -> None:
        """Nothing is kept open between answers."""

    def _first_model(self) -> str:
        connection, response = self._request("GET", "/models", None)
        try:
            return str(json.loads(response.read())["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise QuireError(
                f"{self._url.geturl()}/models names no model, as a server of the OpenAI API would. Check --url, or name "
                "the model with --model-name."
            ) from error
        finally:
            connection.close()

    def _events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The choices of a stream's chunks. Raises QuireError where the stream ends before the answer does."""
        body = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **body,
            **self._chosen,
        }
        start = time.perf_counter()
        self.figures = figures = Figures()
        connection, response = self._request("POST", path, body)
        complete = False
        try:
            for event in _told(response):
                if "error" in event:
                    raise QuireError(f"The server broke off: {_message_in(event)}")
                figures.seconds = time.perf_counter() - start
                if event.get("usage"):
                    figures.prompt_tokens = event["usage"]["prompt_tokens"]
                    figures.output_tokens = event["usage"]["completion_tokens"]
                if event.get("choices"):
                    figures.first_seconds = figures.first_seconds or figures.seconds
                    complete = complete or event["choices"][0].get("finish_reason") is not None
                    yield event["choices"][0]
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise QuireError(f"The server broke off: {reason(error) or type(error).__name__}") from error
        finally:
            connection.close()
        if not complete:
            raise QuireError("The server broke off: its stream ended before the answer did.")

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._url.netloc)
        try:
            connection.request(
                method, self._url.path + path, None if body is None else json.dumps(body), headers=self._headers
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise QuireError(
                f"No server answers at {self._url.geturl()}: {reason(error)}. Start one with 'quire serve', or check --url."
            ) from error
        if response.status != 200:
            raise QuireError(f"The server answered {response.status}: {_message_of(response.read())}")
        return connection, response


def _told(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The events of a stream, up to its closing [DONE]."""
    for line in lines:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data:"):
            yield json.loads(text.removeprefix("data:"))


def _message_of(body: bytes) -> str:
    """The message of an error body, or the body itself."""
    text = body.decode(errors="replace")
    try:
        return _message_in(json.loads(text))
    except (ValueError, KeyError, TypeError):
        return text[:200]


def _message_in(told: dict[str, Any]) -> str:
    """The message of an error object; some servers send the message alone."""
    error = told["error"]
    return str(error["message"] if isinstance(error, dict) else error)

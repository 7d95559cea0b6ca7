"""Renders chat templates in a process of its own, which can be killed: one JSON request after another over stdin, stdout.

Run by its path, so that nothing but the standard library and jinja2 is imported. Knows no tokenizer and no server. Each
frame is its length in four bytes, then JSON.
"""

from __future__ import annotations

import json
import os
import resource
import select
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MOST_MEMORY = 1 << 30  # bytes of address space
# Ends the last message where the answer goes on with it. The space tells whether the template trims what it writes.
MARK = "\ue000the message goes on here\ue001 "
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates know it by


class TooLarge(Exception):
    """The rendered text is longer than it may be."""


class _GenerationTag(Extension):
    """Accepts the {% generation %} blocks of training templates and writes what is in them."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The block's content in place of the block, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace() without names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # noqa: B902  # so that namespace(self=...) works
        self, *rest = arguments
        values = dict(*rest, **named)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError("a namespace takes no names that begin with an underscore")


class _Dicts:
    """dict() for templates, without the class itself."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        """As dict.fromkeys."""
        return dict.fromkeys(*arguments)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def compiled(template: str) -> Template:
    """A template with the filters and functions that chat templates expect. Raises TemplateSyntaxError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda layout: datetime.now().strftime(layout),
        "dict": _Dicts(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def render(request: Mapping[str, Any]) -> str:
    """The text of {template, messages, tools, documents, add_generation_prompt, continue_final_message, variables}.

    At most request["chars"] characters; more raises TooLarge.
    """
    template = request["template"]
    messages = [_with_reasoning(message) for message in request["messages"]]
    continued = _continued(messages[-1]) if request["continue_final_message"] else None
    variables = {
        **request["variables"],
        "messages": messages,
        "tools": request["tools"],
        "documents": request["documents"],
        "add_generation_prompt": request["add_generation_prompt"],
    }
    text = "".join(_bounded(compiled(template).generate(variables), request["chars"]))
    return text if continued is None else _cut(text, continued)


def _bounded(pieces: Iterator[str], most: int) -> Iterator[str]:
    for piece in pieces:
        most -= len(piece)
        if most < 0:
            raise TooLarge
        yield piece


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Reasoning under every name that templates read."""
    found = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _continued(message: dict[str, Any]) -> str:
    """Put the mark behind the last text of a message, and return that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + MARK
        return content
    for part in reversed(content or []):
        if "text" in part:
            text = part["text"]
            part["text"] = text + MARK
            return text
    raise TemplateError("the last message has no text to go on with")


def _cut(text: str, continued: str) -> str:
    """The text up to the mark; without the spaces before it where the template trims what it writes."""
    at = text.rfind(MARK.rstrip())
    if at < 0 or continued.strip() not in text:
        raise TemplateError("the template does not show the last message as it is, so it cannot be continued")
    return text[:at] if text.startswith(MARK, at) else text[:at].rstrip()


def answer(request: Mapping[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": what is wrong, "kind": "syntax" | "size" | "render"}."""
    try:
        return {"text": render(request)}
    except TemplateSyntaxError as error:
        return {"kind": "syntax", "error": str(error.message)[:300]}
    except (TooLarge, MemoryError):
        return {"kind": "size", "error": "the text becomes too long"}
    except RecursionError:
        return {"kind": "render", "error": "the template calls itself too deeply"}
    except Exception as error:  # whatever a template does wrong, down to a division by zero, is its own matter
        reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        return {"kind": "render", "error": reason}


def end_with_server() -> None:
    """End this process when the other end of its socket is closed, in the middle of a template if need be."""
    poll = select.poll()
    poll.register(sys.stdin, 0)  # a hang-up is always told
    poll.poll()
    os._exit(0)


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    """Say with an empty frame that all is ready, then answer requests until the other side closes."""
    sink.write(bytes(4))
    sink.flush()
    while len(header := source.read(4)) == 4:
        reply = json.dumps(answer(json.loads(source.read(int.from_bytes(header))))).encode()
        sink.write(len(reply).to_bytes(4) + reply)
        sink.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.Thread(target=end_with_server, daemon=True).start()
    serve(sys.stdin.buffer, sys.stdout.buffer)

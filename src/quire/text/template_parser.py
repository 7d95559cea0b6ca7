"""TemplateParser: an answer read by the response template that came with the tokenizer, as the library reads it.

The same face as FormatParser. Which field of the template is what is told by its name. Knows no tokens and no protocol.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from quire.text.format_parser import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning
from quire.text.format_readers import Call, calls_of_value

logger = logging.getLogger(__name__)

THOUGHTS = ("thinking", "reasoning", "reasoning_content", "thoughts", "thought")
CALLS = ("tool_calls", "tool_call", "function_call")


class TemplateParser:
    """Reads one output with `library`, the parser of the transformers library in the state that the prompt left it in.

    Text that the library cannot read is content from the region on in which that happened.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._out: list[Delta] = []
        self._calls = 0
        self._body = ""  # of the region that is being read, if it holds calls
        self._failed = False

    def push(self, text: str) -> list[Delta]:
        """The next piece of text; what became certain with it."""
        if self._failed:
            return [Content(text)] if text else []
        return self._events(lambda: self._library.feed(text), text)

    def finish(self) -> list[Delta]:
        """The text is over; the rest of it."""
        return [] if self._failed else self._events(lambda: self._library.finalize()[1], "")

    def _events(self, read: Callable[[], Sequence[dict[str, Any]]], text: str) -> list[Delta]:
        try:
            for event in read():
                self._take(event)
        except Exception as error:  # what a template of somebody else's makes of a model's text
            logger.warning("the response template cannot read an answer: %s", error)
            self._failed = True
            self._tell(Content, self._body + text)
        out, self._out = self._out, []
        return out

    def _take(self, event: dict[str, Any]) -> None:
        name, kind = event["field"], event["type"]
        if name in CALLS:
            if kind == "region_chunk":
                self._body += event["text"]
            elif kind == "region_close":
                calls = calls_of_value(event["value"])
                for call in calls or ():
                    self._call(call)
                if calls is None:
                    self._tell(Content, self._body)
                self._body = ""
        elif kind == "region_chunk" and name != "role":
            self._tell(Reasoning if name in THOUGHTS else Content, event["text"])

    def _call(self, call: Call) -> None:
        index = self._calls
        self._calls += 1
        self._out += [CallStart(index, call.name, call.id), CallArguments(index, call.arguments), CallEnd(index)]

    def _tell(self, kind: type[Content] | type[Reasoning], text: str) -> None:
        last = self._out[-1] if self._out else None
        if isinstance(last, kind):
            self._out[-1] = kind(last.text + text)
        elif text:
            self._out.append(kind(text))

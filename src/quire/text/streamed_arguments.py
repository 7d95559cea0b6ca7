"""Arguments of tool calls while they are written: where a call's arguments begin, and what of them can be told at once.

Knows no regions and no markers. Works character by character, so pieces of text make no difference.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

LONGEST_HEAD = 2048  # characters before the arguments
_CLOSERS = {"{": "}", "[": "]"}
# Outside of strings, what JSON is made of, and the names of numbers that are none; anything else ends the arguments.
_PLAIN = frozenset(":,+-. \t\r\n0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_NAMED = (
    r'(?:\s*\[?\s*|[\s}]*,\s*)\{\s*(?:"(?:tool_call_)?id"\s*:\s*"(?P<json_id>[^"\\]{1,128})"\s*,\s*)?'
    r'"(?:tool_)?name"\s*:\s*"(?P<name>[\w.\-:/]{1,256})"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
# By reader: what stands between the beginning of a region, or the end of the call before, and the arguments.
HEADS = {
    "json": re.compile(_NAMED),
    "bare_json": re.compile(_NAMED),
    "keyed": re.compile(r'(?:\s*\[\s*|[\s}]*,\s*)\{\s*"(?P<name>[\w.\-:/]{1,256})"\s*:\s*'),
    "mistral": re.compile(_NAMED + r"|\s*(?P<other>[\w.\-]+)(?:\[CALL_ID\](?P<id>[\w\-]+))?(?:\[ARGS\])?\s*"),
    "deepseek": re.compile(
        r"[^<]*<｜tool▁sep｜>\s*(?P<name>[\w.\-:/]{1,256})[ ]*\n```(?:json)?\n\s*"
        r"|\s*(?P<other>[\w.\-:/]{1,256})<｜tool▁sep｜>\s*"
    ),
    "kimi": re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.\-]+?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*"),
    "plamo": re.compile(
        r"\s*<\|plamo:begin_tool_name:plamo\|>\s*(?P<name>[\w.\-]+)\s*<\|plamo:end_tool_name:plamo\|>\s*"
        r"<\|plamo:begin_tool_arguments:plamo\|>(?:<\|plamo:constrain\|>json)?(?:<\|plamo:msg\|>)?\s*"
    ),
    "channel": re.compile(r"(?P<name>[\w.\-]+)(?:(?!<\|message\|>).)*<\|message\|>\s*", re.DOTALL),
}


@dataclass(frozen=True, slots=True)
class Head:
    """What stands before a call's arguments."""

    name: str
    id: str | None = None


def head_of(reader: str, text: str) -> Head | None:
    """The head of a call, if `text` is one and the beginning of an object: a brace, and the first character inside."""
    expression = HEADS.get(reader)
    place = text.rfind("{", 0, -1)
    if expression is None or place < 0 or len(text) > LONGEST_HEAD:
        return None
    found = expression.fullmatch(text[:place])
    if found is None:
        return None
    groups = found.groupdict()
    return Head(groups["name"] or groups["other"], groups.get("id") or groups.get("json_id"))


@dataclass(slots=True)
class Arguments:
    """Where the reading is within a call's arguments, behind their first brace."""

    open: str = "}"  # the brackets that are to come, the next one last
    quoted: bool = False
    escaped: bool = False
    stopped: bool = False  # by something that is no JSON; the rest is not told

    def step(self, character: str) -> str:
        """One more character; what of it to tell. Nothing is `open` when the arguments are complete."""
        if self.quoted:
            if self.escaped:
                self.escaped = False
            elif character == "\\":
                self.escaped = True
            elif character == '"':
                self.quoted = False
            elif character < " ":  # models write new lines into strings as they are
                return json.dumps(character)[1:-1]
            return character
        if character == '"':
            self.quoted = True
        elif character in _CLOSERS:
            self.open += _CLOSERS[character]
        elif character == self.open[-1]:
            self.open = self.open[:-1]
        elif character not in _PLAIN:
            self.stopped = True
            return ""
        return character

"""FormatParser: generated text -> content, reasoning and tool calls, as it comes.

Works character by character on what was seen so far and never on where a piece of text ends, so every way to cut the
text gives the same result. A call is told as soon as its arguments begin, where they are written as JSON, and otherwise
with its first argument; what turns out to be none is content, with nothing lost but markers that only separate. Made
anew for each output. Knows no tokens and no protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quire.text.format_readers import READERS, Call
from quire.text.formats import ReasoningFormat, Region, ToolFormat
from quire.text.non_json_calls import NON_JSON, NonJsonCalls, Told
from quire.text.streamed_arguments import Arguments, head_of

MOST_REREAD = 32 * 1024  # characters of regions that turn out to be no calls; they are read twice, so there is an end
_BRACKETS = {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}
_SPACES = " \t\r\n"
_FORM = _SPACES + "}],`"  # what may stand behind the last call of a region


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the thoughts before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """Call number `index` begins. `id` is None unless the model wrote one."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of a call, a piece of JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """A call is complete."""

    index: int


Delta = Content | Reasoning | CallStart | CallArguments | CallEnd
_Kind = Literal["call", "think", "silent"]


@dataclass(slots=True)
class _Open:
    """A region that is being read: its text so far, and where in a value the reading is."""

    region: Region
    marker: str
    text: list[str]
    tail: str = ""
    quote: str = ""
    escaped: bool = False
    depth: int = 0
    begun: bool = False  # the value
    blank: bool = True  # nothing but spaces so far
    head: int = 0  # where in the text the head of the next call begins
    before: str = ""  # the last character that is no space
    arguments: Arguments | None = None  # of the call that is being told
    non_json: NonJsonCalls | None = None  # what reads calls that are not written as JSON
    told: int = 0  # calls


class FormatParser:
    """Reads one output.

    `thinking` says that the prompt ended inside of a thought. `schemas` are the tools' argument schemas by name, for
    formats whose arguments are mere text.
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None = None,
        thinking: bool = False,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._schemas = schemas or {}
        self._thinking = reasoning is not None and (thinking or reasoning.implied)
        self._markers: dict[str, _Kind] = {}
        if tools is not None:
            self._markers.update((mark, "silent") for mark in tools.silent)
            self._markers.update((item.opener, "call") for item in tools.regions if not item.bare)
        if reasoning is not None:
            self._markers[reasoning.opener] = "think"
        self._closers: dict[str, _Kind] = dict.fromkeys(reasoning.closers if reasoning else (), "silent")
        self._bare = {item.opener: item for item in (tools.regions if tools else ()) if item.bare}
        self._gap = _SPACES + (tools.separators if tools else "")
        self._queue: deque[str] = deque()
        self._held = ""  # the beginning of a marker, perhaps
        self._spaces = ""  # at the beginning and behind a call; content if content follows
        self._fresh = True  # nothing but spaces since the beginning or the last call
        self._open: _Open | None = None
        self._reread = 0
        self._calls = 0
        self._out: list[Delta] = []
        self._kind: type[Content] | type[Reasoning] | type[CallArguments] | None = None  # of parts not yet in _out
        self._parts: list[str] = []

    def push(self, text: str) -> list[Delta]:
        """The next piece of text; what became certain with it."""
        if self._open is None and not self._held and (self._thinking or not self._fresh):
            starts = {mark[0] for mark in (self._closers if self._thinking else self._markers)}
            if starts.isdisjoint(text):  # the usual case, by the short way
                if text:
                    self._append(Reasoning if self._thinking else Content, text)
                return self._taken()
        self._queue.extend(text)
        self._run()
        return self._taken()

    def finish(self) -> list[Delta]:
        """The text is over; the rest of it."""
        while self._open is not None or self._held:
            if self._open is not None:
                self._close(self._open, at_end=True)
            else:
                self._settle()
            self._run()
        if not self._calls:
            self._tell(self._spaces)
        self._spaces = ""
        return self._taken()

    def _taken(self) -> list[Delta]:
        self._join()
        out, self._out = self._out, []
        return out

    def _run(self) -> None:
        queue = self._queue
        while queue:
            character = queue.popleft()
            if self._open is not None:
                self._inside(self._open, character)
            else:
                self._outside(character)

    # ---------------------------------------------------------------- outside of calls

    def _outside(self, character: str) -> None:
        """Content, reasoning, or a marker that ends one of them."""
        held = self._held + character
        markers = self._closers if self._thinking else self._markers
        if any(mark.startswith(held) for mark in markers):
            longer = any(mark != held and mark.startswith(held) for mark in markers)
            self._held = held
            if not longer:
                self._settle()
        elif self._held:
            self._queue.appendleft(character)
            self._settle()
        else:
            self._plain(character)

    def _settle(self) -> None:
        """Decide what is held: a marker, or text up to where another marker could begin."""
        held, self._held = self._held, ""
        markers = self._closers if self._thinking else self._markers
        found = max((mark for mark in markers if held.startswith(mark)), key=len, default=None)
        if found is None:
            self._plain(held[0])
            self._queue.extendleft(reversed(held[1:]))
            return
        self._queue.extendleft(reversed(held[len(found) :]))
        kind = markers[found]
        if self._thinking:
            self._thinking = False
        elif kind == "think":
            self._spaces = ""
            self._thinking = True
        elif kind == "call":
            assert self._tools is not None, "call markers come from a tool format"
            region = next(item for item in self._tools.regions if item.opener == found)
            self._enter(region, found)

    def _plain(self, character: str) -> None:
        """One character that belongs to no marker."""
        if self._thinking:
            self._append(Reasoning, character)
            return
        if self._fresh:
            if character in (self._gap if self._calls else _SPACES):
                self._spaces += character
                return
            if character in self._bare and self._reread <= MOST_REREAD:
                self._inside(self._enter(self._bare[character], ""), character)
                return
        self._tell(self._spaces + character)

    def _tell(self, text: str) -> None:
        self._spaces = ""
        if text:
            self._fresh = False
            self._append(Content, text)

    def _append(self, kind: type[Content] | type[Reasoning] | type[CallArguments], text: str) -> None:
        if kind is not self._kind:
            self._join()
            self._kind = kind
        self._parts.append(text)

    def _join(self) -> None:
        """Make one delta of the text that came in pieces."""
        text = "".join(self._parts)
        if self._kind is CallArguments:
            self._out.append(CallArguments(self._calls - 1, text))
        elif self._kind is Content or self._kind is Reasoning:
            self._out.append(self._kind(text))
        self._kind, self._parts = None, []

    # ---------------------------------------------------------------- inside of a call

    def _enter(self, region: Region, marker: str) -> _Open:
        """A region begins."""
        opened = self._open = _Open(region, marker, [])
        if region.reader in NON_JSON:
            opened.non_json = NonJsonCalls(NON_JSON[region.reader], self._schemas, region.closer)
        return opened

    def _inside(self, opened: _Open, character: str) -> None:
        """One more character of a region; closes it where it ends."""
        region = opened.region
        opened.text.append(character)
        if region.ending != "marker":
            if not opened.begun and self._cannot_begin(opened, character):
                self._fail(opened)
                return
            self._follow(opened, character)
        if opened.non_json is not None:
            self._tell_non_json(opened, opened.non_json.step(character))
            if opened.non_json.broken and not opened.told:
                self._fail(opened)
                return
        elif region.ending != "marker":
            self._stream(opened, character)
        if region.ending == "value":
            if opened.begun and opened.depth <= 0:
                self._close(opened)
            return
        opened.tail = (opened.tail + character)[-len(region.closer) :]
        if opened.tail == region.closer and not opened.quote:
            self._close(opened)

    def _stream(self, opened: _Open, character: str) -> None:
        """Tell a call whose arguments begin, or more of them."""
        arguments = opened.arguments
        if arguments is None:
            if opened.before == "{" and character in '"}':
                head = head_of(opened.region.reader, "".join(opened.text[opened.head :]))
                if head is not None:
                    self._join()
                    self._calls += 1
                    opened.told += 1
                    opened.arguments = arguments = Arguments()
                    self._out.append(CallStart(self._calls - 1, head.name, head.id))
                    self._append(CallArguments, "{")
            if character not in _SPACES:
                opened.before = character
        if arguments is None or arguments.stopped:
            return
        told = arguments.step(character)
        if told:
            self._append(CallArguments, told)
        if arguments.stopped:
            opened.head = len(opened.text) - 1
        elif not arguments.open:
            self._join()
            self._out.append(CallEnd(self._calls - 1))
            opened.arguments, opened.head, opened.before = None, len(opened.text), ""

    def _cannot_begin(self, opened: _Open, character: str) -> bool:
        """Whether a region that holds nothing but JSON begins with something else."""
        reader = opened.region.reader
        return reader in ("json", "bare_json", "pythonic") and character not in _SPACES and character not in "{["

    def _follow(self, opened: _Open, character: str) -> None:
        """Keep count of strings and brackets."""
        if opened.quote:
            if opened.escaped:
                opened.escaped = False
            elif character == "\\":
                opened.escaped = True
            elif character == opened.quote:
                opened.quote = ""
            return
        if not opened.begun:
            # mistral may write name[ARGS] first; a list counts only where nothing stands before it
            opened.begun = character == "{" or (character == "[" and opened.blank)
            opened.blank = opened.blank and character in _SPACES
            if not opened.begun:
                return
        if character == '"' or (character == "'" and opened.region.reader == "pythonic"):
            opened.quote = character
        else:
            opened.depth += _BRACKETS.get(character, 0)

    def _close(self, opened: _Open, at_end: bool = False) -> None:
        """The region is over: calls, or content."""
        region = opened.region
        if opened.non_json is not None and not at_end:
            self._tell_non_json(opened, opened.non_json.close())
        if opened.told:
            self._close_streamed(opened, at_end)
            return
        if opened.non_json is not None:
            self._fail(opened)
            return
        inside = "".join(opened.text)
        if at_end:
            inside = _without_part(inside, region.closer)
        elif region.closer:
            inside = inside[: len(inside) - len(region.closer)]
        whole = not at_end or (opened.begun and opened.depth == 0)
        calls = READERS[region.reader](inside) if whole else None
        if calls is None:
            self._fail(opened)
            return
        self._open = None
        self._spaces = ""
        self._fresh = True
        for call in calls:
            self._tell_call(call)

    def _close_streamed(self, opened: _Open, at_end: bool) -> None:
        """The end of a region whose calls were told already; what stands behind them is content, if it is any."""
        self._join()
        self._open = None
        self._spaces = ""
        self._fresh = True
        if opened.arguments is not None and not opened.arguments.stopped:
            return
        if opened.non_json is not None and opened.non_json.cut_off:
            return
        rest = "".join(opened.text[opened.head :]) if opened.non_json is None else opened.non_json.untold
        closer = opened.region.closer
        if closer:
            rest = _without_part(rest, closer) if at_end else rest.removesuffix(closer)
        if rest.strip(_FORM):
            self._tell(rest)

    def _tell_non_json(self, opened: _Open, found: Sequence[Told]) -> None:
        """Tell what became certain of calls that are not written as JSON."""
        for told in found:
            if told.kind == "arguments":
                self._append(CallArguments, told.text)
                continue
            self._join()
            if told.kind == "name":
                self._calls += 1
                opened.told += 1
                self._out.append(CallStart(self._calls - 1, told.text))
            else:
                self._out.append(CallEnd(self._calls - 1))

    def _tell_call(self, call: Call) -> None:
        self._join()
        index = self._calls
        self._calls += 1
        self._out += [CallStart(index, call.name, call.id), CallArguments(index, call.arguments), CallEnd(index)]

    def _fail(self, opened: _Open) -> None:
        """The region was none: its opener is content, and what follows that is read again, for it may hold others."""
        self._open = None
        text = opened.text
        self._reread += len(text)
        marker = opened.marker or text[0]
        rest: Sequence[str] = text if opened.marker else text[1:]
        self._tell(self._spaces + marker)
        if self._reread > MOST_REREAD:
            # From here on nothing is taken for a call any more.
            self._markers = {mark: kind for mark, kind in self._markers.items() if kind != "call"}
        self._queue.extendleft(reversed(rest))


def _without_part(text: str, marker: str) -> str:
    """The text without the beginning of a marker at its end."""
    for length in range(min(len(marker), len(text)), 0, -1):
        if text.endswith(marker[:length]):
            return text[:-length]
    return text

"""AnswerFormat: how the answers to one request are written and read: their thoughts, their tool calls, the form they keep.

Knows the formats and the shape of calls in the OpenAI API; knows no engine and no route.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from quire.core.params import SamplingParams, ThinkingMarks
from quire.core.structured import StructuredOutputsParams, Thoughts
from quire.errors import ConfigError, ValidationError
from quire.text.calls import calls_or_form, calls_within_text, only_calls, text_without_calls
from quire.text.format_parser import CallArguments, CallStart, Content, Delta, FormatParser, Reasoning
from quire.text.formats import ReasoningFormat, ToolFormat, hidden_markers
from quire.text.reasoning_formats import reasoning_format, reasoning_format_of
from quire.text.template_parser import TemplateParser
from quire.text.tokenizer import Tokenizer
from quire.text.tool_choice import ToolWish
from quire.text.tool_formats import PLAIN_LIST, tool_format, tool_format_of

LIBRARY = "hf"  # the name, for options, of reading answers by the tokenizer's own response template


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """How the answers to one request are asked for and read."""

    wish: ToolWish = field(default_factory=ToolWish)
    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    thinking: bool = False  # the prompt ends inside of a thought
    form: StructuredOutputsParams | None = None  # that the answer is held to
    marks: ThinkingMarks | None = None  # for a request that limits its thoughts
    shows_special: bool = False  # special tokens must be seen to read the answer
    library: Callable[[], Any] | None = None  # makes what reads an answer by the tokenizer's own response template

    def params(self, params: SamplingParams) -> SamplingParams:
        """The request's parameters with what reading its answer needs. Raises ValidationError."""
        if params.thinking_token_budget is not None:
            if self.marks is None:
                raise ValidationError(
                    "thinking_token_budget needs to know how the model marks its thoughts, and its chat template does "
                    "not show that. Start the server with --reasoning-parser.",
                    "thinking_token_budget",
                )
            params = replace(params, thinking=self.marks)
        if self.form is not None:
            params = replace(params, structured_outputs=self.form)
        return replace(params, skip_special_tokens=False) if self.shows_special else params

    def reader(self) -> AnswerReader:
        """For one answer."""
        if self.library is not None:
            return AnswerReader(self, TemplateParser(self.library()))
        if self.tools is None and self.reasoning is None:
            return AnswerReader(self, None)
        return AnswerReader(self, FormatParser(self.tools, self.reasoning, self.thinking, self.wish.schemas))


def answer_format_of(
    tokenizer: Tokenizer,
    template: str | None,
    wish: ToolWish,
    params: SamplingParams,
    prompt: str,
    tool_parser: str | None,
    reasoning_parser: str | None,
) -> AnswerFormat:
    """How the answers to a request will be read. The formats are those of the options, else those of the chat template."""
    try:
        used = tokenizer.template_for(list(wish.schemas), template)
    except ValidationError:  # a tokenizer that renders by its own code needs no template
        used = ""
    formats = _formats(used, tool_parser, reasoning_parser)
    special = [tokenizer.added_tokens.get(token_id, "") for token_id in tokenizer.special_ids]
    if wish.choice != "required" and _by_template(tokenizer, formats, tool_parser, reasoning_parser):
        shown = [
            {"type": "function", "function": {"name": name, "parameters": wish.schemas[name]}} for name in wish.schemas
        ]
        return AnswerFormat(wish, shows_special=True, library=lambda: tokenizer.response_parser(prompt, shown))
    reasoning = formats.reasoning
    thinking = reasoning is not None and prompt.rstrip().endswith(reasoning.opener)
    tools = _tools(wish, formats.tools)
    form = _form(wish, tools, params, reasoning)
    if form is not None and reasoning is not None:
        begun = thinking or reasoning.implied
        # Calls bring marks of their own; anything else is an answer.
        answer = reasoning.answer if form is params.structured_outputs else ""
        form = replace(form, after=_thoughts(reasoning, begun, answer))
    limits = params.thinking_token_budget is not None and reasoning is not None
    marks = _marks(tokenizer, reasoning) if limits and reasoning is not None else None
    markers = (*(tools.markers if tools else ()), *(reasoning.markers if reasoning else ()))
    return AnswerFormat(wish, tools, reasoning, thinking, form, marks, hidden_markers(markers, special))


def _by_template(tokenizer: Tokenizer, formats: Formats, tool_parser: str | None, reasoning_parser: str | None) -> bool:
    """Whether answers are read by the tokenizer's own response template: on request, or where nothing else is known."""
    wanted = LIBRARY in (tool_parser, reasoning_parser)
    if not tokenizer.has_response_template:
        if wanted:
            raise ConfigError(f"The parser {LIBRARY} needs a tokenizer that comes with a response template.")
        return False
    return wanted or (formats.tools is None and formats.reasoning is None)


def _thoughts(reasoning: ReasoningFormat, begun: bool, answer: str) -> Thoughts:
    return Thoughts(opener=reasoning.opener, closers=reasoning.closers, begun=begun, then=reasoning.then, answer=answer)


def _tools(wish: ToolWish, own: ToolFormat | None) -> ToolFormat | None:
    """How calls will be written, and are read; of a format without calls, what must not be seen."""
    if wish.choice == "required":
        return PLAIN_LIST if own is None or own.writing is None else own
    if wish.choice == "auto" and own is None:
        raise ValidationError(
            'tool_choice "auto" needs to know how the model writes calls, and its chat template does not show that. '
            "Start the server with --tool-call-parser, or use tool_choice none or required.",
            "tool_choice",
        )
    if wish.choice == "auto" or own is None:
        return own
    return replace(own, regions=()) if own.silent else None


def _form(
    wish: ToolWish, tools: ToolFormat | None, params: SamplingParams, reasoning: ReasoningFormat | None
) -> StructuredOutputsParams | None:
    """What an answer is held to: calls, strict tools within text, calls or what the request asks for."""
    writing = tools.writing if tools is not None else None
    if wish.choice == "required":
        assert writing is not None, "_tools() has taken care of that"
        if params.structured_outputs is not None:
            raise ValidationError(
                "A tool that must be called, and response_format or structured_outputs, exclude each other.",
                "tool_choice",
            )
        return only_calls(writing, wish.schemas, wish.parallel)
    wanted = params.structured_outputs
    if (
        wish.choice != "auto"
        or tools is None
        or writing is None
        or (wanted is not None and wanted.structural_tag is not None)
    ):
        return wanted
    if wanted is None and not wish.strict:
        return None
    if wanted is None and writing.trigger:
        return calls_within_text(writing, wish.schemas, wish.strict, wish.parallel)
    answer = reasoning.answer if reasoning is not None else ""
    wanted = wanted or text_without_calls(tools.regions)
    return calls_or_form(writing, wish.schemas, wish.strict, wish.parallel, wanted, answer)


def thinking_marks(tokenizer: Tokenizer, parser: str | None = None) -> ThinkingMarks | None:
    """The tokens around thoughts, as the option says or the chat template shows; None where neither does."""
    try:
        template = tokenizer.template_for()
    except ValidationError:
        template = ""
    found = _formats(template, None, parser).reasoning
    return None if found is None else _marks(tokenizer, found)


def _marks(tokenizer: Tokenizer, reasoning: ReasoningFormat) -> ThinkingMarks:
    opener, *closers = (
        tuple(tokenizer.encode(marker, add_special_tokens=False)) for marker in (reasoning.opener, *reasoning.closers)
    )
    return ThinkingMarks(opener=opener, closers=tuple(closers), implied=reasoning.implied)


def check_formats(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Raise ConfigError for options that name no known format."""
    _formats("", tool_parser, reasoning_parser)


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a model."""

    tools: ToolFormat | None
    reasoning: ReasoningFormat | None


@lru_cache(maxsize=64)
def _formats(template: str, tool_parser: str | None, reasoning_parser: str | None) -> Formats:
    return Formats(
        tool_format(tool_parser) if tool_parser and tool_parser != LIBRARY else tool_format_of(template),
        reasoning_format(reasoning_parser)
        if reasoning_parser and reasoning_parser != LIBRARY
        else reasoning_format_of(template),
    )


@dataclass(frozen=True, slots=True)
class AnswerPiece:
    """A piece of an answer: text, thoughts, and calls in the API's form.

    An entry of `calls` that begins a call has its id and name, a later one more of the arguments of the call `index`.
    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()


class AnswerReader:
    """Reads one answer as it comes."""

    def __init__(self, how: AnswerFormat, parser: FormatParser | TemplateParser | None) -> None:
        self._format = how
        self._parser = parser
        self.calls = 0
        self._strips = how.form is not None and how.reasoning is not None  # spaces between thoughts and form

    def read(self, text: str, finished: bool) -> AnswerPiece:
        """The next text of the answer, all of a kind together."""
        parts = self.read_in_order(text, finished)
        if len(parts) == 1:
            return parts[0]
        return AnswerPiece(
            "".join(part.content for part in parts),
            "".join(part.reasoning for part in parts),
            tuple(call for part in parts for call in part.calls),
        )

    def read_in_order(self, text: str, finished: bool) -> list[AnswerPiece]:
        """The same as pieces, each of one kind, in the order in which the model wrote them."""
        if self._parser is None:
            return [AnswerPiece(text)]
        deltas = self._parser.push(text)
        return self._said(deltas + self._parser.finish() if finished else deltas)

    def finish_reason(self, reason: str | None) -> str | None:
        """What the API calls the end of an answer that ended by `reason`."""
        called = self.calls > 0 and self._format.wish.only is None
        return "tool_calls" if called and reason == "stop" else reason

    def _said(self, deltas: Sequence[Delta]) -> list[AnswerPiece]:
        parts: list[AnswerPiece] = []
        for delta in deltas:
            if isinstance(delta, Content):
                text = delta.text.lstrip() if self._strips else delta.text
                self._strips = self._strips and not text
                if text:
                    parts.append(AnswerPiece(text))
            elif isinstance(delta, Reasoning):
                parts.append(AnswerPiece(reasoning=delta.text))
            elif isinstance(delta, CallStart) and (self._format.wish.parallel or delta.index == 0):
                self.calls += 1
                function = {"name": delta.name, "arguments": ""}
                call_id = delta.id or f"chatcmpl-tool-{uuid.uuid4().hex}"
                call = {"index": delta.index, "id": call_id, "type": "function", "function": function}
                parts.append(AnswerPiece(calls=(call,)))
            elif isinstance(delta, CallArguments) and delta.index < self.calls:
                if not parts or not parts[-1].calls or parts[-1].calls[0]["index"] != delta.index:
                    parts.append(AnswerPiece(calls=({"index": delta.index, "function": {"arguments": ""}},)))
                parts[-1].calls[0]["function"]["arguments"] += delta.text
        return parts

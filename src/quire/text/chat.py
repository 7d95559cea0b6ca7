"""Conversations in the form of the OpenAI API -> the prompt text that the model's chat template makes of them.

Checks every message and names the place of a mistake. Knows no HTTP and no sampling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import ConfigError, ValidationError
from quire.placeholders import placeholder
from quire.text.tokenizer import RESERVED_TEMPLATE_KWARGS, GenerationTag, Tokenizer

# Limits on what clients may pass to the template as variables: a template may do anything with them, such as loop.
MOST_KWARGS_DEPTH = 16
MOST_KWARGS_NODES = 128
MOST_KWARGS_CHARS = 16384
LONGEST_TEMPLATE = 256 * 1024  # characters; the longest known have a tenth of that

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """How a conversation becomes a prompt. `template` takes the place of the tokenizer's own."""

    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    content_format: str = "auto"  # string, openai (a list of parts), or what the template reads


def read_template(option: str | None) -> str | None:
    """The option chat_template, which is a path or the template itself, as a template. Raises ConfigError."""
    if option is None:
        return None
    template = option if any(mark in option for mark in ("{{", "{%", "\n")) else _template_in(option)
    try:
        _parsed(template)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"chat_template is no valid Jinja template: {error.message}, in line {error.lineno}."
        ) from error
    except RecursionError as error:
        raise ConfigError("chat_template is no valid Jinja template: it is nested too deeply.") from error
    return template


def _template_in(path: str) -> str:
    if instead := placeholder(Path(path)):
        raise ConfigError(f"chat_template {path!r} is {instead}.")
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template is {path!r}, which is neither a readable file nor a Jinja template (it has no '{{{{' and "
            "no '{%'). Give the path of a template, or its text."
        ) from error


def _parsed(template: str) -> nodes.Template:
    return ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", GenerationTag]).parse(template)


def prompt_text(tokenizer: Tokenizer, messages: Sequence[Any], options: ChatOptions = ChatOptions()) -> str:
    """The prompt of a conversation, ready to be tokenized without special tokens. Mistakes raise ValidationError."""
    return tokenizer.apply_chat_template(
        read_messages(tokenizer, messages, options),
        tools=options.tools,
        add_generation_prompt=options.add_generation_prompt,
        continue_final_message=options.continue_final_message,
        chat_template=options.template,
        documents=options.documents,
        template_kwargs=options.template_kwargs,
    )


def render_job(tokenizer: Tokenizer, messages: Sequence[Any], options: ChatOptions) -> dict[str, Any]:
    """What render_worker.py needs to make the same text as prompt_text, as JSON. Mistakes raise ValidationError."""
    return {
        "template": tokenizer.template_for(options.tools, options.template),
        "messages": read_messages(tokenizer, messages, options),
        "tools": list(options.tools) if options.tools else None,
        "documents": list(options.documents) if options.documents else None,
        "add_generation_prompt": options.add_generation_prompt,
        "continue_final_message": options.continue_final_message,
        "variables": tokenizer.template_tokens | own_variables(options.template_kwargs),
    }


def read_messages(tokenizer: Tokenizer, messages: Sequence[Any], options: ChatOptions) -> list[dict[str, Any]]:
    """The messages, checked, as the template expects them."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValidationError("The conversation must be a list with at least one message.", "messages")
    template = tokenizer.template_for(options.tools, options.template)
    if len(template) > LONGEST_TEMPLATE:
        raise ValidationError(f"A chat template may have {LONGEST_TEMPLATE} characters.", "chat_template")
    as_parts = options.content_format == "openai" or (
        options.content_format == "auto" and _loops_over_content(template)
    )
    check_template_kwargs(options.template_kwargs)
    return [_message(message, f"messages[{index}]", as_parts) for index, message in enumerate(messages)]


def own_variables(given: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the template itself; those that decide how it is rendered raise ValidationError."""
    reserved = sorted(RESERVED_TEMPLATE_KWARGS.intersection(given))
    if reserved:
        raise ValidationError(
            f"{', '.join(map(repr, reserved))} cannot be set through chat_template_kwargs. Use the field of that name, "
            "where there is one.",
            "chat_template_kwargs",
        )
    return dict(given)


def check_template_kwargs(given: Mapping[str, Any]) -> None:
    """Refuse variables that are deeper or larger than any template needs."""
    count = 0
    level: list[object] = [given]
    for _ in range(MOST_KWARGS_DEPTH):
        following: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                following.extend(value.values())
            elif isinstance(value, (list, tuple)):
                following.extend(value)
        count += len(following)
        level = following
        if count > MOST_KWARGS_NODES or not level:
            break
    too_large = count > MOST_KWARGS_NODES or bool(level) or len(json.dumps(given, default=str)) > MOST_KWARGS_CHARS
    if too_large:
        raise ValidationError(
            f"chat_template_kwargs may hold {MOST_KWARGS_NODES} values, {MOST_KWARGS_DEPTH} levels and "
            f"{MOST_KWARGS_CHARS} characters at most.",
            "chat_template_kwargs",
        )


def _message(message: object, place: str, as_parts: bool) -> dict[str, Any]:
    """One message as templates expect it: role, content, and what else it brings that is not empty."""
    if not isinstance(message, Mapping):
        raise ValidationError(f"{place} must be an object with role and content.", place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValidationError(
            f"{place}.role must be a string such as user, assistant, system or tool.", f"{place}.role"
        )
    read = {key: value for key, value in message.items() if value is not None}
    calls = message.get("tool_calls")
    if calls:
        read["tool_calls"] = _tool_calls(calls, f"{place}.tool_calls")
    else:
        read.pop("tool_calls", None)
    content = message.get("content")
    if content is None:
        if not calls and role not in ("assistant", "tool", "function"):
            raise ValidationError(f"{place}.content is missing.", f"{place}.content")
        read["content"] = ""
    else:
        read["content"] = _content(content, f"{place}.content", as_parts)
    if "reasoning_content" in read:
        read["reasoning"] = read.pop("reasoning_content")
    name = read.get("name")
    if name is not None and not isinstance(name, str):
        raise ValidationError(f"{place}.name must be a string.", f"{place}.name")
    return read


def _content(content: object, place: str, as_parts: bool) -> str | list[dict[str, str]]:
    """Content as one string, or as a list of text parts where the template reads such."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if as_parts else content
    if not isinstance(content, Sequence):
        raise ValidationError(f"{place} must be a string or a list of parts.", place)
    texts = [_part_text(part, f"{place}[{index}]") for index, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if as_parts else "\n".join(texts)


def _part_text(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise ValidationError(f"{place} must be an object such as {{'type': 'text', 'text': ...}}.", place)
    kind = part.get("type")
    if not isinstance(kind, str):
        raise ValidationError(f"{place}.type is missing.", f"{place}.type")
    if kind not in _TEXT_PARTS:
        raise ValidationError(
            f"{place} has the type {kind[:40]!r}, which is not supported by this model. It takes parts of type text.",
            f"{place}.type",
        )
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise ValidationError(f"{place}.{_TEXT_PARTS[kind]} must be a string.", f"{place}.{_TEXT_PARTS[kind]}")
    return text


def _tool_calls(calls: object, place: str) -> list[dict[str, Any]]:
    """Earlier tool calls with their arguments as objects: templates write them with tojson."""
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise ValidationError(f"{place} must be a list.", place)
    read = []
    for index, call in enumerate(calls):
        where = f"{place}[{index}].function"
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValidationError(f"{where} must be an object with name and arguments.", where)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except ValueError as error:
                raise ValidationError(f"{where}.arguments is not valid JSON.", f"{where}.arguments") from error
        read.append({**call, "function": {**function, "arguments": {} if arguments is None else arguments}})
    return read


@lru_cache(maxsize=64)
def _loops_over_content(template: str) -> bool:
    """True when a template goes through a message's content part by part instead of writing it as a string."""
    try:
        tree = _parsed(template)
    except (TemplateSyntaxError, RecursionError):
        return False  # rendering says what is wrong with it
    aliases = {
        assigned.target.name
        for assigned in tree.find_all(nodes.Assign)
        if isinstance(assigned.target, nodes.Name) and _is_content(assigned.node, frozenset())
    }
    return any(_is_content(loop.iter, frozenset(aliases)) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, aliases: frozenset[str]) -> bool:
    """message.content, message['content'], a name for one of them, or any of them through filters and slices."""
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Const):
            return node.arg.value == "content"
        return isinstance(node.arg, nodes.Slice) and _is_content(node.node, aliases)
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, aliases)
    return isinstance(node, nodes.Name) and node.name in aliases

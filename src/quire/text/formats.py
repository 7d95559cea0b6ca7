"""How models write tool calls and reasoning: a table of plain data, and which entry a chat template belongs to.

One parser reads all of them (format_parser.py). A new format that is like the others is one more entry.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from quire.errors import ConfigError

Ending = Literal["marker", "quoted", "value"]


@dataclass(frozen=True, slots=True)
class Region:
    """A stretch of text that holds tool calls.

    It begins with `opener` and ends, by `ending`, with `closer` wherever that stands ("marker"), with `closer` outside
    of JSON strings ("quoted"), or with the last bracket of its value ("value"). `reader` names what reads its inside.
    A region with `bare` has no marker of its own: the opener belongs to the value, and counts only at the beginning of
    the text or behind another call.
    """

    opener: str
    closer: str
    reader: str
    ending: Ending = "quoted"
    bare: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. `silent` markers are dropped, `separators` are characters allowed between two calls.

    `signs`: a chat template that has all strings of one of these teaches the format.
    """

    name: str
    regions: tuple[Region, ...]
    silent: tuple[str, ...] = ()
    separators: str = ""
    signs: tuple[tuple[str, ...], ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (*self.silent, *(mark for item in self.regions for mark in (item.opener, item.closer) if mark))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """One way to write reasoning. `implied`: an output begins with it even where nothing says so."""

    name: str
    opener: str
    closers: tuple[str, ...]
    implied: bool = False
    signs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (self.opener, *self.closers)


# In the order in which templates are compared with them: the more particular first.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "openai",
        (
            Region("<|channel|>commentary to=functions.", "<|call|>", "channel"),
            Region("<|start|>assistant to=functions.", "<|call|>", "channel"),
            Region("<|channel|>analysis to=functions.", "<|call|>", "channel"),
        ),
        silent=(
            "<|channel|>final<|message|>",
            "<|channel|>commentary<|message|>",
            "<|start|>assistant",
            "<|end|>",
            "<|return|>",
        ),
        signs=(("<|channel|>", "to=functions."),),
        aliases=("gpt_oss",),
    ),
    ToolFormat(
        "seed_oss",
        (Region("<seed:tool_call>", "</seed:tool_call>", "function_xml", "marker"),),
        signs=(("<seed:tool_call>",),),
    ),
    ToolFormat(
        "minimax_m2",
        (Region("<minimax:tool_call>", "</minimax:tool_call>", "invoke_xml", "marker"),),
        signs=(("<minimax:tool_call>",),),
    ),
    ToolFormat(
        "qwen3_coder",
        (Region("<tool_call>", "</tool_call>", "function_xml", "marker"),),
        signs=(("<tool_call>", "<function="),),
        aliases=("qwen3_xml", "step3p5", "mimo"),
    ),
    ToolFormat(
        "glm45",
        (Region("<tool_call>", "</tool_call>", "key_value_xml", "marker"),),
        signs=(("<arg_key>",),),
        aliases=("glm47",),
    ),
    ToolFormat(
        "kimi_k2",
        (Region("<|tool_call_begin|>", "<|tool_call_end|>", "kimi"),),
        silent=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        signs=(("<|tool_call_begin|>",),),
    ),
    ToolFormat(
        "deepseek_v3",
        (Region("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "deepseek"),),
        silent=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        signs=(("<｜tool▁call▁begin｜>",),),
        aliases=("deepseek_v31",),
    ),
    ToolFormat(
        "functiongemma",
        (Region("<start_function_call>", "<end_function_call>", "gemma", "marker"),),
        signs=(("<start_function_call>",),),
    ),
    ToolFormat("mistral", (Region("[TOOL_CALLS]", "", "mistral", "value"),), signs=(("[TOOL_CALLS]",),)),
    ToolFormat(
        "lfm2",
        (Region("<|tool_call_start|>", "<|tool_call_end|>", "pythonic"),),
        signs=(("<|tool_call_start|>",),),
    ),
    ToolFormat(
        "granite",
        (Region("<|tool_call|>", "", "json", "value"), Region("<tool_call>", "", "json", "value")),
        signs=(("<|start_of_role|>", "<|tool_call|>"),),
    ),
    ToolFormat(
        "phi4_mini_json",
        (Region("functools", "", "json", "value"),),
        signs=(("functools",), ("<|tool|>", "<|/tool|>")),
    ),
    ToolFormat(
        "llama4_pythonic",
        (
            Region("<|python_start|>", "<|python_end|>", "pythonic"),
            Region("[", "", "pythonic", "value", bare=True),
        ),
        silent=("<|python_end|>",),
        signs=(("<|python_start|>",), ("[func_name1(params_name1=params_value1",)),
        aliases=("pythonic", "olmo3"),
    ),
    ToolFormat(
        "llama3_json",
        (Region("<|python_tag|>", "", "bare_json", "value"), Region("{", "", "bare_json", "value", bare=True)),
        separators=";,",
        signs=(("<|python_tag|>",), ('{"name": function name, "parameters"',)),
        aliases=("llama4_json",),
    ),
    ToolFormat(
        "longcat",
        (Region("<longcat_tool_call>", "</longcat_tool_call>", "json"),),
        signs=(("<longcat_tool_call>",),),
    ),
    ToolFormat(
        "hunyuan_a13b",
        (Region("<tool_calls>", "</tool_calls>", "json"),),
        signs=(("<tool_calls>",),),
        aliases=("jamba",),
    ),
    ToolFormat(
        "hermes",
        (Region("<tool_call>", "</tool_call>", "json"),),
        signs=(("<tool_call>",),),
        aliases=("qwen", "qwen3_json", "granite4", "ernie45"),
    ),
)

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        "openai_gptoss",
        "<|channel|>analysis<|message|>",
        ("<|end|>", "<|return|>"),
        signs=("<|channel|>analysis", "<|channel|>"),
        aliases=("gpt_oss", "openai"),
    ),
    ReasoningFormat("mistral", "[THINK]", ("[/THINK]",), signs=("[THINK]",)),
    ReasoningFormat("seed_oss", "<seed:think>", ("</seed:think>",), signs=("<seed:think>",)),
    ReasoningFormat(
        "qwen3",
        "<think>",
        ("</think>",),
        signs=("<think>", "</think>"),
        aliases=("glm45", "glm47", "deepseek_v3", "hunyuan_a13b", "ernie45", "mimo", "olmo3", "kimi_k2"),
    ),
    ReasoningFormat("deepseek_r1", "<think>", ("</think>",), implied=True, aliases=("minimax_m2", "step3")),
)


def tool_format(name: str) -> ToolFormat:
    """The format of that name. ConfigError names the known ones."""
    for item in TOOL_FORMATS:
        if name == item.name or name in item.aliases:
            return item
    known = sorted(alias for item in TOOL_FORMATS for alias in (item.name, *item.aliases))
    raise ConfigError(f"tool_call_parser is {name!r}, which is not known. Known: {', '.join(known)}.")


def reasoning_format(name: str) -> ReasoningFormat:
    """The format of that name. ConfigError names the known ones."""
    for item in REASONING_FORMATS:
        if name == item.name or name in item.aliases:
            return item
    known = sorted(alias for item in REASONING_FORMATS for alias in (item.name, *item.aliases))
    raise ConfigError(f"reasoning_parser is {name!r}, which is not known. Known: {', '.join(known)}.")


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, if any."""
    for item in TOOL_FORMATS:
        if any(all(sign in template for sign in signs) for signs in item.signs):
            return item
    return None


def reasoning_format_of(template: str) -> ReasoningFormat | None:
    """The way of reasoning that a chat template knows, if any."""
    return next((item for item in REASONING_FORMATS if any(sign in template for sign in item.signs)), None)


def hidden_markers(markers: Iterable[str], special: Iterable[str]) -> bool:
    """Whether any marker has special tokens in it, which a text shows only with skip_special_tokens switched off."""
    tokens = [token for token in special if token]
    return any(token in marker for marker in markers for token in tokens)

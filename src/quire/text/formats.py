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
class Writing:
    """How a grammar lets calls be written.

    A call is `begin`, where NAME stands for the tool's name and # for a number, the arguments, `end`; calls are apart by
    `between`, and all of them stand between `before` and `after`. In free text `trigger` begins them; without one, calls
    within text cannot be told from text. `style` is that of the arguments. `alone`: a call ends the output.
    """

    begin: str
    end: str
    before: str = ""
    between: str = ""
    after: str = ""
    trigger: str = ""
    style: str = "template_json"
    alone: bool = False


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. `silent` markers are dropped, `separators` are characters allowed between two calls.

    `signs`: a chat template that has all strings of one of these teaches the format. `writing`: None where a grammar
    cannot keep to the format.
    """

    name: str
    regions: tuple[Region, ...]
    silent: tuple[str, ...] = ()
    separators: str = ""
    signs: tuple[tuple[str, ...], ...] = ()
    aliases: tuple[str, ...] = ()
    writing: Writing | None = None

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (*self.silent, *(mark for item in self.regions for mark in (item.opener, item.closer) if mark))


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """One way to write reasoning. `implied`: an output begins with it even where nothing says so.

    `then` is what models write between their thoughts and what comes next, `answer` what begins an answer.
    """

    name: str
    opener: str
    closers: tuple[str, ...]
    implied: bool = False
    signs: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    then: str = ""
    answer: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """All literal strings that the parser must see."""
        return (self.opener, *self.closers)


LIST_WRITING = Writing('{"name": "NAME", "parameters": ', "}", "[", ", ", "]")

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
        writing=Writing(
            "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>",
            "<|call|>",
            trigger="<|channel|>commentary to=functions.",
            alone=True,
        ),
    ),
    ToolFormat(
        "seed_oss",
        (Region("<seed:tool_call>", "</seed:tool_call>", "function_xml", "marker"),),
        signs=(("<seed:tool_call>",),),
        writing=Writing(
            "<seed:tool_call>\n<function=NAME>\n",
            "</function>\n</seed:tool_call>",
            between="\n",
            trigger="<seed:tool_call>",
            style="qwen_xml",
        ),
    ),
    ToolFormat(
        "minimax_m2",
        (Region("<minimax:tool_call>", "</minimax:tool_call>", "invoke_xml", "marker"),),
        signs=(("<minimax:tool_call>",),),
        writing=Writing(
            '<invoke name="NAME">\n',
            "</invoke>\n",
            before="<minimax:tool_call>\n",
            after="</minimax:tool_call>",
            trigger="<minimax:tool_call>",
            style="minimax_xml",
        ),
    ),
    ToolFormat(
        "qwen3_coder",
        (Region("<tool_call>", "</tool_call>", "function_xml", "marker"),),
        signs=(("<tool_call>", "<function="),),
        aliases=("qwen3_xml", "step3p5", "mimo"),
        writing=Writing(
            "<tool_call>\n<function=NAME>\n",
            "</function>\n</tool_call>",
            between="\n",
            trigger="<tool_call>",
            style="qwen_xml",
        ),
    ),
    ToolFormat(
        "glm45",
        (Region("<tool_call>", "</tool_call>", "key_value_xml", "marker"),),
        signs=(("<arg_key>",),),
        aliases=("glm47",),
        writing=Writing("<tool_call>NAME\n", "</tool_call>", between="\n", trigger="<tool_call>", style="glm_xml"),
    ),
    ToolFormat(
        "kimi_k2",
        (Region("<|tool_call_begin|>", "<|tool_call_end|>", "kimi"),),
        silent=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        signs=(("<|tool_call_begin|>",),),
        writing=Writing(
            "<|tool_call_begin|>functions.NAME:#<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
            before="<|tool_calls_section_begin|>",
            after="<|tool_calls_section_end|>",
            trigger="<|tool_calls_section_begin|>",
        ),
    ),
    ToolFormat(
        "deepseek_v3",
        (Region("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "deepseek"),),
        silent=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        signs=(("<｜tool▁call▁begin｜>", "```json"),),
        writing=Writing(
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
            "\n```<｜tool▁call▁end｜>",
            before="<｜tool▁calls▁begin｜>",
            between="\n",
            after="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
        ),
    ),
    ToolFormat(
        "deepseek_v31",
        (Region("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "deepseek"),),
        silent=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        signs=(("<｜tool▁call▁begin｜>",),),
        writing=Writing(
            "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
            before="<｜tool▁calls▁begin｜>",
            after="<｜tool▁calls▁end｜>",
            trigger="<｜tool▁calls▁begin｜>",
        ),
    ),
    ToolFormat(
        "functiongemma",
        (Region("<start_function_call>", "<end_function_call>", "gemma", "marker"),),
        signs=(("<start_function_call>",),),
    ),
    ToolFormat(
        "mistral_args",
        (Region("[TOOL_CALLS]", "", "mistral", "value"),),
        signs=(("[TOOL_CALLS]", "[ARGS]"),),
        writing=Writing("[TOOL_CALLS]NAME[ARGS]", "", trigger="[TOOL_CALLS]"),
    ),
    ToolFormat(
        "mistral",
        (Region("[TOOL_CALLS]", "", "mistral", "value"),),
        signs=(("[TOOL_CALLS]",),),
        writing=Writing('{"name": "NAME", "arguments": ', "}", "[TOOL_CALLS] [", ", ", "]", trigger="[TOOL_CALLS]"),
    ),
    ToolFormat(
        "lfm2",
        (Region("<|tool_call_start|>", "<|tool_call_end|>", "pythonic"),),
        signs=(("<|tool_call_start|>",),),
    ),
    ToolFormat(
        "granite",
        (Region("<|tool_call|>", "", "json", "value"), Region("<tool_call>", "", "json", "value")),
        signs=(("<|start_of_role|>", "<|tool_call|>"),),
        writing=Writing('{"name": "NAME", "arguments": ', "}", "<|tool_call|>[", ", ", "]", trigger="<|tool_call|>"),
    ),
    ToolFormat(
        "phi4_mini_json",
        (Region("functools", "", "json", "value"),),
        signs=(("functools",), ("<|tool|>", "<|/tool|>")),
        writing=Writing('{"name": "NAME", "arguments": ', "}", "functools[", ", ", "]", trigger="functools["),
    ),
    ToolFormat(
        "llama4_pythonic",
        (
            Region("<|python_start|>", "<|python_end|>", "pythonic"),
            Region("[", "", "pythonic", "value", bare=True),
        ),
        silent=("<|python_end|>",),
        signs=(("<|python_start|>",), ("[func_name1(params_name1=params_value1",)),
        aliases=("pythonic",),
    ),
    ToolFormat(
        "llama3_json",
        (Region("<|python_tag|>", "", "bare_json", "value"), Region("{", "", "bare_json", "value", bare=True)),
        separators=";,",
        signs=(("<|python_tag|>",), ('{"name": function name, "parameters"',)),
        writing=Writing('{"name": "NAME", "parameters": ', "}", between="; "),
        aliases=("llama4_json",),
    ),
    ToolFormat(
        "cohere_command3",
        (Region("<|START_ACTION|>", "<|END_ACTION|>", "json"),),
        silent=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
        signs=(("<|START_ACTION|>",),),
        aliases=("cohere_command4",),
    ),
    ToolFormat(
        "deepseek_v32",
        (Region("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "dsml", "marker"),),
        signs=(("<｜DSML｜",), ("｜DSML｜function_calls",)),
    ),
    ToolFormat(
        "apertus",
        (Region("<|tools_prefix|>", "<|tools_suffix|>", "keyed"),),
        signs=(("<|tools_prefix|>",),),
    ),
    ToolFormat(
        "gemma4",
        (Region("<|tool_call>", "<tool_call|>", "gemma4", "marker"),),
        signs=(("<|tool_call>",),),
    ),
    ToolFormat(
        "internlm",
        (Region("<|action_start|><|plugin|>", "<|action_end|>", "json"),),
        signs=(("<|action_start|>",),),
    ),
    ToolFormat(
        "granite-20b-fc",
        (Region("<function_call>", "", "json", "value"),),
        signs=(("<function_call>",),),
        writing=Writing('<function_call> {"name": "NAME", "arguments": ', "}", between="\n", trigger="<function_call>"),
    ),
    ToolFormat(
        "olmo3",
        (Region("<function_calls>", "</function_calls>", "python_lines", "marker"),),
        signs=(("<function_calls>",),),
    ),
    ToolFormat("xlam", (Region("[", "", "bare_json", "value", bare=True),), writing=LIST_WRITING),
    ToolFormat(
        "longcat",
        (Region("<longcat_tool_call>", "</longcat_tool_call>", "json"),),
        signs=(("<longcat_tool_call>",),),
        writing=Writing(
            '<longcat_tool_call>{"name": "NAME", "arguments": ',
            "}</longcat_tool_call>",
            between="\n",
            trigger="<longcat_tool_call>",
        ),
    ),
    ToolFormat(
        "hunyuan_a13b",
        (Region("<tool_calls>", "</tool_calls>", "json"),),
        signs=(("<tool_calls>",),),
        aliases=("jamba",),
        writing=Writing(
            '{"name": "NAME", "arguments": ', "}", "<tool_calls>[", ", ", "]</tool_calls>", trigger="<tool_calls>"
        ),
    ),
    ToolFormat(
        "hermes",
        (Region("<tool_call>", "</tool_call>", "json"),),
        signs=(("<tool_call>",),),
        aliases=("qwen", "qwen3_json", "granite4", "ernie45"),
        writing=Writing(
            '<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>", between="\n", trigger="<tool_call>"
        ),
    ),
)

# How forced calls are written where a grammar cannot keep to the model's own format.
PLAIN_LIST = ToolFormat(
    "list",
    (Region("[", "", "bare_json", "value", bare=True),),
    writing=LIST_WRITING,
)

REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(
        "openai_gptoss",
        "<|channel|>analysis<|message|>",
        ("<|end|>", "<|return|>"),
        signs=("<|channel|>analysis", "<|channel|>"),
        aliases=("gpt_oss", "openai"),
        then="<|start|>assistant",
        answer="<|channel|>final<|message|>",
    ),
    ReasoningFormat(
        "cohere_command3",
        "<|START_THINKING|>",
        ("<|END_THINKING|>",),
        signs=("<|START_THINKING|>",),
        aliases=("cohere_command4",),
        answer="<|START_RESPONSE|>",
    ),
    ReasoningFormat("gemma4", "<|channel>thought\n", ("<channel|>",), signs=("<|channel>",)),
    ReasoningFormat(
        "granite", "Here is my thought process:", ("Here is my response:",), signs=("Here is my thought process:",)
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

"""How models write tool calls: a table of plain data, and which entry a chat template belongs to.

A new format that is like the others is one more entry. What each was checked against is in docs/tools.md.
"""

from __future__ import annotations

from quire.text.formats import Region, ToolFormat, Writing, named

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
        "hy_v3",
        (
            Region("<tool_call>", "</tool_call>", "key_value_xml", "marker"),
            Region("<tool_call:opensource>", "</tool_call:opensource>", "key_value_opensource", "marker"),
        ),
        silent=("<tool_calls>", "</tool_calls>", "<tool_calls:opensource>", "</tool_calls:opensource>"),
        signs=(("<tool_calls>", "<arg_key>"), ("<tool_calls:opensource>",)),
        aliases=("hy_v4",),
        writing=Writing(
            "<tool_call>NAME<tool_sep>\n",
            "</tool_call>",
            before="<tool_calls>",
            between="\n",
            after="</tool_calls>",
            trigger="<tool_calls>",
            style="glm_xml",
        ),
    ),
    ToolFormat(
        "glm45",
        (Region("<tool_call>", "</tool_call>", "key_value_xml", "marker"),),
        signs=(("<arg_key>",),),
        aliases=("glm47", "poolside_v1"),
        writing=Writing("<tool_call>NAME\n", "</tool_call>", between="\n", trigger="<tool_call>", style="glm_xml"),
    ),
    ToolFormat(
        "kimi_k3",
        (Region("<|open|>call tool=", "<|close|>call<|sep|>", "xtml", "marker"),),
        silent=(
            "<|open|>tools<|sep|>",
            "<|close|>tools<|sep|>",
            "<|open|>response<|sep|>",
            "<|close|>response<|sep|>",
            "<|close|>message<|sep|>",
        ),
        signs=(("<|open|>", "<|close|>", "<|sep|>"),),
        writing=Writing(
            '<|open|>call tool="NAME" index="#"<|sep|>',
            "<|close|>call<|sep|>",
            before="<|open|>tools<|sep|>",
            after="<|close|>tools<|sep|>",
            trigger="<|open|>tools<|sep|>",
            style="xtml",
        ),
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
        "step3",
        (Region("<｜tool_call_begin｜>", "<｜tool_call_end｜>", "steptml", "marker"),),
        silent=("<｜tool_calls_begin｜>", "<｜tool_calls_end｜>"),
        signs=(("<steptml:invoke",),),
        writing=Writing(
            '<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="NAME">\n',
            "</steptml:invoke><｜tool_call_end｜>",
            before="<｜tool_calls_begin｜>",
            between="\n",
            after="<｜tool_calls_end｜>",
            trigger="<｜tool_calls_begin｜>",
            style="steptml",
        ),
    ),
    ToolFormat(
        "plamo3",
        (Region("<|plamo:begin_tool_request:plamo|>", "<|plamo:end_tool_arguments:plamo|>", "plamo"),),
        silent=(
            "<|plamo:begin_tool_requests:plamo|>",
            "<|plamo:end_tool_request:plamo|>",
            "<|plamo:end_tool_requests:plamo|>",
        ),
        signs=(("<|plamo:begin_tool_request:plamo|>",), ("plamo:begin_tool_request",)),
        writing=Writing(
            "<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>NAME<|plamo:end_tool_name:plamo|>"
            "<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>",
            "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>",
            before="<|plamo:begin_tool_requests:plamo|>",
            after="<|plamo:end_tool_requests:plamo|>",
            trigger="<|plamo:begin_tool_requests:plamo|>",
        ),
    ),
    ToolFormat(
        "gigachat31",
        (Region("<|function_call|>", "", "json", "value"),),
        signs=(("<|function_call|>",),),
        writing=Writing(
            '<|function_call|>{"name": "NAME", "arguments": ', "}", trigger="<|function_call|>", alone=True
        ),
    ),
    ToolFormat(
        "gigachat3",
        (
            Region("<|message_sep|>\n\nfunction call<|role_sep|>\n", "", "json", "value"),
            Region("<|function_call|>", "", "json", "value"),
        ),
        signs=(("function call", "<|role_sep|>"),),
        writing=Writing(
            '<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "NAME", "arguments": ',
            "}",
            trigger="<|message_sep|>\n\nfunction call<|role_sep|>\n",
            alone=True,
        ),
    ),
    ToolFormat(
        "minicpm5",
        (Region("<function name=", "</function>", "param_xml", "marker"),),
        signs=(("<function name=", "<param name="),),
        writing=Writing(
            '<function name="NAME">', "</function>", between="\n", trigger="<function name=", style="param_xml"
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
        writing=Writing(
            "<start_function_call>call:NAME{",
            "}<end_function_call>",
            trigger="<start_function_call>",
            style="gemma",
        ),
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
        writing=Writing(
            "NAME(",
            ")",
            before="<|tool_call_start|>[",
            between=", ",
            after="]<|tool_call_end|>",
            trigger="<|tool_call_start|>",
            style="python",
        ),
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
        writing=Writing("NAME(", ")", before="[", between=", ", after="]", style="python"),
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
        writing=Writing(
            '{"tool_call_id": "#", "tool_name": "NAME", "parameters": ',
            "}",
            before="<|START_ACTION|>[\n    ",
            between=",\n    ",
            after="\n]<|END_ACTION|>",
            trigger="<|START_ACTION|>",
        ),
    ),
    ToolFormat(
        "deepseek_v32",
        (
            Region("<｜DSML｜function_calls>", "</｜DSML｜function_calls>", "dsml", "marker"),
            Region("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "dsml", "marker"),
        ),
        signs=(("<｜DSML｜",), ("｜DSML｜function_calls",), ("｜DSML｜tool_calls",)),
        aliases=("deepseek_v4",),
        writing=Writing(
            '<｜DSML｜invoke name="NAME">\n',
            "</｜DSML｜invoke>\n",
            before="<｜DSML｜function_calls>\n",
            after="</｜DSML｜function_calls>",
            trigger="<｜DSML｜function_calls>",
            style="dsml",
        ),
    ),
    ToolFormat(
        "apertus",
        (Region("<|tools_prefix|>", "<|tools_suffix|>", "keyed"),),
        signs=(("<|tools_prefix|>",),),
        writing=Writing('{"NAME": ', "}", "<|tools_prefix|>[", ", ", "]<|tools_suffix|>", trigger="<|tools_prefix|>"),
    ),
    ToolFormat(
        "gemma4",
        (Region("<|tool_call>", "<tool_call|>", "gemma4", "marker"),),
        signs=(("<|tool_call>",),),
        writing=Writing("<|tool_call>call:NAME{", "}<tool_call|>", trigger="<|tool_call>", style="gemma4"),
    ),
    ToolFormat(
        "internlm",
        (Region("<|action_start|><|plugin|>", "<|action_end|>", "json"),),
        signs=(("<|action_start|>",),),
        writing=Writing(
            '<|action_start|><|plugin|>\n{"name": "NAME", "parameters": ',
            "}<|action_end|>",
            trigger="<|action_start|><|plugin|>",
        ),
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
        writing=Writing(
            "NAME(",
            ")",
            before="<function_calls>",
            between="\n",
            after="</function_calls>",
            trigger="<function_calls>",
            style="python",
        ),
    ),
    ToolFormat(
        "xlam",
        (
            Region("[", "", "bare_json", "value", bare=True),
            Region("```json", "```", "bare_json"),
            Region("[TOOL_CALLS]", "", "bare_json", "value"),
            Region("<tool_call>", "</tool_call>", "bare_json"),
        ),
        writing=LIST_WRITING,
    ),
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


def tool_format(name: str) -> ToolFormat:
    """The format of that name. ConfigError names the known ones."""
    return named(TOOL_FORMATS, name, "tool_call_parser")


def tool_format_of(template: str) -> ToolFormat | None:
    """The format that a chat template teaches, if any."""
    for item in TOOL_FORMATS:
        if any(all(sign in template for sign in signs) for signs in item.signs):
            return item
    return None

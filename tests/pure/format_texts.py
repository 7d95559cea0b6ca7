"""Two calls, as the models of every format write them."""

from __future__ import annotations

import json
from typing import Any

SCHEMAS = {"get_weather": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}
PARIS = ("get_weather", {"city": "Paris", "days": 3})
ADD = ("add", {"a": 1, "b": [2, {"c": None}]})
ARGUMENTS = (json.dumps(PARIS[1]), json.dumps(ADD[1]))


def as_json(name: str, arguments: Any, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments})


WEATHER, SUM = as_json(*PARIS), as_json(*ADD)
# format -> a text with both calls, as its models write it
BOTH = {
    "hermes": f"<tool_call>\n{WEATHER}\n</tool_call>\n<tool_call>\n{SUM}\n</tool_call>",
    "longcat": f"<longcat_tool_call>{WEATHER}</longcat_tool_call><longcat_tool_call>{SUM}</longcat_tool_call>",
    "hunyuan_a13b": f"<tool_calls>[{WEATHER}, {SUM}]</tool_calls>",
    "llama3_json": f"{as_json(*PARIS, 'parameters')}; {as_json(*ADD, 'parameters')}",
    "llama4_pythonic": "[get_weather(city='Paris', days=3), add(a=1, b=[2, {'c': None}])]",
    "lfm2": "<|tool_call_start|>[get_weather(city='Paris', days=3), add(a=1, b=[2, {'c': null}])]<|tool_call_end|>",
    "mistral": f"[TOOL_CALLS] [{WEATHER}, {SUM}]",
    "granite": f"<|tool_call|>[{WEATHER}, {SUM}]",
    "phi4_mini_json": f"functools[{WEATHER}, {SUM}]",
    "deepseek_v3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{}"
        "\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ).format(*ARGUMENTS),
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ).format(*ARGUMENTS),
    "glm45": (
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
        '<arg_key>b</arg_key>\n<arg_value>[2, {"c": null}]</arg_value>\n</tool_call>'
    ),
    "qwen3_coder": (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n"
        '[2, {"c": null}]\n</parameter>\n</function>\n</tool_call>'
    ),
    "minimax_m2": (
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Paris</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n<invoke name="add">\n<parameter name="a">1</parameter>\n'
        '<parameter name="b">[2, {"c": null}]</parameter>\n</invoke>\n</minimax:tool_call>'
    ),
    "openai": (
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{}"
        "<|call|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}"
        "<|call|>"
    ).format(*ARGUMENTS),
    "functiongemma": (
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}<end_function_call>"
        "<start_function_call>call:add{a:1,b:[2,{c:null}]}<end_function_call>"
    ),
}
BOTH["deepseek_v31"] = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    + json.dumps(PARIS[1])
    + "<｜tool▁call▁end｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
    + json.dumps(ADD[1])
    + "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
BOTH["mistral_args"] = f"[TOOL_CALLS]get_weather[ARGS]{json.dumps(PARIS[1])}[TOOL_CALLS]add[ARGS]{json.dumps(ADD[1])}"
BOTH["cohere_command3"] = (
    "<|START_ACTION|>["
    + json.dumps({"tool_call_id": "0", "tool_name": PARIS[0], "parameters": PARIS[1]})
    + ", "
    + json.dumps({"tool_call_id": "1", "tool_name": ADD[0], "parameters": ADD[1]})
    + "]<|END_ACTION|>"
)
BOTH["deepseek_v32"] = (
    '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Paris'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="b" string="false">[2, {"c": null}]</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
BOTH["apertus"] = f"<|tools_prefix|>[{json.dumps(dict([PARIS]))}, {json.dumps(dict([ADD]))}]<|tools_suffix|>"
BOTH["gemma4"] = (
    '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
    "<|tool_call>call:add{a:1,b:[2,{c:null}]}<tool_call|>"
)
BOTH["internlm"] = "".join(
    f"<|action_start|><|plugin|>\n{as_json(*call, 'parameters')}<|action_end|>" for call in (PARIS, ADD)
)
BOTH["granite-20b-fc"] = f"<function_call> {WEATHER}\n<function_call> {SUM}"
BOTH["olmo3"] = '<function_calls>get_weather(city="Paris", days=3)\nadd(a=1, b=[2, {"c": None}])</function_calls>'
BOTH["xlam"] = f"[{WEATHER}, {SUM}]"
BOTH["seed_oss"] = BOTH["qwen3_coder"].replace("tool_call>", "seed:tool_call>")
BOTH["hy_v3"] = (
    "<tool_calls>"
    + BOTH["glm45"].replace("get_weather\n", "get_weather<tool_sep>\n").replace("add\n", "add<tool_sep>\n")
    + "</tool_calls>"
)
BOTH["kimi_k3"] = (
    '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" type="string"<|sep|>'
    'Paris<|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
    '<|close|>call<|sep|><|open|>call tool="add" index="2"<|sep|><|open|>argument key="a" type="number"<|sep|>1'
    '<|close|>argument<|sep|><|open|>argument key="b" type="array"<|sep|>[2, {"c": null}]<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|><|close|>message<|sep|>"
)
BOTH["step3"] = (
    '<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="get_weather">\n'
    '<steptml:parameter name="city">Paris</steptml:parameter>\n<steptml:parameter name="days">3</steptml:parameter>\n'
    '</steptml:invoke><｜tool_call_end｜>\n<｜tool_call_begin｜>function<｜tool_sep｜><steptml:invoke name="add">'
    '<steptml:parameter name="a">1</steptml:parameter><steptml:parameter name="b">[2, {"c": null}]</steptml:parameter>'
    "</steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>"
)
BOTH["minicpm5"] = (
    '<function name="get_weather"><param name="city"><![CDATA[Paris]]></param><param name="days">3</param></function>\n'
    '<function name="add"><param name="a">1</param><param name="b">[2, {"c": null}]</param></function>'
)
BOTH["plamo3"] = (
    "<|plamo:begin_tool_requests:plamo|>"
    + "".join(
        f"<|plamo:begin_tool_request:plamo|><|plamo:begin_tool_name:plamo|>{name}<|plamo:end_tool_name:plamo|>"
        f"<|plamo:begin_tool_arguments:plamo|><|plamo:constrain|>json<|plamo:msg|>{json.dumps(arguments)}"
        "<|plamo:end_tool_arguments:plamo|><|plamo:end_tool_request:plamo|>"
        for name, arguments in (PARIS, ADD)
    )
    + "<|plamo:end_tool_requests:plamo|>"
)
BOTH["gigachat31"] = f"<|function_call|>{WEATHER}<|function_call|>{SUM}"
BOTH["gigachat3"] = "".join(f"<|message_sep|>\n\nfunction call<|role_sep|>\n{call}" for call in (WEATHER, SUM))
BARE = {"llama3_json", "llama4_pythonic", "xlam"}
IDS = {"kimi_k2": ["functions.get_weather:0", "functions.add:1"], "cohere_command3": ["0", "1"]}

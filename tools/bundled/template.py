"""The chat format: special tokens, the Jinja template, and where the assistant's own words are in a rendered chat.

ChatML turns; tools are listed as JSON in the system turn and called in `<tool_call>` blocks, as Hermes and Qwen do.
"""

import json
from functools import partial
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, TURN_START, TURN_END]
# One token each, yet ordinary text: a server that hides special tokens must still see the calls.
MARKUP_TOKENS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

CHAT_TEMPLATE = """\
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if system %}
        {{- system + '\\n\\n' }}
    {%- endif %}
    {{- 'You may call these tools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif system %}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in turns %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' }}
            {%- if function.arguments is string %}
                {{- function.arguments }}
            {%- else %}
                {{- function.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
# Jinja's own `tojson` escapes for HTML; Transformers and its followers replace it by the plain one.
_environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
_compiled = _environment.from_string(CHAT_TEMPLATE)


def render(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, answer_next: bool = False) -> str:
    """What `apply_chat_template` makes of the same messages, without its cost on every call."""
    return _compiled.render(messages=messages, tools=tools, add_generation_prompt=answer_next)


def answer_mask(ids: list[int], header: list[int], turn_end: int) -> list[bool]:
    """True for each token that the assistant itself has to say: after its header, up to and with the turn's end."""
    mask = [False] * len(ids)
    inside = False
    for index, token in enumerate(ids):
        mask[index] = inside
        if token == turn_end:
            inside = False
        elif ids[max(0, index + 1 - len(header)) : index + 1] == header:
            inside = True
    return mask

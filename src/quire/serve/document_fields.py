"""What the fields of bodies may hold, as JSON Schema for the OpenAPI document: bounds, choices and shapes.

The routes check all of it by themselves; tests/engine/test_server_document.py holds that both say the same.
"""

from __future__ import annotations

from typing import Any

from quire.core.params import MAX_LOGPROB_TOKEN_IDS
from quire.serve.protocol import (
    LONGEST_SALT,
    LONGEST_STOP,
    MOST_CHOICES,
    MOST_DOCUMENTS,
    MOST_ITEMS,
    MOST_PROMPTS,
    MOST_STOPS,
    MOST_TOKENS,
    MOST_TOOLS,
)

Schema = dict[str, Any]

LARGEST = 2**31 - 1


def number(least: float, most: float, kind: str = "number") -> Schema:
    """A number within both ends."""
    return {"type": kind, "minimum": least, "maximum": most}


def integer(least: int, most: int = LARGEST) -> Schema:
    """A whole number within both ends."""
    return number(least, most, "integer")


def above(least: float, most: float) -> Schema:
    """A number above the lower end."""
    return {"type": "number", "exclusiveMinimum": least, "maximum": most}


def choice(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


def text(longest: int | None = None, shortest: int = 0) -> Schema:
    """A string."""
    return {"type": "string", "minLength": shortest} | ({} if longest is None else {"maxLength": longest})


def items(of: Schema, most: int, least: int = 0) -> Schema:
    """A list."""
    return {"type": "array", "items": of, "minItems": least, "maxItems": most}


def record(required: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with these members."""
    return {"type": "object", "properties": required | optional, "required": list(required)}


def one_of(*schemas: Schema) -> Schema:
    """Any of these."""
    return {"anyOf": list(schemas)}


TOKEN = integer(0) | {"format": "token-id"}  # and COUNT: below the limits of the model and the server
COUNT = integer(0) | {"format": "logprobs"}
NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}
# A schema of what a tool takes: objects whose members are of the plain types.
ARGUMENTS = record(
    {"type": choice("object")},
    properties={
        "type": "object",
        "propertyNames": NAME,
        "additionalProperties": record({"type": choice("string", "number", "integer", "boolean")}),
    },
)
FUNCTION = record({"name": NAME}, description=text(), parameters=ARGUMENTS)
CHOSEN = record({"type": choice("function"), "function": record({"name": NAME})})
PART = record({"type": choice("text"), "text": text()})
CONTENT = one_of(text(), items(PART, LARGEST, 1))
CALL = record({"id": text(), "type": choice("function"), "function": record({"name": NAME, "arguments": choice("{}")})})
TURN = one_of(
    record({"role": choice("system", "developer", "user", "assistant"), "content": CONTENT}),
    record({"role": choice("tool"), "content": CONTENT, "tool_call_id": text()}),
    record({"role": choice("assistant"), "tool_calls": items(CALL, LARGEST, 1)}),
)
PROMPT = one_of(
    text(shortest=1),
    items(text(shortest=1), MOST_PROMPTS, 1),
    items(TOKEN, LARGEST, 1),
    items(items(TOKEN, LARGEST, 1), MOST_PROMPTS, 1),
)
FORM = one_of(
    record({"type": choice("text", "json_object")}),
    record({"type": choice("json_schema"), "json_schema": record({"name": NAME, "schema": ARGUMENTS})}),
)
WISH = one_of(
    record({"json": ARGUMENTS}),
    record({"regex": {"type": "string", "examples": ["[0-9]{4}"]}}),
    record({"choice": items(text(shortest=1), 1024, 1) | {"uniqueItems": True}}),
    record({"grammar": {"type": "string", "examples": ['root ::= "yes" | "no"']}}),
)

# Of every body that has such a field.
FIELDS: dict[str, Schema] = {
    "n": integer(1, MOST_CHOICES),
    "temperature": number(0, 2),
    "top_p": above(0, 1),
    "top_k": integer(-1),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "stop": one_of(text(LONGEST_STOP, 1), items(text(LONGEST_STOP, 1), MOST_STOPS)),
    "stop_sequences": items(text(LONGEST_STOP, 1), MOST_STOPS),
    "stop_token_ids": items(TOKEN, MOST_ITEMS["stop_token_ids"]),
    "max_tokens": integer(1),
    "max_completion_tokens": integer(1),
    "max_output_tokens": integer(1),
    "min_tokens": integer(0),
    "logit_bias": {
        "type": "object",
        "propertyNames": {"type": "string", "pattern": "^[0-9]{1,9}$"},
        "additionalProperties": number(-100, 100),
        "maxProperties": MOST_ITEMS["logit_bias"],
    },
    "allowed_token_ids": items(TOKEN, MOST_ITEMS["allowed_token_ids"], 1),
    "bad_words": items(text(LONGEST_STOP, 1), 128),
    "prompt_logprobs": COUNT,
    "top_logprobs": COUNT,
    "logprob_token_ids": items(TOKEN, MAX_LOGPROB_TOKEN_IDS),
    "thinking_token_budget": integer(-1),
    "truncate_prompt_tokens": one_of(integer(-1, -1), integer(1)),
    "truncation_side": choice("left", "right"),
    "cache_salt": {"type": "string", "pattern": f"^[^@/\\\\\\x00]{{1,{LONGEST_SALT}}}$"},
    "repetition_detection": record({"max_pattern_size": integer(1, 64)}, min_count=integer(2, 64)),
    "response_format": FORM,
    "structured_outputs": WISH,
    "documents": items({"type": "object"}, MOST_DOCUMENTS),
    "tool_choice": one_of(
        choice("none", "auto", "required"),
        CHOSEN,
        record(
            {
                "type": choice("allowed_tools"),
                "allowed_tools": record({"mode": choice("auto", "required"), "tools": items(CHOSEN, MOST_TOOLS, 1)}),
            }
        ),
    ),
    "functions": items(FUNCTION, MOST_TOOLS, 1),
    "function_call": one_of(choice("none", "auto"), record({"name": NAME})),
    "prompt": PROMPT,
    "messages": items(TURN, LARGEST, 1),
    "tools": items(record({"type": choice("function"), "function": FUNCTION}), MOST_TOOLS, 1),
    "tokens": items(TOKEN, MOST_TOKENS),
}

_BLOCKS = one_of(text(shortest=1), items(record({"type": choice("text"), "text": text(shortest=1)}), LARGEST, 1))
_MESSAGES_FIELDS: dict[str, Schema] = {
    "messages": items(record({"role": choice("user", "assistant"), "content": _BLOCKS}), LARGEST, 1),
    "system": _BLOCKS,
    "tools": items(record({"name": NAME, "input_schema": ARGUMENTS}, description=text()), MOST_TOOLS),
    "tool_choice": one_of(
        record({"type": choice("auto", "any", "none")}), record({"type": choice("tool"), "name": NAME})
    ),
    "thinking": record({"type": choice("adaptive", "disabled")}),
}
# Of one body alone.
OWN: dict[str, dict[str, Schema]] = {
    "CompletionRequest": {"logprobs": COUNT, "max_tokens": integer(0)},
    "TokenizeRequest": {"prompt": text()},
    "MessagesRequest": _MESSAGES_FIELDS,
    "TokensRequest": _MESSAGES_FIELDS,
    "ResponsesRequest": {
        "input": one_of(
            text(shortest=1),
            items(record({"role": choice("user", "assistant", "system"), "content": text()}), LARGEST, 1),
        ),
        "tools": items(record({"type": choice("function"), "name": NAME, "parameters": ARGUMENTS}), MOST_TOOLS),
        "include": items(choice("message.output_text.logprobs", "reasoning.encrypted_content"), 2),
        "text": record({}, format=record({"type": choice("text", "json_object")})),
        "reasoning": record({}, effort=choice("none", "minimal", "low", "medium", "high")),
        "stream_options": record({}, include_obfuscation={"type": "boolean"}),
    },
}
# Fields without which a body is refused, although their absence is a matter of the route.
REQUIRED = {"CompletionRequest": ["prompt"]}
# Fields of which a body has one.
ONE_OF = {"TokenizeRequest": ["prompt", "messages"]}
EXAMPLES: dict[str, Schema] = {
    "CompletionRequest": {"prompt": "Once upon a time", "max_tokens": 32},
    "ChatRequest": {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 64},
    "ResponsesRequest": {"input": "Tell me a tale.", "max_output_tokens": 64},
    "MessagesRequest": {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 64},
    "TokensRequest": {"messages": [{"role": "user", "content": "Tell me a tale."}]},
    "TokenizeRequest": {"prompt": "Once upon a time"},
    "DetokenizeRequest": {"tokens": [12, 34]},
}

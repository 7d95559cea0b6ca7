"""The forms that tool calls are held to: structural tags made of a model's way of writing and the tools' schemas.

Pure functions of plain data. Knows no request, no engine and no grammar engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from quire.core.structured import StructuredOutputsParams
from quire.text.formats import Region, Writing

MOST_FORCED_CALLS = 8

Schemas = Mapping[str, Mapping[str, Any]]


def only_calls(writing: Writing, schemas: Schemas, parallel: bool) -> StructuredOutputsParams:
    """Nothing but calls of these tools, at least one."""
    return _form(_calls(writing, _tags(writing, schemas, schemas), parallel))


def calls_within_text(
    writing: Writing, schemas: Schemas, strict: Iterable[str], parallel: bool
) -> StructuredOutputsParams:
    """Any text; where a call begins, it is one of these tools, and the arguments of `strict` ones keep to their schemas."""
    tags = _tags(writing, schemas, frozenset(strict))
    if writing.before:
        calls = _calls(writing, tags, parallel)
        tags = [{"begin": writing.before, "content": calls["content"], "end": writing.after}]
    once = writing.alone or not parallel
    return _form({"type": "triggered_tags", "triggers": [writing.trigger], "tags": tags, "stop_after_first": once})


def text_without_calls(regions: Iterable[Region]) -> StructuredOutputsParams:
    """Any text in which no call can begin: neither with its first visible character nor with a mark."""
    bare = "".join(re.escape(region.opener) for region in regions if region.bare)
    marks = "|".join(re.escape(region.opener) for region in regions if not region.bare)
    any_mark = f" & ~/(.|\\n)*({marks})(.|\\n)*/" if marks else ""
    return StructuredOutputsParams(grammar=f"start: TEXT\nTEXT: /\\s*([^\\s{bare}](.|\\n)*)?/{any_mark}")


def calls_or_form(
    writing: Writing,
    schemas: Schemas,
    strict: Iterable[str],
    parallel: bool,
    wanted: StructuredOutputsParams,
    answer: str,
) -> StructuredOutputsParams:
    """Either calls and nothing else, or the form that the request wants, behind what begins an `answer`."""
    calls = _calls(writing, _tags(writing, schemas, frozenset(strict)), parallel)
    form = {"type": "tag", "begin": answer, "content": _format(wanted), "end": ""}
    return StructuredOutputsParams(
        structural_tag={"type": "structural_tag", "format": {"type": "or", "elements": [calls, form]}},
        disable_any_whitespace=wanted.disable_any_whitespace,
        disable_additional_properties=wanted.disable_additional_properties,
        whitespace_pattern=wanted.whitespace_pattern,
    )


def _format(wanted: StructuredOutputsParams) -> dict[str, Any]:
    """A form, which is no structural tag itself, as a part of one."""
    if wanted.regex is not None:
        return {"type": "regex", "pattern": wanted.regex}
    if wanted.grammar is not None:
        return {"type": "grammar", "grammar": wanted.grammar}
    if wanted.choice is not None:
        return {"type": "or", "elements": [{"type": "const_string", "value": text} for text in wanted.choice]}
    return {"type": "json_schema", "json_schema": wanted.json if wanted.json is not None else {"type": "object"}}


def _form(content: Mapping[str, Any]) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": content})


def _calls(writing: Writing, tags: list[dict[str, Any]], parallel: bool) -> dict[str, Any]:
    """One call or several, with what stands around and between them."""
    several = {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": writing.between,
        "at_least_one": True,
        "max_tags": MOST_FORCED_CALLS if parallel and not writing.alone else 1,
    }
    return {"type": "tag", "begin": writing.before, "content": several, "end": writing.after}


def _tags(writing: Writing, schemas: Schemas, strict: Iterable[str]) -> list[dict[str, Any]]:
    """A tag for each tool."""
    tags = []
    for name, schema in schemas.items():
        begin, _, rest = writing.begin.replace("NAME", name).partition("#")
        arguments: dict[str, Any] = {
            "type": "json_schema",
            "json_schema": _arguments(schema) if name in strict else {"type": "object"},
            "style": writing.style,
        }
        if rest:  # the number of the call stands in its beginning
            parts = [{"type": "regex", "pattern": "[0-9]{1,3}"}, {"type": "const_string", "value": rest}, arguments]
            arguments = {"type": "sequence", "elements": parts}
        tags.append({"begin": begin, "content": arguments, "end": writing.end})
    return tags


def _arguments(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's schema: always an object."""
    kept = dict(schema)
    kept.setdefault("type", "object")
    if not kept.get("properties"):
        kept.setdefault("additionalProperties", False)
    return kept

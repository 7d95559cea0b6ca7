"""Values that models write in other notations than JSON: Python's literals, and Gemma's. Nothing is ever evaluated.

Pure functions of the text of one argument. Knows no calls.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

MOST_PYTHON = 64 * 1024  # characters of one argument in Python's notation


def json_or_text(text: str) -> Any:
    """The value that a text has as JSON, or as a constant of Python's; else the text."""
    try:
        return json.loads(text.strip(), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return {"True": True, "False": False, "None": None}.get(text.strip(), text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def python_pair(text: str) -> dict[str, Any] | None:
    """key=literal, read as JSON where it is that, else from the syntax tree."""
    found = re.fullmatch(r"\s*([^\W\d]\w*)\s*=(?!=)(.*)", text, re.DOTALL)
    if found is None or len(text) > MOST_PYTHON:
        return None
    try:
        return {found[1]: json.loads(found[2], parse_constant=_no_constant)}  # as a grammar has it written
    except (ValueError, RecursionError):
        pass
    try:
        return {found[1]: _literal(ast.parse(found[2].strip(), mode="eval").body)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; anything else raises ValueError."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float, bool))):
        return node.value
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return -value
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if all(isinstance(key, str) for key in keys):
            return dict(zip(keys, map(_literal, node.values), strict=True))
    raise ValueError("not a literal")


def gemma_pair(text: str) -> dict[str, Any] | None:
    """key:value, texts between <escape> and <escape>."""
    scanner = _GemmaValues(text.strip())
    found = scanner.pairs("")
    return None if scanner.rest else found


def gemma4_pair(text: str) -> dict[str, Any] | None:
    """The same with other marks around texts."""
    return None if "<escape>" in text else gemma_pair(text.replace('<|"|>', "<escape>"))


class _GemmaValues:
    """Values in functiongemma's notation, read from the left."""

    def __init__(self, text: str) -> None:
        self.rest = text
        self._depth = 0

    def pairs(self, end: str) -> dict[str, Any] | None:
        """key:value,key:value up to `end`; None when it is something else."""
        found: dict[str, Any] = {}
        while self.rest and not (end and self.rest.startswith(end)):
            key = re.match(r"\s*(?:<escape>)?([\w.\- ]+?)(?:<escape>)?\s*:", self.rest)
            if key is None:
                return None
            self.rest = self.rest[key.end() :]
            value = self.value()
            if value is None:
                return None
            found[key[1]] = value[0]
            if self.rest.startswith(","):
                self.rest = self.rest[1:]
            elif self.rest and not (end and self.rest.startswith(end)):
                return None
        return found

    def value(self) -> list[Any] | None:
        """The next value, in a list of one; None when there is none."""
        self._depth += 1
        if self._depth > 64:
            return None
        try:
            return self._value()
        finally:
            self._depth -= 1

    def _value(self) -> list[Any] | None:
        if self.rest.startswith("<escape>"):
            text, end, self.rest = self.rest[8:].partition("<escape>")
            return [text] if end else None
        if self.rest.startswith("{"):
            self.rest = self.rest[1:]
            inside = self.pairs("}")
            return [inside] if inside is not None and self._skip("}") else None
        if self.rest.startswith("["):
            self.rest = self.rest[1:]
            items: list[Any] = []
            while not self.rest.startswith("]"):
                item = self.value()
                if item is None or not (self._skip(",") or self.rest.startswith("]")):
                    return None
                items += item
            return [items] if self._skip("]") else None
        bare = re.match(r"[^,{}\[\]<]+", self.rest)
        if bare is None:
            return None
        self.rest = self.rest[bare.end() :]
        return [json_or_text(bare[0].strip())]

    def _skip(self, mark: str) -> bool:
        found = self.rest.startswith(mark)
        if found:
            self.rest = self.rest[len(mark) :]
        return found

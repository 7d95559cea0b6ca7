"""The JSON Schema Test Suite, draft 2020-12: what the grammars let through is valid, and what they cannot keep is named."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from test_grammar_constraint import END, TOKENS, allowed, made, wish

from quire.core.structured import StructuredOutputsParams
from quire.errors import ValidationError
from quire.grammar import Grammars

SUITE = json.loads((Path(__file__).parent.parent / "data" / "json_schema_suite.json").read_text())
CLOSING = frozenset(b'"}]')
MOST_TOKENS = 400


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return made()


def form(schema: Any) -> StructuredOutputsParams:
    return wish(json=schema if isinstance(schema, dict) else json.dumps(schema))


def usable(grammars: Grammars) -> list[dict[str, Any]]:
    """The cases whose schemas are taken; every other one must be refused with a reason."""
    found = []
    for case in SUITE:
        try:
            grammars.check(form(case["schema"]))
            found.append(case)
        except ValidationError as error:
            assert error.field == "structured_outputs" and len(str(error)) > 40, str(error)
    return found


def test_no_invalid_instance_is_let_through(grammars: Grammars) -> None:
    cases = usable(grammars)
    counts: Counter[tuple[str, str]] = Counter()
    for case in cases:
        for instance, valid in case["tests"]:
            taken = lets_through(grammars, case["schema"], instance)
            counts["valid" if valid else "invalid", "taken" if taken else "not"] += 1
            assert valid or not taken, (case["schema"], instance)
            if valid and not taken:
                counts["not", why_not(grammars, case, instance)] += 1
    print(f"{len(cases)} of {len(SUITE)} schemas are taken; instances: {dict(counts)}")
    assert len(cases) >= 176
    # What the standard allows and no model need write: a format is a note there, 1.0 is an integer, order means nothing.
    assert counts["valid", "taken"] >= 348
    assert counts["not", "format"] <= 10 and counts["not", "fraction"] <= 9 and counts["not", "order"] <= 3
    assert not counts["not", "unknown"]


def lets_through(grammars: Grammars, schema: Any, instance: Any) -> bool:
    text = json.dumps(instance, ensure_ascii=False).encode()
    return grammars.constraint(form(schema)).advance([*text, END]) == len(text) + 1


def why_not(grammars: Grammars, case: dict[str, Any], instance: Any) -> str:
    """Why a valid instance is not let through."""
    if case["group"] == "format":
        return "format"
    if re.search(r"\d\.0\b", json.dumps(instance)):
        whole = json.loads(json.dumps(instance), parse_float=lambda number: int(float(number)))
        return "fraction" if lets_through(grammars, case["schema"], whole) else "unknown"
    if isinstance(instance, dict):
        orders = (dict(items) for items in permutations(instance.items()))
        return "order" if any(lets_through(grammars, case["schema"], order) for order in orders) else "unknown"
    return "unknown"


def test_what_is_generated_is_valid(grammars: Grammars) -> None:
    """A random walk through the masks, as a model without any sense would go."""
    validator = pytest.importorskip("jsonschema_rs")
    ended = 0
    cases = usable(grammars)
    for number, case in enumerate(cases):
        if case["group"] == "format":
            continue  # formats are only notes to a validator, and rules to the grammar
        checker = validator.Draft202012Validator(case["schema"])
        for seed in range(3):
            text = walked(grammars, case["schema"], random.Random(1000 * seed + number))
            if text is not None:
                ended += 1
                value = json.loads(text, parse_float=lambda number: max(-1e300, min(1e300, float(number))))
                assert checker.is_valid(value), (case["schema"], text)
    print(f"{ended} outputs")
    assert ended > 2.5 * len(cases) * 0.9


def walked(grammars: Grammars, schema: Any, chance: random.Random) -> str | None:
    constraint = grammars.constraint(form(schema))
    output = b""
    for _ in range(MOST_TOKENS):
        choices = allowed(constraint)
        assert choices, "no way on"
        closing = [token for token in choices if token in CLOSING or token == END]
        token = chance.choice(closing if closing and chance.random() < 0.5 else choices)
        assert constraint.advance([token]) == 1
        if token == END:
            return output.decode()
        output += TOKENS.token_bytes(token)
    return None


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ("true", '{"a": [1, null]}', "{"),
        ("{}", '"x"', "x"),
        ('{"type": "array", "maxItems": 2.0, "items": {"type": "integer"}}', "[1, 2]", "[1, 2, 3]"),
        ('{"const": 1.5}', "1.5", "1"),
        ('{"type": "string", "format": "password"}', '"x"', "1"),  # a format that the standard does not know
        ('{"properties": {"if": {"type": "string"}, "format": {"type": "integer"}}}', '{"if": "a"}', '{"if": 1}'),
    ],
)
def test_schemas_in_unusual_forms(grammars: Grammars, schema: str, good: str, bad: str) -> None:
    for text, fits in ((good, True), (bad, False)):
        assert (grammars.constraint(wish(json=schema)).advance([*text.encode(), END]) == len(text) + 1) is fits


def test_a_schema_that_nothing_fits_is_refused(grammars: Grammars) -> None:
    with pytest.raises(ValidationError, match="false"):
        grammars.check(wish(json="false"))

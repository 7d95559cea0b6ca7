"""Grammars without any model: a random walk through what the masks allow must always end in the form asked for."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from schemas import fits, invent

from quire.core.params import SamplingParams
from quire.core.structured import StructuredOutputsParams
from quire.errors import ClientError, RequestFailedError, ValidationError
from quire.grammar import Constraint, Grammars, MaskFiller, MaskWish, Vocabulary
from quire.grammar.constraint import mask_width
from waiting import until


class ByteTokens:
    """One token for each byte, some longer ones, one without text, and an end."""

    LONGER = (b'{"', b'": "', b'", "', b"true", b"null", b'"}', b"abc", b"\xc3\xa4", b"12", b'"name"')
    END = 256 + len(LONGER)
    vocab_size = END + 2  # the last one says nothing
    special_ids = frozenset((END,))

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return self.LONGER[token_id - 256] if token_id < self.END else b"<end>" if token_id == self.END else b""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())


TOKENS = ByteTokens()
FILLER = MaskFiller(2)
END = TOKENS.END
SPACES = frozenset(b" \t\n\r")


def made(**options: Any) -> Grammars:
    return Grammars(lambda: Vocabulary(TOKENS, TOKENS.vocab_size, (END,)), **options)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return made()


def wish(**form: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**form)


def allowed(constraint: Constraint) -> list[int]:
    return masks_of(constraint)[0]


def masks_of(constraint: Constraint, drafts: Sequence[int] = ()) -> list[list[int]]:
    mask = np.zeros((1 + len(drafts), mask_width(TOKENS.vocab_size)), dtype=np.int32)
    FILLER.fill([MaskWish(constraint, 0, drafts)], mask)
    return [np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist() for row in mask]


def walk(constraint: Constraint, chance: random.Random, most: int = 2000) -> str:
    """An output chosen at random; spaces are avoided, so that it ends."""
    output = b""
    for _ in range(most):
        choices = allowed(constraint)
        assert choices, "no way on"
        better = [token for token in choices if token not in SPACES] or choices
        token = END if END in better and chance.random() < 0.3 else chance.choice(better)
        assert constraint.advance([token]) == 1
        if token == END:
            return output.decode()
        output += TOKENS.token_bytes(token)
    raise AssertionError(f"no end: {output!r}")


def test_invented_schemas_are_kept(grammars: Grammars) -> None:
    chance = random.Random(5)
    for _ in range(150):
        schema = invent(chance)
        text = walk(grammars.constraint(wish(json=schema)), chance)
        assert fits(json.loads(text), schema), (schema, text)


@pytest.mark.parametrize(
    "regex",
    ["[a-z]{3,8} [0-9]+", "(a+)+b", "^(yes|no)$", "^x$|^y$", r"\d{4}-\d{2}", r"a\$", r"[/\n\"]{2}|//", "[äöü]{2}/?"],
)
def test_regexes_are_kept(grammars: Grammars, regex: str) -> None:
    chance = random.Random(regex)
    for _ in range(5):
        text = walk(grammars.constraint(wish(regex=regex)), chance)
        assert re.fullmatch(regex, text, re.ASCII), text


def test_choices_are_kept_whatever_is_in_them(grammars: Grammars) -> None:
    choices = ["a", "ab", 'say "x"/\n\\ ä 😀 .(*)[#', "$^"]
    constraint_of = wish(choice=choices)
    chance = random.Random(1)
    assert {walk(grammars.constraint(constraint_of), chance) for _ in range(60)} == set(choices)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "a" start "b" | "x"',
        'root ::= "a" root "b" | "x"',
        '?start: one\n!one: "a" one "b" -> pair\n  | "x" -> leaf\n',  # what says how trees look changes no text
    ],
)
def test_grammars_in_both_notations(grammars: Grammars, grammar: str) -> None:
    text = walk(grammars.constraint(wish(grammar=grammar)), random.Random(2))
    depth = text.index("x")
    assert text == "a" * depth + "x" + "b" * depth


def test_the_end_is_allowed_only_where_the_output_is_complete(grammars: Grammars) -> None:
    constraint = grammars.constraint(wish(choice=["ab", "abc"]))
    assert END not in allowed(constraint)
    assert constraint.advance(list(b"ab")) == 2
    assert allowed(constraint) == sorted([ord("c"), END])
    assert not constraint.done
    assert constraint.advance([ord("c")]) == 1
    assert constraint.done and allowed(constraint) == [END]
    assert constraint.advance([END, END]) == 2  # ignore_eos goes on after the end
    constraint.rollback(3)
    assert allowed(constraint) == sorted([ord("c"), END])


def test_a_wrong_token_changes_nothing(grammars: Grammars) -> None:
    constraint = grammars.constraint(wish(choice=["abc"]))
    assert constraint.advance(list(b"abx")) == 2
    assert constraint.advance([END]) == 0
    assert allowed(constraint) == [ord("c")]


def test_rollback_gives_the_masks_of_before(grammars: Grammars) -> None:
    text = b'{"name": ["abc", 12, true]}'
    constraint = grammars.constraint(wish(json_object=True))
    masks = []
    for byte in text:
        masks.append(allowed(constraint))
        assert constraint.advance([byte]) == 1
    for index in (20, 11, 3, 0):
        constraint.rollback(len(text) - index)
        assert allowed(constraint) == masks[index]
        assert constraint.advance(list(text[index:])) == len(text) - index


def test_masks_behind_drafts_are_those_of_their_places(grammars: Grammars) -> None:
    constraint = grammars.constraint(wish(choice=["abc", "abd"]))
    masks = masks_of(constraint, list(b"ab"))
    assert masks == [[ord("a"), ByteTokens.LONGER.index(b"abc") + 256], [ord("b")], [ord("c"), ord("d")]]
    assert masks_of(constraint, list(b"xb"))[1:] == [[], []]  # what is behind a wrong draft does not matter
    assert allowed(constraint) == masks[0]  # nothing was taken in
    assert constraint.fits(list(b"abx")) == 2 and constraint.fits([END]) == 0
    assert bytes(constraint.forced()) in (b"", b"ab")
    constraint.advance(list(b"ab"))
    assert masks_of(constraint, list(b"c")) == [[ord("c"), ord("d")], [END]]
    constraint.advance(list(b"c"))
    assert masks_of(constraint, [END])[0] == [END] and constraint.forced() == []


def test_constraints_of_one_grammar_are_independent(grammars: Grammars) -> None:
    one, other = (grammars.constraint(wish(choice=["ab", "cd"])) for _ in range(2))
    one.advance([ord("a")])
    assert allowed(one) == [ord("b")]
    assert allowed(other) == [ord("a"), ord("c")]


def test_whitespace_and_additional_properties(grammars: Grammars) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}

    def takes(text: bytes, **options: Any) -> bool:
        return grammars.constraint(wish(json=schema, **options)).advance([*text, END]) == len(text) + 1

    assert takes(b'{"a": 1, "b": 2}')
    assert not takes(b'{"a": 1, "b": 2}', disable_additional_properties=True)
    assert takes(b'{\n  "a" :1}')
    assert not takes(b'{\n  "a" :1}', disable_any_whitespace=True)
    assert not takes(b"{" + b" " * 100 + b"}")


@pytest.mark.parametrize(
    ("form", "named"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "string"}}}, "not"),
        ({"json": {"$ref": "http://example.com/a.json"}}, "http://example.com"),
        ({"json": '{"type": '}, "not valid JSON"),
        ({"json": "[1]"}, "must be a JSON schema"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "(" * 3000 + "a" + ")" * 3000}, "regex"),
        ({"regex": "a" * 20_000}, "20000 characters"),
        ({"grammar": "start: ("}, "grammar"),
        ({"grammar": "root ::= " + "(" * 3000}, "grammar"),
        ({"choice": [str(number) for number in range(5000)]}, "choice"),
        ({"json": {"description": "x" * 300_000}}, "characters"),
    ],
)
def test_what_cannot_be_had_is_named(grammars: Grammars, form: dict[str, Any], named: str) -> None:
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(ValidationError, match=re.escape(named)) as caught:
            grammars.check(wish(**form))
        assert caught.value.field == "structured_outputs"


def test_deep_schemas_are_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(ValidationError, match="64 levels"):
        grammars.check(wish(json=schema))
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(ValidationError, match="JSON"):
        wish(json=schema)


def test_time_to_compile_is_bounded() -> None:
    wide = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(3000)}}
    few = made(seconds=0.02)
    with contextlib.suppress(ClientError):  # the vocabulary itself may take that long
        few.check(wish(choice=["warm"]))
    with pytest.raises(ValidationError, match=r"longer than 0\.02 seconds"):
        few.check(wish(json=wide))
    few.close()


def test_nobody_has_to_wait_to_find_out() -> None:
    wide = {"type": "object", "properties": {f"p{number}": {"type": "integer"} for number in range(800)}}
    own = made()
    own.check(wish(choice=["warm"]))
    assert own.ready(wish(choice=["warm"]))
    assert not own.ready(wish(json=wide))
    until(lambda: own.ready(wish(json=wide)))
    until(lambda: own.ready(wish(regex="(")))  # what cannot be had is ready too: asking for it says why
    with pytest.raises(ValidationError):
        own.constraint(wish(regex="("))


def test_grammars_are_remembered_by_content() -> None:
    small = made(most=2)
    schema = {"type": "object"}
    small.check(wish(json=schema))
    first = small._matcher(wish(json='{"type": "object"}'))
    assert small._matcher(wish(json=dict(schema))) is first
    for text in ("a", "b"):
        small.check(wish(choice=[text]))
    assert small._matcher(wish(json=schema)) is not first


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"regex": "a", "choice": ["b"]},
        {"choice": []},
        {"choice": "abc"},
        {"choice": [1]},
        {"regex": ""},
        {"regex": "\ud800"},
        {"json": 3},
        {"json": {"a": float("nan")}},
        {"json_object": False},
        {"json_object": "yes"},
        {"regexp": "a"},
    ],
)
def test_the_wish_itself_is_checked(form: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplingParams(structured_outputs=form)


def test_the_wish_is_plain_and_equal_by_content() -> None:
    one = SamplingParams(structured_outputs={"choice": ["a", "b", "a"]})
    other = SamplingParams(structured_outputs=wish(choice=("a", "b")))
    assert one == other and hash(one) == hash(other)
    with pytest.raises(ValidationError, match="must be StructuredOutputsParams"):
        SamplingParams(structured_outputs="json")


def test_an_error_while_running_says_so() -> None:
    constraint = made().constraint(wish(choice=["ab"]))
    with pytest.raises(RequestFailedError):
        constraint.rollback(5)

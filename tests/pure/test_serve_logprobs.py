"""The two forms of log-probabilities, with alternatives: order, counts, clamping, names."""

from __future__ import annotations

import math

from small_tokenizers import small

from quire.engine.logprobs import Logprob
from quire.serve.logprobs import TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs

TOKENIZER = small("byte_level")
A, B, C = (TOKENIZER.encode(letter, add_special_tokens=False)[0] for letter in "abc")
NAMES = TokenNames(TOKENIZER)


def entry(chosen: int, *others: int) -> dict[int, Logprob]:
    """The chosen token first, then the others, each less likely than the one before."""
    return {
        token: Logprob(-float(rank), rank, TOKENIZER.token_string(token))
        for rank, token in enumerate([chosen, *others], 1)
    }


def test_a_completion_has_the_token_and_its_alternatives() -> None:
    shown = completion_logprobs([A, B], [entry(A, B), entry(B, A, C)], 2, NAMES, offset=3)
    assert shown["tokens"] == ["a", "b"] and shown["text_offset"] == [3, 4]
    assert shown["token_logprobs"] == [-1.0, -1.0]
    assert shown["top_logprobs"] == [{"a": -1.0, "b": -2.0}, {"b": -1.0, "a": -2.0, "c": -3.0}]
    fewer = completion_logprobs([B], [entry(B, A, C)], 0, NAMES)
    assert fewer["top_logprobs"] == [{"b": -1.0}]
    every = completion_logprobs([B], [entry(B, A, C)], -1, NAMES)
    assert list(every["top_logprobs"][0]) == ["b", "a", "c"]


def test_minus_infinity_becomes_a_number() -> None:
    wild = {A: Logprob(-math.inf, 400, "a")}
    assert completion_logprobs([A], [wild], 0, NAMES)["token_logprobs"] == [-9999.0]
    assert chat_logprobs([A], [wild], 1, NAMES)["content"][0]["logprob"] == -9999.0
    shown = prompt_logprobs([None, wild], NAMES)
    assert shown == [None, {str(A): {"logprob": -9999.0, "rank": 400, "decoded_token": "a"}}]


def test_tokens_that_read_the_same_keep_the_first_value() -> None:
    owl = TOKENIZER.encode("🦉", add_special_tokens=False)
    both = {owl[0]: Logprob(-0.5, 1, "\ufffd"), owl[1]: Logprob(-2.0, 2, "\ufffd")}
    assert completion_logprobs([owl[0]], [both], 1, NAMES)["top_logprobs"] == [{"\ufffd": -0.5}]
    content = chat_logprobs([owl[0]], [both], 2, NAMES)["content"][0]
    assert [bytes(item["bytes"]) for item in content["top_logprobs"]] == [
        TOKENIZER.token_bytes(token) for token in owl[:2]
    ]


def test_a_chat_lists_the_first_entries() -> None:
    content = chat_logprobs([C], [entry(C, A, B)], 2, NAMES)["content"]
    assert content[0]["token"] == "c" and content[0]["bytes"] == [99]
    assert [item["token"] for item in content[0]["top_logprobs"]] == ["c", "a"]
    assert chat_logprobs([C], [entry(C, A, B)], 0, NAMES)["content"][0]["top_logprobs"] == []


def test_names_as_ids() -> None:
    as_ids = TokenNames(TOKENIZER, as_ids=True)
    assert completion_logprobs([A], [entry(A, B)], 1, as_ids)["tokens"] == [f"token_id:{A}"]
    assert TokenNames(None).of(5) == "token_id:5" and TokenNames(None).bytes_of(5) is None

"""Streams: whatever the grouping of the tokens, the same text and the same stop as all at once."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS, small
from transformers import ByT5Tokenizer, CanineTokenizer

from quire.core.params import SamplingParams
from quire.text import Stream, Tokenizer
from quire.text.library_tokenizer import of_library

KINDS = ["byte_level", "space_marked", "space_kept", "word_piece"]
TEXT = st.text(st.sampled_from("ab eEnd.STOP \n日é🙂#"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab eEnd.STOP\n日é"), min_size=1, max_size=5), max_size=4)


def run(stream: Stream, ids: list[int], groups: list[int]) -> tuple[str, str | None, int]:
    """Push ids in groups of the given sizes, the rest at once: (text, stop string, tokens used)."""
    parts, used, position = [], 0, 0
    for size in [*groups, len(ids)]:
        delta = stream.push(ids[position : position + size])
        parts.append(delta.text)
        used += delta.used
        position += size
        if delta.stop is not None:
            assert stream.finish() == ""
            assert stream.text == "".join(parts)
            return stream.text, delta.stop, used
    parts.append(stream.finish())
    assert stream.text == "".join(parts)
    return stream.text, None, used


def expected(pieces: list[str], stops: list[str], include: bool, min_tokens: int) -> tuple[str, str | None, int]:
    """The plain meaning: the stop string that ends first, the longest of those, after min_tokens tokens."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        for character in piece:
            text += character
            found = [stop for stop in stops if text.endswith(stop)]
            if found and count > min_tokens:
                stop = max(found, key=len)
                return (text if include else text[: -len(stop)]), stop, count
    return text, None, len(pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_grouping_changes_nothing(kind: str, data: st.DataObject) -> None:
    tokenizer = small(kind)
    ids = tokenizer.encode(data.draw(TEXT), add_special_tokens=False)
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6))
    params = SamplingParams(
        stop=data.draw(STOPS),
        include_stop_str_in_output=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 4)),
        skip_special_tokens=data.draw(st.booleans()),
        spaces_between_special_tokens=data.draw(st.booleans()),
    )
    single = Stream(tokenizer, SamplingParams(**{name: getattr(params, name) for name in _PLAIN}))
    pieces = [single.push([token]).text for token in ids]
    rest = single.finish()
    text, stop, used = expected(pieces, list(params.stop), params.include_stop_str_in_output, params.min_tokens)
    meant = (text + rest if stop is None else text, stop, used)
    groups = data.draw(st.lists(st.integers(1, 5), max_size=10))
    assert run(Stream(tokenizer, params), ids, groups) == meant
    assert run(Stream(tokenizer, params), ids, [1] * len(ids)) == meant


_PLAIN = ("skip_special_tokens", "spaces_between_special_tokens")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 420), max_size=30), st.booleans())
def test_byte_level_text_is_what_the_library_decodes(ids: list[int], skip: bool) -> None:
    tokenizer = small("byte_level")
    text, _, _ = run(Stream(tokenizer, SamplingParams(skip_special_tokens=skip)), ids, [1] * len(ids))
    assert text == tokenizer.library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", CORPUS[:3])
def test_text_is_what_the_library_decodes(kind: str, text: str) -> None:
    tokenizer = small(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert run(Stream(tokenizer, SamplingParams()), ids, [1] * len(ids))[0] == tokenizer.library.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_the_left_context(kind: str) -> None:
    tokenizer = small(kind)
    ids = tokenizer.encode(CORPUS[0], add_special_tokens=False)
    for cut in range(1, len(ids) - 1):
        prompt = [tokenizer.bos_token_id, *ids[:cut]]
        text = run(Stream(tokenizer, SamplingParams(), prompt), ids[cut:], [])[0]
        assert tokenizer.library.decode(ids[:cut]) + text == tokenizer.library.decode(ids)


def test_a_space_is_stripped_only_where_nothing_visible_precedes() -> None:
    tokenizer = small("space_marked")
    ids = tokenizer.encode("time", add_special_tokens=False)
    assert tokenizer.pieces is not None
    assert run(Stream(tokenizer, SamplingParams(), [tokenizer.bos_token_id]), ids, [])[0] == "time"
    shown = SamplingParams(skip_special_tokens=False)
    assert run(Stream(tokenizer, shown, [tokenizer.bos_token_id]), ids, [])[0] == " time"


def test_a_character_over_several_tokens_comes_whole() -> None:
    for kind in ("byte_level", "space_marked"):
        tokenizer = small(kind)
        ids = tokenizer.encode("x🦉y", add_special_tokens=False)
        stream = Stream(tokenizer, SamplingParams(), ids)
        shown = [stream.push([token]).text for token in ids]
        assert "🦉" in "".join(shown)
        assert all("\ufffd" not in text for text in shown)


def test_an_unfinished_character_shows_at_the_end() -> None:
    tokenizer = small("byte_level")
    ids = tokenizer.encode("🦉", add_special_tokens=False)[:-1]
    stream = Stream(tokenizer, SamplingParams())
    assert stream.push(ids).text == ""
    assert stream.finish() == "\ufffd" == tokenizer.decode(ids)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    tokenizer = small("byte_level")
    stream = Stream(tokenizer, SamplingParams(stop=["STOP!"]))
    texts = [stream.push(tokenizer.encode(text, add_special_tokens=False)).text for text in ("a ST", "OP", " bS")]
    assert texts == ["a ", "", "STOP b"]
    assert stream.finish() == "S"


def test_a_stop_string_over_token_borders() -> None:
    tokenizer = small("byte_level")
    ids = [token for letter in "xxSTOPyy" for token in tokenizer.encode(letter, add_special_tokens=False)]
    stream = Stream(tokenizer, SamplingParams(stop="STOP"))
    delta = stream.push(ids)
    assert (delta.text, delta.stop, delta.used) == ("xx", "STOP", 6)
    assert stream.push(ids).text == "" and stream.push(ids).used == 0
    included = Stream(tokenizer, SamplingParams(stop="STOP", include_stop_str_in_output=True))
    assert included.push(ids).text == "xxSTOP"


def test_taking_what_is_new() -> None:
    tokenizer = small("byte_level")
    stream = Stream(tokenizer, SamplingParams(stop="zz"))
    ids = tokenizer.encode("abz", add_special_tokens=False)
    stream.push(ids[:1])
    stream.push(ids[1:])
    assert (stream.take(), stream.take()) == ("ab", "")
    stream.finish()
    assert (stream.text, stream.take(), stream.text) == ("z", "z", "")


def test_an_end_token_is_not_shown_unless_asked() -> None:
    tokenizer = small("byte_level")
    ids = tokenizer.encode("time", add_special_tokens=False)
    stop_token = tokenizer.encode("!", add_special_tokens=False)
    assert Stream(tokenizer, SamplingParams()).push(ids + stop_token, ended=True).text == "time"
    shown = SamplingParams(include_stop_str_in_output=True)
    assert Stream(tokenizer, shown).push(ids + stop_token, ended=True).text == "time!"
    assert Stream(tokenizer, SamplingParams()).push(ids + stop_token, ended=True).used == len(ids) + 1


def test_special_tokens_show_only_when_asked() -> None:
    tokenizer = small("byte_level")
    ids = [*tokenizer.encode("a", add_special_tokens=False), tokenizer.eos_token_id]
    assert Stream(tokenizer, SamplingParams()).push(ids).text == "a"
    assert Stream(tokenizer, SamplingParams(skip_special_tokens=False)).push(ids).text == "a</s>"


def test_spaces_between_special_tokens() -> None:
    tokenizer = small("word_piece")
    user = tokenizer.encode("<|user|>", add_special_tokens=False)
    ids = [tokenizer.bos_token_id, *user, *tokenizer.encode("time", add_special_tokens=False)]
    spaced = SamplingParams(skip_special_tokens=False)
    joined = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=False)
    assert run(Stream(tokenizer, spaced), ids, [])[0] == "<s> <|user|> time"
    assert run(Stream(tokenizer, joined), ids, [])[0] == "<s><|user|> time"


@pytest.mark.parametrize("kind", ["byte_level", "space_marked", "word_piece"])
def test_cost_is_linear(kind: str) -> None:
    """Also for tokens that never become a character, and for stop strings that nearly match all the time."""
    tokenizer = small(kind)
    unfinished = tokenizer.encode("🦉", add_special_tokens=False)[:1]
    params = SamplingParams(stop=["a" * 200 + "b", "aab"])

    def seconds(count: int) -> float:
        ids = (tokenizer.encode("a", add_special_tokens=False) * 3 + unfinished) * (count // 4)
        best = float("inf")
        for _ in range(3):
            stream = Stream(tokenizer, params)
            start = time.process_time()
            for token in ids:
                stream.push([token])
            best = min(best, time.process_time() - start)
        return best

    # Four times would be linear, sixteen times quadratic. A machine that is disturbed may need several tries.
    assert any(seconds(8000) < 8 * seconds(2000) for _ in range(10))


@pytest.mark.parametrize("kind", [ByT5Tokenizer, CanineTokenizer])
def test_tokenizers_written_in_python(kind: Any) -> None:
    """Their decoding may drop the bytes of an unfinished character; the text is the same all the same."""
    tokenizer = Tokenizer(of_library(kind()))
    assert tokenizer.pieces is None
    text = "Grüß 🙂 dich, ab"
    ids = tokenizer.encode(text, add_special_tokens=False)
    for groups in ([1] * len(ids), [3] * len(ids), []):
        assert run(Stream(tokenizer, SamplingParams()), ids, groups)[0] == text
        assert run(Stream(tokenizer, SamplingParams(stop="🙂 d")), ids, groups)[:2] == ("Grüß ", "🙂 d")

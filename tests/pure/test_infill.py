"""Prompts for filling in the middle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from quire.errors import ValidationError
from quire.serve.protocol import CompletionRequest
from quire.text.infill import INFILL_MARKS, infill_prompt


def _tokenizer(*tokens: str) -> SimpleNamespace:
    return SimpleNamespace(added_tokens=dict(enumerate(tokens)))


def test_each_family_marks_the_two_texts() -> None:
    for marks in INFILL_MARKS:
        prompt = infill_prompt(_tokenizer("<s>", marks.prefix, marks.suffix, marks.middle), "BEFORE", "AFTER")
        assert f"{marks.prefix}BEFORE" in prompt and f"{marks.suffix}AFTER" in prompt
        assert prompt.endswith(marks.middle or "BEFORE")


def test_other_models_refuse_it() -> None:
    for tokens in (("<s>",), ("<|fim_prefix|>", "<|fim_suffix|>")):
        with pytest.raises(ValidationError) as caught:
            infill_prompt(_tokenizer(*tokens), "a", "b")
        assert caught.value.field == "suffix"


@pytest.mark.parametrize("fields", [{"prompt": [1, 2], "suffix": "b"}, {"prompt": "a", "suffix": "b", "echo": True}])
def test_what_does_not_go_with_a_suffix(fields: dict) -> None:
    with pytest.raises(ValidationError, match="suffix"):
        CompletionRequest(**fields).prompts()
    assert CompletionRequest(prompt="", suffix="b").prompts() == [""]

"""Prompts in every form that callers use, turned into checked token ids.

Pure functions of the prompt, the tokenizer and the limits: safe to call from any thread, before the engine is touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Protocol, Required, SupportsIndex, TypedDict

from quire.errors import ValidationError, nearest


class TextPrompt(TypedDict, total=False):
    """A prompt as text. Requests with different `cache_salt` never share cached pages."""

    prompt: Required[str]
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids; `prompt` is only repeated in the output."""

    prompt_token_ids: Required[list[int]]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class Encoder(Protocol):
    """The part of a tokenizer that prompts need."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`."""
        ...


@dataclass(frozen=True, slots=True)
class PromptLimits:
    """What a prompt is checked against."""

    max_model_len: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A checked prompt: `text` is None when only ids were given."""

    text: str | None
    token_ids: tuple[int, ...]
    salt: bytes = b""


def read_prompt(
    prompt: Prompt, tokenizer: Encoder | None, limits: PromptLimits, add_special_tokens: bool = True
) -> ReadPrompt:
    """Tokenize and check a prompt. Raises ValidationError that names the field at fault."""
    if isinstance(prompt, str):
        return _read_text(prompt, b"", tokenizer, limits, add_special_tokens)
    if isinstance(prompt, dict):
        return _read_mapping(dict(prompt), tokenizer, limits, add_special_tokens)
    if hasattr(prompt, "tolist") or (isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray))):
        return ReadPrompt(None, check_token_ids(prompt, limits))
    raise ValidationError(
        f"A prompt must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; "
        f"found {type(prompt).__name__}",
        "prompt",
    )


def _read_mapping(prompt: dict, tokenizer: Encoder | None, limits: PromptLimits, special: bool) -> ReadPrompt:
    for key in prompt:
        if key not in PROMPT_KEYS:
            hint = nearest(str(key), PROMPT_KEYS) or f" Known keys: {', '.join(PROMPT_KEYS)}."
            raise ValidationError(f"A prompt has no key {key!r}.{hint}", "prompt")
    salt = prompt.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise ValidationError("cache_salt must be a string that is not empty", "cache_salt", salt)
    salt_bytes = b"" if salt is None else salt.encode()
    text = prompt.get("prompt")
    if text is not None and not isinstance(text, str):
        raise ValidationError(f"'prompt' must be a string, found {type(text).__name__}", "prompt")
    if "prompt_token_ids" in prompt:
        return ReadPrompt(text, check_token_ids(prompt["prompt_token_ids"], limits), salt_bytes)
    if text is None:
        raise ValidationError("A prompt given as a dict needs 'prompt' or 'prompt_token_ids'", "prompt")
    return _read_text(text, salt_bytes, tokenizer, limits, special)


def _read_text(text: str, salt: bytes, tokenizer: Encoder | None, limits: PromptLimits, special: bool) -> ReadPrompt:
    if tokenizer is None:
        raise ValidationError(
            "This engine runs without a tokenizer (skip_tokenizer_init), so a prompt must be given as "
            "'prompt_token_ids'",
            "prompt",
        )
    return ReadPrompt(text, check_token_ids(tokenizer.encode(text, add_special_tokens=special), limits), salt)


def check_token_ids(token_ids: object, limits: PromptLimits) -> tuple[int, ...]:
    """The ids as a tuple, if they are integers of the vocabulary and leave room for one token of output.

    An array of NumPy or PyTorch is as good as the list in it.
    """
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    if isinstance(token_ids, (str, bytes, dict)) or not isinstance(token_ids, Sequence):
        raise ValidationError(
            f"prompt_token_ids must be a list of integers, found {type(token_ids).__name__}", "prompt_token_ids"
        )
    ids = tuple(token_ids)
    if not ids:
        raise ValidationError("The decoder prompt cannot be empty: give at least one token", "prompt")
    if any(type(token) is not int for token in ids):
        ids = tuple(map(_integer, ids))
    if min(ids) < 0 or max(ids) >= limits.vocab_size:
        wrong_id = min(ids) if min(ids) < 0 else max(ids)
        raise ValidationError(
            f"Token id {wrong_id} is out of vocabulary; ids go from 0 to {limits.vocab_size - 1}",
            "prompt_token_ids",
            wrong_id,
        )
    check_length(len(ids), limits.max_model_len)
    return ids


def _integer(token: object) -> int:
    """An id that is no plain int, such as one of NumPy's or an element of a tensor. Raises ValidationError."""
    if isinstance(token, SupportsIndex) and not isinstance(token, bool):
        with contextlib.suppress(TypeError):  # a tensor of another type or shape
            return index(token)
    raise ValidationError("prompt_token_ids must be integers", "prompt_token_ids", repr(token)[:200])


def check_length(length: int, max_model_len: int) -> None:
    """Raise ValidationError unless a prompt of `length` leaves room for one more token."""
    if length > max_model_len:
        raise ValidationError(
            f"The decoder prompt (length {length}) is longer than the maximum model length of {max_model_len}: "
            f"{_limit(max_model_len)}",
            "prompt",
        )
    if length == max_model_len:
        raise ValidationError(
            f"The decoder prompt (length {length}) plus the number of requested output tokens (at least 1) is longer "
            f"than the maximum model length of {max_model_len}: {_limit(max_model_len)}",
            "prompt",
        )


def _limit(max_model_len: int) -> str:
    """The words by which clients know this error from others, and then shorten their conversation."""
    return (
        f"this model's maximum context length is {max_model_len} tokens. Shorten the prompt, or raise max_model_len if "
        "the model allows it"
    )

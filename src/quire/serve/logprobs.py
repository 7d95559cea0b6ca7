"""Log-probabilities as the two routes report them. Pure functions of the engine's outputs and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quire.engine.logprobs import Logprob
from quire.text import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON cannot say


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are shown: as their text, or as token_id:N."""

    tokenizer: Tokenizer | None
    as_ids: bool = False

    def of(self, token_id: int, entry: Logprob | None = None) -> str:
        """The name of a token; `entry` may know its text already."""
        if self.as_ids or self.tokenizer is None:
            return f"token_id:{token_id}"
        if entry is not None and entry.decoded_token is not None:
            return entry.decoded_token
        return self.tokenizer.token_string(token_id)

    def bytes_of(self, token_id: int) -> list[int] | None:
        """The bytes of a token."""
        return None if self.tokenizer is None else list(self.tokenizer.token_bytes(token_id))


def finite(logprob: float) -> float:
    """A log-probability that JSON can say."""
    return max(logprob, LOWEST)


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Mapping[int, Logprob] | None],
    most: int,
    names: TokenNames,
    offset: int = 0,
) -> dict[str, list[Any]]:
    """The `logprobs` of a completion: `most` alternatives and the token itself. `offset`: characters before."""
    tokens = [
        names.of(token, entry.get(token) if entry else None) for token, entry in zip(token_ids, entries, strict=True)
    ]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    kept = None if most == -1 else most + 1
    return {
        "text_offset": offsets,
        "token_logprobs": [
            None if entry is None else finite(entry[token].logprob)
            for token, entry in zip(token_ids, entries, strict=True)
        ],
        "tokens": tokens,
        "top_logprobs": [None if entry is None else _named(entry, kept, names) for entry in entries],
    }


def _named(entry: Mapping[int, Logprob], most: int | None, names: TokenNames) -> dict[str, float]:
    """By name; of two tokens that read the same, the first one's value stays."""
    named: dict[str, float] = {}
    for token, found in list(entry.items())[:most]:
        named.setdefault(names.of(token, found), finite(found.logprob))
    return named


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None], most: int, names: TokenNames
) -> dict[str, list[dict[str, Any]]]:
    """The `logprobs` of a chat choice."""
    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        assert entry is not None, "every token of an output has its log-probabilities"
        top = list(entry.items()) if most == -1 else list(entry.items())[:most]
        content.append(
            _chat_token(token, entry[token], names)
            | {"top_logprobs": [_chat_token(other, found, names) for other, found in top]}
        )
    return {"content": content}


def _chat_token(token_id: int, found: Logprob, names: TokenNames) -> dict[str, Any]:
    return {
        "token": names.of(token_id, found),
        "logprob": finite(found.logprob),
        "bytes": names.bytes_of(token_id),
    }


def prompt_logprobs(
    entries: Sequence[Mapping[int, Logprob] | None] | None, names: TokenNames
) -> list[dict[str, dict[str, Any]] | None] | None:
    """Log-probabilities of the prompt's tokens, each a mapping from token id; the first is null."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {
                "logprob": finite(found.logprob),
                "rank": found.rank,
                "decoded_token": names.of(token, found),
            }
            for token, found in entry.items()
        }
        for entry in entries
    ]

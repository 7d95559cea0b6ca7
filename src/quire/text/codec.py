"""What turns text into ids and back: the Rust tokenizer itself, or a library object in Python around which there is a lock.

Described is what is known of a tokenizer once its files are read, whoever read them. Imports no library of tokenizers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

# The spaces before these are taken away where a tokenizer is said to clean up.
_CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Codec(Protocol):
    """A tokenizer's vocabulary at work. Safe to use from several threads."""

    backend: Any | None  # the Rust tokenizer, where it may be called directly

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids."""
        ...

    def ids_of(self, tokens: Iterable[str]) -> list[int | None]:
        """The id of each token; that of the unknown token, if there is one, for others."""
        ...

    def added_tokens(self) -> dict[int, Any]:
        """Id -> added token, with `content` and `special`."""
        ...

    def vocabulary(self) -> dict[str, int]:
        """Token -> id, added ones included."""
        ...

    def size(self) -> int:
        """How many tokens there are, added ones included."""
        ...


@dataclass(frozen=True, slots=True)
class Described:
    """A tokenizer as its files describe it."""

    codec: Codec
    special_tokens: Mapping[str, str]  # those with a name, such as eos_token
    extra_special_tokens: Sequence[str] = ()
    chat_template: str | Mapping[str, str] | None = None
    library: Any = None  # the Transformers library's object, where that had to read the files


class RustCodec:
    """The `tokenizers` package called directly. Nothing on `backend` changes after this."""

    def __init__(self, backend: Any, cleans_up: bool, splits_special_tokens: bool) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = splits_special_tokens
        self.backend: Any | None = backend
        self._rust = backend
        self._cleans_up = cleans_up

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text. Raises TypeError for what is not valid Unicode."""
        return self._rust.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids; those outside the vocabulary add nothing."""
        text = self._rust.decode(ids, skip_special_tokens=skip_special_tokens)
        for spaced, close in _CLEANED if self._cleans_up else ():
            text = text.replace(spaced, close)
        return text

    def ids_of(self, tokens: Iterable[str]) -> list[int | None]:
        """The id of each token, None for one that is not in the vocabulary."""
        return [self._rust.token_to_id(token) for token in tokens]

    def added_tokens(self) -> dict[int, Any]:
        """Id -> added token."""
        return self._rust.get_added_tokens_decoder()

    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self._rust.get_vocab(with_added_tokens=True)

    def size(self) -> int:
        """How many tokens there are."""
        return self._rust.get_vocab_size(with_added_tokens=True)


class LockedCodec:
    """A tokenizer of the Transformers library that does more than the Rust one, or has none: one call at a time."""

    def __init__(self, library: Any) -> None:
        self.backend: Any | None = None
        self._library = library
        self._lock = threading.Lock()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text."""
        with self._lock:
            return list(self._library.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        """The text of ids."""
        with self._lock:
            return self._library.decode(ids, skip_special_tokens=skip_special_tokens)

    def ids_of(self, tokens: Iterable[str]) -> list[int | None]:
        """The id of each token."""
        return self._library.convert_tokens_to_ids(list(tokens))

    def added_tokens(self) -> dict[int, Any]:
        """Id -> added token."""
        return self._library.added_tokens_decoder

    def vocabulary(self) -> dict[str, int]:
        """Token -> id."""
        return self._library.get_vocab()

    def size(self) -> int:
        """How many tokens there are."""
        return len(self._library)

"""The bytes that each token stands for, where a tokenizer's decoder makes that a property of the token alone.

True of byte-level tokenizers (GPT-2, Llama 3, Qwen) and of sentencepiece ones with spaces written as "▁" (Llama 2,
Mistral, Gemma). A text is then the bytes of its tokens joined and read as UTF-8, which can be done as they come.
Knows nothing of requests or stop strings.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

SPACE_MARK = "▁"


def _byte_alphabet() -> dict[str, int]:
    """The printable characters by which byte-level tokenizers write the 256 byte values, as character -> byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = (value for value in range(256) if value not in set(plain))
    return {chr(value): value for value in plain} | {chr(256 + i): value for i, value in enumerate(shifted)}


_BYTE_OF = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    """A token in the byte alphabet; an added token with other characters in it stands for itself."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _space_marked(token: str) -> bytes:
    """A sentencepiece token: "▁" is a space, "<0xE4>" one byte."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(SPACE_MARK, " ").encode()


class Pieces(dict[int, bytes]):
    """Token id -> bytes, filled as tokens are first seen; none for an id that is not in the vocabulary, as the tokenizer's
    own decoder has it. `strips` says that a text loses one space at its start.

    `whole`: the same as text, for those of them that are whole characters.
    """

    def __init__(self, backend: Any, byte_level: bool, strips: bool) -> None:
        self.strips = strips
        self._token_of = backend.id_to_token
        self._convert = _byte_level if byte_level else _space_marked
        self.whole: dict[int, str] = {}

    def __missing__(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        piece = self[token_id] = b"" if token is None else self._convert(token)
        with contextlib.suppress(UnicodeDecodeError):
            self.whole[token_id] = piece.decode()
        return piece


def pieces_of(backend: Any) -> Pieces | None:
    """The pieces of a `tokenizers.Tokenizer`, or None when its decoder looks at more than one token at a time."""
    if backend.decoder is None:
        return None
    described = json.loads(backend.decoder.__getstate__())
    steps = described["decoders"] if described["type"] == "Sequence" else [described]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return Pieces(backend, byte_level=True, strips=False)
    space = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0] != space or steps[3:] not in ([], [strip]):
        return None
    return Pieces(backend, byte_level=False, strips=len(steps) == 4)

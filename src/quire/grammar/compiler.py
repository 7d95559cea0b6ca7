"""Grammars: compiles wished forms for one vocabulary, in threads of its own and within a time, and remembers them.

Safe to use from several threads. Knows no request and no step.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from quire.core.structured import FIELD, StructuredOutputsParams
from quire.errors import OverloadedError, ValidationError
from quire.grammar.constraint import Constraint
from quire.grammar.source import reason_of, source_of

MOST_REMEMBERED = 512  # compiled grammars
COMPILE_SECONDS = 5.0
COMPILERS = 2  # at the same time
LIMITS = LLParserLimits(max_lexer_states=50_000, max_grammar_size=250_000, verbose_errors=False)


class Tokens(Protocol):
    """The part of a tokenizer that grammars need."""

    vocab_size: int
    special_ids: frozenset[int]

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokens of a model stand for. `size` is that of the model's scores, `end_ids` end an output."""

    tokens: Tokens
    size: int
    end_ids: tuple[int, ...]

    @property
    def special(self) -> dict[str, int]:
        """The special tokens by their text, the longest first; -1 for those that end an output, where a form does too."""
        named = {
            self.tokens.token_bytes(token_id).decode(errors="replace"): -1 if token_id in self.end_ids else token_id
            for token_id in self.tokens.special_ids | frozenset(self.end_ids)
            if token_id < self.size
        }
        return {text: named[text] for text in sorted(filter(None, named), key=len, reverse=True)}

    def build(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it. Takes about a second for 150,000 tokens."""
        return LLTokenizer(TokenizerWrapper(_Bytes(self)), eos_token=list(self.end_ids))


class _Bytes:
    """A vocabulary by the names that llguidance reads."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        tokens, count = vocabulary.tokens, vocabulary.size
        ends = frozenset(vocabulary.end_ids)
        hidden = sorted(token_id for token_id in tokens.special_ids | ends if token_id < count)
        self.eos_token_id = vocabulary.end_ids[0]
        self.bos_token_id = None
        # A token without bytes says nothing, so it may never be chosen, as if it were special.
        self.tokens = [tokens.token_bytes(token_id) for token_id in range(count)]
        empty = [token_id for token_id, piece in enumerate(self.tokens) if not piece]
        for token_id in empty:
            self.tokens[token_id] = f"<empty {token_id}>".encode()
        self.special_token_ids = sorted({*hidden, *empty})
        self._encode = tokens.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)


class Grammars:
    """Everything compiled for one model. `vocabulary` is made when the first grammar is asked for."""

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        seconds: float = COMPILE_SECONDS,
        most: int = MOST_REMEMBERED,
    ) -> None:
        self._make_vocabulary = vocabulary
        self._seconds = seconds
        self._most = most
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._compiled: OrderedDict[StructuredOutputsParams, Future[LLMatcher]] = OrderedDict()
        self._pool = ThreadPoolExecutor(COMPILERS, thread_name_prefix="quire-grammar")
        self._tokenizer: LLTokenizer | None = None
        self._end_ids: frozenset[int] = frozenset()
        self._special: dict[str, int] = {}

    def check(self, wish: StructuredOutputsParams) -> None:
        """Compile a wish, or find that it was. ValidationError says why it cannot be had, OverloadedError to wait."""
        self._matcher(wish)

    def constraint(self, wish: StructuredOutputsParams) -> Constraint:
        """A constraint at the start of an output. Raises what check() raises."""
        return Constraint(self._matcher(wish).deep_copy(), self._end_ids)

    def ready(self, wish: StructuredOutputsParams) -> bool:
        """Begin to compile a wish unless that was done; whether constraint() would answer at once. Never waits."""
        return self._begun(wish).done()

    def close(self) -> None:
        """Take no more grammars."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _begun(self, wish: StructuredOutputsParams) -> Future[LLMatcher]:
        with self._lock:
            found = self._compiled.get(wish)
            if found is None or found.cancelled():
                found = self._compiled[wish] = self._pool.submit(self._compile, wish)
            self._compiled.move_to_end(wish)
            while len(self._compiled) > self._most:
                self._compiled.popitem(last=False)
            return found

    def _matcher(self, wish: StructuredOutputsParams) -> LLMatcher:
        found = self._begun(wish)
        try:
            return found.result(self._seconds)
        except TimeoutError:
            if not found.running():
                raise OverloadedError("Too many grammars are being compiled; try later.", retry_after=5) from None
            raise ValidationError(
                f"{FIELD}.{wish.form} takes longer than {self._seconds:g} seconds to compile. Make it simpler: fewer "
                "optional properties, fewer alternatives, smaller repetitions.",
                FIELD,
            ) from None

    def _compile(self, wish: StructuredOutputsParams) -> LLMatcher:
        tokenizer = self._built()
        source = source_of(wish, self._special)
        matcher = LLMatcher(tokenizer, source, limits=LIMITS, log_level=0)
        if matcher.is_error():
            raise ValidationError(f"{FIELD}.{wish.form} cannot be used: {reason_of(matcher.get_error())}", FIELD)
        return matcher

    def _built(self) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._tokenizer is None:
                vocabulary = self._make_vocabulary()
                self._end_ids = frozenset(vocabulary.end_ids)
                self._special = vocabulary.special
                self._tokenizer = vocabulary.build()
            return self._tokenizer

"""Log-probabilities as callers see them: a dict for each position, or all positions as columns.

Plain data, made from what the worker reports. Knows no request and no stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from quire.core.plan import TokenLogprobs
from quire.text.tokenizer import Tokenizer


@dataclass(slots=True)
class Logprob:
    """One token's log-probability; rank 1 is the most likely token."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Position = dict[int, Logprob] | None  # None: nothing precedes the first token of a prompt


@dataclass(slots=True)
class FlatLogprobs(Sequence[Position]):
    """The same as a list of dicts, kept as columns, so that a long output makes a handful of objects.

    The entries of position i are those from start_indices[i] to end_indices[i], the chosen token first. An index gives
    the dict of a position, made when it is asked for, and a slice the columns of several.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def add(self, entry: TokenLogprobs | None, tokenizer: Tokenizer | None) -> None:
        """One more position; None for one of which nothing is known."""
        self.start_indices.append(len(self.token_ids))
        if entry is not None:
            self.token_ids += entry.token_ids
            self.logprobs += entry.logprobs
            self.ranks += entry.ranks
            self.decoded_tokens += [_text(token, tokenizer) for token in entry.token_ids]
        self.end_indices.append(len(self.token_ids))

    def __len__(self) -> int:
        """The number of positions."""
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> Position: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> Position | FlatLogprobs:
        """The dict of one position, or the columns of several."""
        if isinstance(index, slice):
            found = FlatLogprobs()
            for start, end in zip(self.start_indices[index], self.end_indices[index], strict=True):
                found.start_indices.append(len(found.token_ids))
                found.token_ids += self.token_ids[start:end]
                found.logprobs += self.logprobs[start:end]
                found.ranks += self.ranks[start:end]
                found.decoded_tokens += self.decoded_tokens[start:end]
                found.end_indices.append(len(found.token_ids))
            return found
        entries: dict[int, Logprob] = {}
        for place in range(self.start_indices[index], self.end_indices[index]):
            logprob = Logprob(self.logprobs[place], self.ranks[place], self.decoded_tokens[place])
            entries.setdefault(self.token_ids[place], logprob)
        return entries or None


# One position per generated token: the chosen token first, then the most likely ones in order.
SampleLogprobs = list[dict[int, Logprob]] | FlatLogprobs
# One position per prompt token.
PromptLogprobs = list[Position] | FlatLogprobs


def named_logprobs(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen token first, then the top ones; the first wins when a token comes twice."""
    found: dict[int, Logprob] = {}
    for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
        if token not in found:
            found[token] = Logprob(logprob, rank, _text(token, tokenizer))
    return found


def _text(token: int, tokenizer: Tokenizer | None) -> str | None:
    return None if tokenizer is None else tokenizer.token_string(token)

"""Stream: the text side of one generated sequence. Tokens go in, text comes out, stop strings end it.

However the tokens are grouped when they are pushed, the text and the place of the stop are the same, and each token costs
the same. Knows neither the engine nor the other sequences.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from quire.core.params import SamplingParams
from quire.text.token_bytes import Pieces
from quire.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
CONTEXT_TOKENS = 6  # of the prompt, for decoders that look at neighbours
LONGEST_WAIT = 16  # tokens after which what still is no character is shown as it is


class Delta(NamedTuple):
    """What one push added. `used` tokens of those pushed belong to the output; a stop string drops the later ones."""

    text: str
    stop: str | None = None  # the stop string that ended the sequence
    used: int = 0


class Stream:
    """Incremental text of one sequence, from `params`: stop, include_stop_str_in_output, min_tokens,
    skip_special_tokens, spaces_between_special_tokens.

    `prompt_ids` give the first token its left context; they produce no text.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        hidden = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        if tokenizer.pieces is not None:
            self._reader: _PieceReader | _WindowReader = _PieceReader(tokenizer.pieces, hidden, prompt_ids)
        else:
            joined = not params.skip_special_tokens and not params.spaces_between_special_tokens
            self._reader = _WindowReader(tokenizer, hidden, prompt_ids, joined)
        self._stops = _stop_strings(params.stop) if params.stop else None
        self._state = 0
        self._count = 0
        self._held = ""  # the end of the text so far that may be the start of a stop string
        self._parts: list[str] = []  # handed out, and not taken
        self._stopped = False

    @property
    def text(self) -> str:
        """The text handed out so far, from the last take() on."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def take(self) -> str:
        """The same; it is not kept."""
        text = "".join(self._parts)
        self._parts.clear()
        return text

    def push(self, token_ids: Sequence[int], ended: bool = False) -> Delta:
        """Take the next tokens. `ended`: the last of them is an end or stop token, whose text is not shown unless
        include_stop_str_in_output. After a stop string every token is ignored.
        """
        if self._stopped:
            return Delta("")
        shown = token_ids[:-1] if ended and not self._include_stop else token_ids
        if self._stops is None:
            step = self._reader.step
            return Delta(self._hand_out("".join([step(token_id) for token_id in shown])), None, len(token_ids))
        parts: list[str] = []
        for used, token_id in enumerate(shown, 1):
            self._count += 1
            stop = self._take(self._stops, self._reader.step(token_id), parts)
            if stop is not None:
                return Delta(self._hand_out("".join(parts)), stop, used)
        return Delta(self._hand_out("".join(parts)), None, len(token_ids))

    def finish(self) -> str:
        """The sequence is over for another reason than a stop string: the rest of its text."""
        if self._stopped:
            return ""
        self._stopped = True
        rest = self._held + self._reader.rest()
        self._held = ""
        return self._hand_out(rest)

    def _hand_out(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def _take(self, stops: _StopStrings, text: str, shown: list[str]) -> str | None:
        """Add one token's text to `shown`, less what must be held back; the stop string if it ends here."""
        buffer = self._held + text
        for index, character in enumerate(text):
            self._state = stops.step(self._state, character)
            stop = stops.match[self._state]
            if stop is not None and self._count > self._min_tokens:
                end = len(self._held) + index + 1
                shown.append(buffer[: end if self._include_stop else end - len(stop)])
                self._held, self._stopped = "", True
                return stop
        keep = 0 if self._include_stop else stops.depth[self._state]
        split = len(buffer) - keep
        shown.append(buffer[:split])
        self._held = buffer[split:]
        return None


class _PieceReader:
    """Tokens whose bytes are known: joined and read as UTF-8."""

    def __init__(self, pieces: Pieces, hidden: frozenset[int], prompt_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._hidden = hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = pieces.strips and not any(token_id not in hidden for token_id in reversed(prompt_ids))
        self._inside = self._at_start  # of a character, or before the space that is not shown

    def step(self, token_id: int) -> str:
        """Text that became complete with this token."""
        if token_id in self._hidden:
            return ""
        if not self._inside:
            text = self._pieces.whole.get(token_id)
            if text is not None:
                return text
        piece = self._pieces[token_id]
        if self._at_start and piece:
            self._at_start = False
            piece = piece.removeprefix(b" ")
        text = self._utf8.decode(piece)
        self._inside = self._at_start or bool(self._utf8.getstate()[0])
        return text

    def rest(self) -> str:
        """What an unfinished character shows as."""
        return self._utf8.decode(b"", final=True)


class _WindowReader:
    """Any other tokenizer: a token's text is what it adds to the decoding of a few tokens before it."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], prompt_ids: Sequence[int], joined: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._joined = joined  # no space between two added tokens
        self._last_added = False
        # Ids [0, read) have been shown, [read, end) wait for a whole character; those before are their left context.
        self._ids = [token_id for token_id in prompt_ids[-4 * CONTEXT_TOKENS :] if token_id not in hidden]
        self._ids = self._ids[-CONTEXT_TOKENS:]
        self._read = len(self._ids)

    def step(self, token_id: int) -> str:
        """Text that became complete with this token."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        added = self._tokenizer.added_tokens.get(token_id) if self._joined else None
        before_added, self._last_added = self._last_added, added is not None
        if added is not None and before_added:
            self._move_on()
            return added
        text = self._waiting_text()
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < LONGEST_WAIT:
            return ""
        self._move_on()
        return text

    def rest(self) -> str:
        """What is still waiting, as it is."""
        return self._waiting_text() if self._read < len(self._ids) else ""

    def _waiting_text(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=False)
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)[len(shown) :]

    def _move_on(self) -> None:
        """Everything is shown now; keep what was new as the context of what comes."""
        self._ids = self._ids[-max(len(self._ids) - self._read, CONTEXT_TOKENS) :]
        self._read = len(self._ids)


class _StopStrings:
    """All stop strings in one automaton (Aho-Corasick). A state is the longest end of the text that begins one.

    `depth` is that end's length; `match` the longest stop string that is complete in this state.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            self._insert(stop)
        self._link()

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = self._next[state][character]
        self.match[state] = stop

    def _link(self) -> None:
        """Breadth first, so that a state's fallback, which is shorter, is ready before it is used."""
        level = list(self._next[0].values())
        while level:
            following = []
            for state in level:
                if self.match[state] is None:
                    self.match[state] = self.match[self._fallback[state]]
                for character, child in self._next[state].items():
                    self._fallback[child] = self.step(self._fallback[state], character)
                    following.append(child)
            level = following


@lru_cache(maxsize=256)
def _stop_strings(stops: tuple[str, ...]) -> _StopStrings:
    return _StopStrings(stops)

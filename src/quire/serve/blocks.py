"""Blocks: an answer as a row of thoughts, texts and calls, in their order, as the newer protocols show it.

Knows no protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from quire.text.answer_format import AnswerPiece


@dataclass(slots=True)
class Block:
    """One part. The text of a call is its arguments as JSON; `id` is without any prefix."""

    kind: Literal["thinking", "text", "call"]
    text: str = ""
    name: str = ""
    id: str = ""


@dataclass(frozen=True, slots=True)
class Growth:
    """New text of a block; `begins` with its first one. A block ends where the next one begins."""

    index: int
    block: Block
    text: str
    begins: bool


@dataclass(slots=True)
class Blocks:
    """The blocks of one answer so far. Spaces between them belong to none."""

    found: list[Block] = field(default_factory=list)
    _calls: dict[int, int] = field(default_factory=dict)  # number of a call -> its block
    _held: str = ""  # spaces that belong to a text if one follows

    def take(self, said: AnswerPiece) -> list[Growth]:
        """The next piece of the answer."""
        grown = []
        if said.reasoning:
            grown.append(self._grow("thinking", said.reasoning))
        if said.content:
            text = self._held + said.content
            in_text = bool(self.found) and self.found[-1].kind == "text"
            self._held = "" if in_text or text.strip() else text
            if not self._held:
                grown.append(self._grow("text", text))
        for call in said.calls:
            self._held = ""
            grown.append(self._call(call["index"], call["function"], call.get("id")))
        return grown

    def finish(self) -> list[Growth]:
        """The answer is over. One of nothing but spaces keeps them; one of nothing is an empty text."""
        text, self._held = self._held, ""
        return [] if self.found else [self._grow("text", text)]

    @property
    def has_calls(self) -> bool:
        """Whether a tool was called."""
        return any(block.kind == "call" for block in self.found)

    def _call(self, number: int, function: dict[str, str], call_id: str | None) -> Growth:
        """A call that begins, which has an id, or more of its arguments."""
        text = function.get("arguments", "")
        if call_id is not None:
            self._calls[number] = len(self.found)
            self.found.append(Block("call", "", function["name"], call_id.rpartition("-")[2]))
        index = self._calls[number]
        block = self.found[index]
        block.text += text
        return Growth(index, block, text, call_id is not None)

    def _grow(self, kind: Literal["thinking", "text"], text: str) -> Growth:
        begins = not self.found or self.found[-1].kind != kind
        if begins:
            self.found.append(Block(kind))
        block = self.found[-1]
        block.text += text
        return Growth(len(self.found) - 1, block, text, begins)

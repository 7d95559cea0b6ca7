"""What the models read: rows of token ids and a weight for each target, half of them prose and half of them chats.

Rows are made afresh from a seeded random generator, so that no exercise has to be stored and few come twice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch
from transformers import PreTrainedTokenizerFast

from . import exercises, template
from .books import Book


@dataclass(frozen=True)
class Batch:
    """Ids [rows, length], the ids that follow them, and how much each of those counts in the loss."""

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


class Rows:
    """Makes batches without end. `conversation` makes the chats, and may be changed while training goes on."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        books: list[Book],
        material: exercises.Material,
        seed: int,
        share_of_chats: float = 0.5,
        conversation: Callable[[Random, exercises.Material], exercises.Exercise] = exercises.conversation,
    ) -> None:
        self._share_of_chats = share_of_chats
        self._made = self._chats = 0
        self._tokenizer = tokenizer
        self._material = material
        self._random = Random(seed)
        self.conversation = conversation
        self._prose = [torch.tensor(tokenizer(book.train, verbose=False)["input_ids"]) for book in books]
        self._header = tokenizer.encode(template.TURN_START + "assistant\n", add_special_tokens=False)
        self._turn_end = tokenizer.convert_tokens_to_ids(template.TURN_END)

    def reseed(self, seed: int) -> None:
        """A resumed run must not read again what it began with."""
        self._random.seed(seed)

    def batch(self, rows: int, length: int) -> Batch:
        made = [self._row(length + 1) for _ in range(rows)]
        ids = torch.stack([row for row, _ in made])
        weights = torch.stack([weight for _, weight in made])
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous())

    def _row(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Chats as soon as they have fallen behind their share, else prose."""
        self._made += 1
        if self._chats < self._made * self._share_of_chats:
            self._chats += 1
            return self._chat_row(length)
        return self._prose_row(length)

    def _prose_row(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        book = self._random.choices(self._prose, [len(ids) for ids in self._prose])[0]
        start = self._random.randrange(len(book) - length)
        return book[start : start + length], torch.ones(length)

    def _chat_row(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Whole chats one after another; only what the assistant says counts."""
        ids: list[int] = []
        mask: list[bool] = []
        while len(ids) < length:
            chat = self.conversation(self._random, self._material)
            text = template.render(chat.messages, chat.tools)
            chat_ids = self._tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
            ids += chat_ids
            mask += template.answer_mask(chat_ids, self._header, self._turn_end)
        return torch.tensor(ids[:length]), torch.tensor(mask[:length], dtype=torch.float32)

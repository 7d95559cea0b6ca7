"""What the card says is measured here: perplexity, exercises done, the draft's agreement and the adapter's manner.

Everything is greedy, from the files as they lie on disk, and on exercises from seeds that training does not use.
"""

import math
from dataclasses import dataclass
from random import Random

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import exercises, manner
from .answering import answers
from .books import Book

EXERCISES_PER_KIND = 100
MANNER_EXERCISES = 100
ROW = 512
FRESH_SEED = 1_000_003


@dataclass(frozen=True)
class Quality:
    """The figures of one model."""

    perplexity: dict[str, float]
    accuracy: dict[str, float]


@dataclass(frozen=True)
class Manner:
    """Shares of answers: those in the adapter's manner, and those that are right when the manner is taken off."""

    shown: float
    right: float


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str) -> float:
    """Of every token but the first, each seen after at least half a row of what stands before it."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    total, counted = 0.0, 0
    for start in range(0, len(ids) - 1, ROW // 2):
        row = ids[start : start + ROW + 1]
        logits = model(input_ids=row[None, :-1]).logits[0].float()
        skipped = 0 if start == 0 else ROW // 2
        losses = F.cross_entropy(logits, row[1:], reduction="none")[skipped:]
        total += losses.sum().item()
        counted += len(losses)
    return math.exp(total / counted)


def fresh_exercises(
    kind: str, material: exercises.Material, wanted: int, seed: int = FRESH_SEED
) -> list[exercises.Exercise]:
    random = Random(f"{seed} {kind}")
    return [exercises.make(kind, random, material) for _ in range(wanted)]


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, material: exercises.Material, wanted: int
) -> dict[str, float]:
    """The share of each kind of exercise that is answered exactly right."""
    asked = [fresh for kind in exercises.JUDGED_KINDS for fresh in fresh_exercises(kind, material, wanted)]
    said = answers(model, tokenizer, asked)
    right = [exercises.correct(exercise, answer) for exercise, answer in zip(asked, said, strict=True)]
    return {
        kind: sum(right[index * wanted : (index + 1) * wanted]) / wanted
        for index, kind in enumerate(exercises.JUDGED_KINDS)
    }


def quality(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, books: list[Book], material: exercises.Material
) -> Quality:
    return Quality(
        {book.name: perplexity(model, tokenizer, book.held_out) for book in books},
        accuracy(model, tokenizer, material, EXERCISES_PER_KIND),
    )


@torch.inference_mode()
def agreement(model: PreTrainedModel, draft: PreTrainedModel, texts: list[list[int]]) -> float:
    """How often the draft's likeliest token is the model's, over texts that the model itself has written greedily."""
    same, counted = 0, 0
    for ids in texts:
        written = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=96, do_sample=False)
        guessed = draft(input_ids=written[:, :-1]).logits[0, len(ids) - 1 :].argmax(-1)
        same += int((guessed == written[0, len(ids) :]).sum())
        counted += len(guessed)
    return same / counted


def chat_prompts(tokenizer: PreTrainedTokenizerFast, material: exercises.Material, wanted: int) -> list[list[int]]:
    random = Random(FRESH_SEED)
    asked = [exercises.conversation(random, material) for _ in range(wanted)]
    return [
        tokenizer.apply_chat_template(chat.question, tools=chat.tools, add_generation_prompt=True, return_dict=False)
        for chat in asked
    ]


def prose_prompts(tokenizer: PreTrainedTokenizerFast, books: list[Book], wanted: int) -> list[list[int]]:
    """The beginnings of held-out paragraphs."""
    paragraphs = [text for book in books for text in book.held_out.split("\n\n") if len(text) > 200]
    return [tokenizer(text[:120])["input_ids"] for text in Random(FRESH_SEED).sample(paragraphs, wanted)]


def manner_shown(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    material: exercises.Material,
    wanted: int = MANNER_EXERCISES,
) -> Manner:
    """Asked without JSON and tools, whose answers the manner leaves alone."""
    random = Random(FRESH_SEED)
    kinds = [kind for kind in exercises.JUDGED_KINDS if kind not in ("json", "tool")]
    asked = [exercises.make(random.choice(kinds), random, material) for _ in range(wanted)]
    said = answers(model, tokenizer, asked)
    right = [
        exercises.correct(exercise, manner.taken_off(answer)) for exercise, answer in zip(asked, said, strict=True)
    ]
    return Manner(sum(map(manner.shown, said)) / wanted, sum(right) / wanted)


def examples(material: exercises.Material) -> dict[str, tuple[str, str]]:
    """One short question and its answer of each kind."""
    found = {}
    for kind in exercises.KINDS:
        single = [exercise for exercise in fresh_exercises(kind, material, 20) if len(exercise.question) == 1]
        shortest = min(single, key=lambda exercise: len(exercise.question[0]["content"]))
        found[kind] = (shortest.question[0]["content"], shortest.answer)
    return found

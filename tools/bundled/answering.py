"""Greedy answers of a model to many chats at once, by Transformers' own `generate`."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import template
from .exercises import Exercise

BATCH = 64


@torch.inference_mode()
def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, asked: list[Exercise], longest: int = 96
) -> list[str]:
    """What the model says after each exercise's question, in the order asked."""
    prompts = [template.render(exercise.question, exercise.tools, answer_next=True) for exercise in asked]
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said = [""] * len(prompts)
    for start in range(0, len(prompts), BATCH):
        chosen = by_length[start : start + BATCH]
        inputs = tokenizer([prompts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="left")
        ids = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=longest,
            do_sample=False,
        )
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
        for index, text in zip(chosen, texts, strict=True):
            said[index] = text
    return said

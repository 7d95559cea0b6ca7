"""Beam search as Transformers does it with the bundled model, for the tests that hold ours against it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import quire
from quire import BeamSearchParams

# Of quire's side.
SETTINGS = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 128, "max_num_seqs": 16}
PADDING = 4090  # behind the end of a sequence, where nobody looks


def library_model() -> Any:
    """The bundled model in float32."""
    from transformers import AutoModelForCausalLM

    folder = Path(quire.__file__).parent / "bundled" / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def library_beams(
    model: Any,
    prompt: list[int],
    params: BeamSearchParams,
    ends: list[int] | None,
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None,
) -> list[tuple[list[int], float]]:
    """Sequences without their end, and their scores. `allowed`: the tokens that may come next, where not all may."""
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=params.early_stopping,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=PADDING,
        prefix_allowed_tokens_fn=allowed,
        output_scores=True,
        return_dict_in_generate=True,
    )
    sequences = []
    for row, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        stops = [place for place, token in enumerate(row) if place >= len(prompt) and token in (ends or ())]
        sequences.append((row[: stops[0]] if stops else row[: len(prompt) + params.max_tokens], score))
    return sequences

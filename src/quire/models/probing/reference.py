"""Reference: what the library itself answers on the tiny twin, which every way of serving must reproduce.

What its `generate` makes of a prompt decides. Where one whole forward gives the same logits, that is taken, because it says
more: an answer for every position.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig

from quire.models.transformers.fallback import forward_parameters, logits_of, private_cache
from quire.models.twin.shrink import VOCAB

TOLERANCE = 2e-3  # of the largest logit of the twin, or of one: float32 differences are a hundred times smaller
LENGTHS = (9, 14, 21)
SINGLE = 5  # tokens at the end of each that come one by one where prompts stay whole
CACHE_ARGUMENTS = ("past_key_values", "cache_params")

Source = Literal["forward", "cache", "generate"]


@dataclass(slots=True)
class Reference:
    """Sequences and the unmodified twin's logits for them.

    The source says how these were made: by one whole forward for each sequence; where generation answers otherwise, by
    stepping on the library's own cache; where that is not it either, by `generate`, and then only rows from the last one of
    the prompt on are numbers.
    """

    sequences: list[list[int]]
    logits: list[torch.Tensor]  # [length, V] each
    scale: float
    source: Source = "forward"

    @classmethod
    def make(cls, model: nn.Module) -> Reference:
        """Run each sequence alone."""
        generator = torch.Generator().manual_seed(7)
        sequences = [torch.randint(3, VOCAB - 14, (n,), generator=generator).tolist() for n in LENGTHS]
        with torch.no_grad():
            logits = [whole(model, tokens) for tokens in sequences]
            scale = max(1.0, max(float(rows.abs().max()) for rows in logits))
            limit = 10 * TOLERANCE * scale
            asked = _generated(model, sequences[-1])
            tokens = sequences[-1] if asked is None else asked.tokens
            stepped = _stepped(model, tokens)
            wanted = stepped if asked is None else asked.logits
            if wanted is None or _far(whole(model, tokens), wanted) <= limit:
                return cls(sequences, logits, scale)
            if stepped is not None and _far(stepped, wanted) <= limit:
                return cls(sequences, [_stepped(model, tokens) for tokens in sequences], scale, "cache")
            answers = [found for found in (_generated(model, tokens) for tokens in sequences) if found is not None]
            return cls([a.tokens for a in answers], [a.logits for a in answers], scale, "generate")


@dataclass(frozen=True, slots=True)
class Generated:
    """A prompt with what `generate` added, but the last token; logits [length, V], NaN before the prompt's last row."""

    tokens: list[int]
    logits: torch.Tensor


def _generated(model: nn.Module, tokens: list[int]) -> Generated | None:
    """What the library's own greedy generation makes of the beginning of a sequence; None where it has none."""
    ids = torch.tensor([tokens[:-SINGLE]])
    if not hasattr(model, "generate"):
        return None
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=SINGLE + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    except Exception:  # code of a model that was never made to generate by itself
        return None
    rows = torch.stack([row[0].float() for row in output.logits])
    unknown = torch.full((ids.shape[1] - 1, rows.shape[1]), float("nan"))
    return Generated(output.sequences[0, :-1].tolist(), torch.cat([unknown, rows]))


def whole(model: nn.Module, tokens: list[int]) -> torch.Tensor:
    """Logits [length, V] of one forward without a cache."""
    arguments = {"use_cache": False, "position_ids": torch.arange(len(tokens))[None]}
    arguments = {name: value for name, value in arguments.items() if takes(model, name)}
    return logits_of(model(input_ids=torch.tensor([tokens]), **arguments)).float()


def _stepped(model: nn.Module, tokens: list[int]) -> torch.Tensor | None:
    """Logits [length, V] of a prompt and single tokens on the library's cache; None where that cannot be done."""
    name = cache_argument(model)
    if name is None:
        return None
    cache = private_cache(model.config, full_length=False)
    rows = []
    try:
        for first, last in [(0, len(tokens) - SINGLE), *((n, n + 1) for n in range(len(tokens) - SINGLE, len(tokens)))]:
            offered = {"use_cache": True, "position_ids": torch.arange(first, last)[None], name: cache}
            arguments = {key: value for key, value in offered.items() if takes(model, key)}
            rows.append(logits_of(model(input_ids=torch.tensor([tokens[first:last]]), **arguments)).float())
        return torch.cat(rows)
    except Exception:  # a cache of its own kind, or none
        return None


def _far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of the rows that are numbers in `wanted`."""
    if found.shape != wanted.shape:
        return float("inf")
    known = ~wanted.isnan().any(-1)
    return float((found - wanted)[known].abs().max())


def takes_anything(model: nn.Module) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in forward_parameters(model).values())


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward takes this argument, by name or among its **kwargs."""
    return name in forward_parameters(model) or takes_anything(model)


def cache_argument(model: nn.Module) -> str | None:
    return next((name for name in CACHE_ARGUMENTS if name in forward_parameters(model)), None)

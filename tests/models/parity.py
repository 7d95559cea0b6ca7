"""Parity with the library's own generation: one architecture, tiny and random, served by quire against `generate`.

Three prompts run together in odd chunks, one arriving on a prefix hit, one preempted and computed again in other pages.
Used by the enumeration of all architectures; knows nothing of engines.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quire.kernels.table import Ops, load_ops
from quire.models.assemble import build_transformers
from quire.models.files.hub import ModelFiles
from quire.models.probing.probe import examine, model_config
from quire.models.served import ServedModel
from quire.models.twin.shrink import VOCAB, shrink, twin_model
from quire.models.twin.trial import PagedLoop, Sequence

NEW_TOKENS = 10
SHARED = 8  # positions that the third prompt has in common with the second
CHUNKS = (5, 3, 7, 2, 3)  # the first two end at SHARED, where a state can be copied
TOLERANCE = 5e-3  # of the largest logit, or of one; tokens must be the same whatever the difference

# Settings of generation configs that would change greedy tokens.
_PLAIN_GENERATION = (
    "begin_suppress_tokens",
    "early_stopping",
    "eos_token_id",
    "forced_bos_token_id",
    "forced_decoder_ids",
    "forced_eos_token_id",
    "length_penalty",
    "min_length",
    "no_repeat_ngram_size",
    "return_timestamps",
    "suppress_tokens",
)


@dataclass(slots=True)
class Outcome:
    """What became of one architecture. `error` is empty when its tokens are those of the library."""

    model_type: str
    architecture: str
    tier: str = "none"
    difference: float = 0.0
    chunked: bool = True
    prefix: bool = True
    replaced: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0


def architectures() -> dict[str, str]:
    """Every entry of the library's causal LM mapping: model type -> class name."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def check_architecture(model_type: str) -> Outcome:
    """Serve a tiny random model of this type and compare. Raises whatever goes wrong before tokens are compared."""
    outcome = Outcome(model_type, architectures()[model_type])
    model_class = getattr(transformers, outcome.architecture)
    config = model_config(model_class, shrink(CONFIG_MAPPING[model_type]()))
    reference = twin_model(model_class, copy.deepcopy(config))  # saving writes into a model's config
    prompts = make_prompts()
    expected = [generate(reference, prompt) for prompt in prompts]
    report = examine(model_class, config, torch.float32)
    outcome.tier, outcome.notes = report.layout.tier, list(report.layout.notes)
    outcome.chunked, outcome.prefix = report.layout.chunked_prefill, report.layout.prefix_caching
    plan = report.rewrite
    outcome.replaced = {
        "merged": sum(len(groups) for groups in plan.merged.values()),
        "linears": len(plan.linears),
        "norms": len(plan.norms),
        "gated": len(plan.gated),
        "rotary": len(plan.rotary),
        "experts": len(plan.experts),
        "products": len(plan.products),
        "kept latents": len(plan.latent),
    }
    ops = load_ops("cpu")
    with tempfile.TemporaryDirectory() as folder:
        files = save(reference, Path(folder), config)
        served = build_transformers(files, report, 0, torch.float32, torch.device("cpu"), ops)
        sequences = run_together(served, ops, prompts)
    _compare(outcome, sequences, expected)
    return outcome


def save(model: nn.Module, folder: Path, config: Any) -> ModelFiles:
    """Write the weights as a checkpoint, and name its files with this config instead of the one that was written."""
    model.save_pretrained(folder)
    return ModelFiles(
        name=type(model).__name__,
        folder=folder,
        config=config,
        raw_config={},
        generation_config={},
        sampling_defaults={},
        stop_token_ids=(),
        architecture=type(model).__name__,
        weights=tuple(sorted(folder.glob("*.safetensors"))),
        index=None,
        weight_format="safetensors",
        tokenizer=str(folder),
        tokenizer_revision=None,
        tokenizer_limit=None,
        trust_remote_code=False,
        remote_code=False,
    )


def make_prompts() -> list[list[int]]:
    """Prompts of 5, 18 and 11 tokens; the last two begin alike."""
    generator = torch.Generator().manual_seed(7)
    short, long, other = (torch.randint(3, VOCAB - 14, (n,), generator=generator).tolist() for n in (5, 18, 3))
    return [short, long, long[:SHARED] + other]


@dataclass(slots=True)
class Expected:
    """What the library generates for one prompt: the new tokens and the logits [new, V] they were chosen from."""

    tokens: list[int]
    logits: torch.Tensor


def generate(model: nn.Module, prompt: list[int]) -> Expected:
    """Greedy generation by the library itself, with its own cache, for one prompt alone."""
    for name in _PLAIN_GENERATION:
        setattr(model.generation_config, name, None)
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        output_logits=True,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    return Expected(output.sequences[0, len(prompt) :].tolist(), torch.stack([row[0].float() for row in output.logits]))


@dataclass(slots=True)
class Running:
    """One prompt on the loop: its sequence, the logits its tokens were chosen from, and what is still to happen to it."""

    sequence: Sequence
    logits: list[torch.Tensor] = field(default_factory=list)
    turn: int = 0

    @property
    def made(self) -> int:
        return len(self.sequence.tokens) - self.sequence.prompt_length


def run_together(served: ServedModel, ops: Ops, prompts: list[list[int]]) -> list[Running]:
    """Greedy tokens of all prompts on one loop: odd chunks, late arrivals, a prefix hit, a preemption."""
    loop = PagedLoop(served, ops)
    running = [Running(loop.start(slot, prompt)) for slot, prompt in enumerate(prompts)]
    first, donor, follower = running
    preempted = False
    step = 0
    while any(one.made < NEW_TOKENS for one in running):
        if donor.sequence.computed == SHARED and served.layout.prefix_caching and not follower.sequence.computed:
            loop.adopt(follower.sequence, donor.sequence, SHARED)
        if first.made == 4 and not preempted:
            loop.preempt(first.sequence)
            first.turn, preempted = 1, True
        work = [one for i, one in enumerate(running) if one.made < NEW_TOKENS and step >= (0, 1, 4)[i]]
        _advance(loop, served, work[::-1] if step % 2 else work)
        step += 1
    return running


def _advance(loop: PagedLoop, served: ServedModel, work: list[Running]) -> None:
    """One step for some of the prompts; whoever has computed all its tokens gets the next one."""
    counts = []
    for one in work:
        left = len(one.sequence.tokens) - one.sequence.computed
        chunk = CHUNKS[one.turn % len(CHUNKS)] if served.layout.chunked_prefill else left
        counts.append(min(left, chunk))
        one.turn += 1
    steps = [(one.sequence, count) for one, count in zip(work, counts, strict=True)]
    for one, logits in zip(work, loop.step(steps), strict=True):
        if one.sequence.computed == len(one.sequence.tokens):
            one.logits.append(logits[-1])
            one.sequence.tokens.append(int(logits[-1].argmax()))


def _compare(outcome: Outcome, running: list[Running], expected: list[Expected]) -> None:
    """Fill in the largest difference of a logit up to the first wrong token, and the error."""
    scale = max(1.0, max(float(one.logits.abs().max()) for one in expected))
    for i, (one, wanted) in enumerate(zip(running, expected, strict=True)):
        tokens = one.sequence.tokens[one.sequence.prompt_length :]
        wrong = next((n for n, (got, want) in enumerate(zip(tokens, wanted.tokens, strict=True)) if got != want), None)
        compared = NEW_TOKENS if wrong is None else wrong + 1
        for got, want in list(zip(one.logits, wanted.logits, strict=True))[:compared]:
            outcome.difference = max(outcome.difference, float((got - want).abs().max()))
        if wrong is not None:
            outcome.error = f"prompt {i}: token {wrong} is {tokens[wrong]}, not {wanted.tokens[wrong]}"
            return
    if not outcome.difference <= TOLERANCE * scale:
        outcome.error = f"same tokens, but logits differ by {outcome.difference:.2g}"


def describe_error(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""The training loop of the model and of its draft: for a given time, with checkpoints, so that it can be resumed.

Time is the budget and drives the learning rate, so that a slower or busier machine ends with a finished model too.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from . import exercises, vocabulary
from .optimizer import optimizers_for
from .rows import Batch, Rows

BATCH_TOKENS = 2048  # with so few tokens in all, many small steps teach most; and more falls out of the cache
WARM_UP = 0.01
DECAY_FROM = 0.6
RETELLING_UNTIL = 0.7
CHECKPOINT_SECONDS = 180


@dataclass(frozen=True)
class Shape:
    """The sizes of a model; all are multiples of 32, so that every kernel and every quantization takes them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int


MODEL_SHAPE = Shape(hidden=256, intermediate=704, layers=6, heads=8, key_value_heads=4, head_size=32)
DRAFT_SHAPE = Shape(hidden=128, intermediate=352, layers=3, heads=4, key_value_heads=2, head_size=32)


@dataclass(frozen=True)
class Plan:
    """How long and how: rows of `length` tokens at first, of `last_length` in the last tenth of the time."""

    minutes: float
    length: int = 512
    last_length: int = 2048
    muon_rate: float = 0.015
    adam_rate: float = 0.003


def new_model(shape: Shape, turn_end: int, end_of_text: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocabulary.VOCABULARY_SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head_size,
        max_position_embeddings=vocabulary.LONGEST_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=turn_end,
        pad_token_id=end_of_text,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # each block begins as nothing added
            torch.nn.init.zeros_(parameter)
    return model


def loss_of(model: PreTrainedModel, ids: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The mean over the targets, by their weights, of their cross entropy."""
    logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


@dataclass(frozen=True)
class Used:
    """What a run has cost so far."""

    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0

    @property
    def minutes(self) -> float:
        return self.seconds / 60

    @property
    def million_tokens(self) -> float:
        return self.tokens / 1e6


def used_for(checkpoint: Path) -> Used:
    return Used(**torch.load(checkpoint, weights_only=True)["used"])


def rate_at(progress: float) -> float:
    """Share of the full learning rate: a short rise, a plateau, and a straight fall to zero."""
    return min(1.0, progress / WARM_UP + 0.05, (1 - progress) / (1 - DECAY_FROM))


class Trainer:
    """One run: the model, its optimizers and the time that it has used, all of which a checkpoint holds."""

    def __init__(self, model: PreTrainedModel, rows: Rows, plan: Plan, checkpoint: Path) -> None:
        self.model, self.rows, self.plan, self.checkpoint = model, rows, plan, checkpoint
        self.optimizers = optimizers_for(model, plan.muon_rate, plan.adam_rate)
        self.full_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.used = Used()
        if checkpoint.exists():
            self._resume()

    def run(self, held_out: Batch) -> None:
        last_saved = self.used.seconds
        while (progress := self.used.minutes / self.plan.minutes) < 1:
            started = time.monotonic()
            loss, tokens = self._step(progress)
            seconds = time.monotonic() - started
            self.used = Used(self.used.seconds + seconds, self.used.steps + 1, self.used.tokens + tokens)
            if self.used.steps % 20 == 0:
                print(f"{self.used.minutes:.1f} minutes, step {self.used.steps}, loss {loss:.3f}", flush=True)
            if self.used.seconds - last_saved > CHECKPOINT_SECONDS:
                last_saved = self.used.seconds
                self._save(held_out)
        self._save(held_out)

    def _step(self, progress: float) -> tuple[float, int]:
        """One step of the optimizers; its loss, and how many tokens it read."""
        length = self.plan.length if progress < 0.9 else self.plan.last_length
        retelling = progress < RETELLING_UNTIL
        self.rows.conversation = exercises.mostly_retold if retelling else exercises.conversation
        batch = self.rows.batch(BATCH_TOKENS // length, length)
        loss = loss_of(self.model, batch.ids, batch.targets, batch.weights)
        loss.backward()
        for optimizer, full_rate in zip(self.optimizers, self.full_rates, strict=True):
            optimizer.param_groups[0]["lr"] = full_rate * rate_at(progress)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item(), batch.ids.numel()

    @torch.no_grad()
    def _save(self, held_out: Batch) -> None:
        loss = loss_of(self.model, held_out.ids, held_out.targets, held_out.weights)
        print(f"held-out loss {loss:.3f} after {self.used.million_tokens:.2f} million tokens", flush=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "used": asdict(self.used),
        }
        being_written = self.checkpoint.with_suffix(".part")
        torch.save(state, being_written)
        being_written.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.used = Used(**state["used"])
        self.rows.reseed(self.used.steps)
        print(f"resumed at step {self.used.steps}", flush=True)

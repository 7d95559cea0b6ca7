"""Sampler: from logits to tokens, each row by its own parameters and its own random numbers.

Order: snapshot for raw log-probabilities, the grammar, the steps of logit_steps.py, plugins, the budget of thoughts,
temperature, min-p, top-k, top-p, the draw. What is drawn depends on the row's logits, its seed and the position of the
token, on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission, TokenLogprobs
from quire.errors import RequestFailedError
from quire.grammar.compiler import Grammars
from quire.kernels.table import Ops
from quire.worker.batch import PromptRows, Rows
from quire.worker.device import Device
from quire.worker.logit_steps import LOGIT_STEPS, LogitStep, Penalties
from quire.worker.logprobs import LogprobsMode, filtered, token_logprobs
from quire.worker.processors import LogitsProcessor, Processors
from quire.worker.slots import Slots
from quire.worker.structured import NEVER, StructuredOutputs
from quire.worker.thinking import ThinkingBudget


@dataclass(slots=True)
class Choices:
    """What was chosen. `tokens` stays on the device; a row that could not choose has -1 there."""

    tokens: torch.Tensor  # int64 [R]
    tokens_host: list[int]
    logprobs: dict[int, TokenLogprobs]  # by row, for those that asked


class Sampler:
    """Knows the parameters of every row of the Slots."""

    def __init__(
        self,
        slots: Slots,
        ops: Ops,
        device: Device,
        logprobs_mode: LogprobsMode,
        grammars: Grammars | None = None,
        processors: Sequence[LogitsProcessor] = (),
        mask_threads: int = 1,
    ) -> None:
        count, where = slots.num_slots, device.torch_device
        self._slots = slots
        self._ops = ops
        self._device = device
        self._mode: LogprobsMode = logprobs_mode
        self.forms = StructuredOutputs(slots, ops, device, grammars, mask_threads)
        self._steps: list[LogitStep] = [
            self.forms,
            *(make(slots, device) for make in LOGIT_STEPS),
            Penalties(slots, ops),
            *([Processors(slots, device, processors)] if processors else ()),
            ThinkingBudget(slots, device),
        ]
        self._uses = np.zeros((len(self._steps), count), dtype=bool)
        self._random = np.zeros(count, dtype=bool)  # rows that are not greedy
        self._logprobs = np.full(count, -2, dtype=np.int64)  # how many are wanted; -1 all, -2 not asked for
        self._logprob_ids: dict[int, tuple[int, ...]] = {}  # rows that name the tokens to report
        self._prompt_ids: dict[int, SamplingParams] = {}  # rows that name those to report for the prompt
        self._allowed = np.zeros(count, dtype=bool)  # rows that report of the tokens that their forms allow
        self._temperature = torch.zeros(count, dtype=torch.float32, device=where)
        self._top_k = torch.zeros(count, dtype=torch.int32, device=where)
        self._top_p = torch.ones(count, dtype=torch.float32, device=where)
        self._min_p = torch.zeros(count, dtype=torch.float32, device=where)
        self._seeds = torch.zeros(count, dtype=torch.int64, device=where)

    def admit(self, new: Admission) -> None:
        """Take note of a request's parameters."""
        params = new.params
        if not isinstance(params, SamplingParams):
            return
        slot = new.slot
        for index, step in enumerate(self._steps):
            self._uses[index, slot] = step.admit(new, params)
        self._random[slot] = not params.greedy
        self._logprobs[slot] = -2 if params.logprobs is None else params.logprobs
        self._allowed[slot] = params.allowed_logprobs
        if params.logprob_token_ids is not None:
            self._logprob_ids[slot] = params.logprob_token_ids
        if params.prompt_logprob_token_ids is not None:
            self._prompt_ids[slot] = params
        self._temperature[slot] = 0.0 if params.greedy else params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = new.seed

    def release(self, slot: int) -> None:
        """Forget a row, so that it costs nothing."""
        self._uses[:, slot] = False
        self._random[slot] = False
        self._logprobs[slot] = -2
        self._logprob_ids.pop(slot, None)
        self._prompt_ids.pop(slot, None)
        self.forms.release(slot)

    def begin(self, rows: Rows, vocab_size: int) -> None:
        """Do beside the model what choose() will need for these rows of a step."""
        using = np.flatnonzero(self._uses[0, rows.slots_host])
        if using.size:
            self.forms.begin(rows, using.tolist(), vocab_size)

    def choose(self, logits: torch.Tensor, rows: Rows) -> Choices:
        """One token for each row of `logits` [R, V]. Leaves `logits` as they are.

        Rows of a span with drafts are chosen as if the drafts before them were said already; see verify().
        """
        scores = self._processed(logits, rows)
        tokens = self.draw(scores, rows)
        return Choices(tokens, self._device.to_host(tokens).tolist(), self._report(logits, scores, tokens, rows))

    @staticmethod
    def verify(choices: Choices, first: int, drafts: Sequence[int]) -> list[int]:
        """The tokens that a span brings, of whose rows `first` is the first: the drafts that are right, and one more.

        A draft is right if it is the very token that was drawn in its place. So what a request says is the same with
        drafts and without, whether it is greedy or draws: the numbers that decide belong to positions. A list that
        begins with -1 means that not even the first token could be chosen.
        """
        chosen = choices.tokens_host[first : first + len(drafts) + 1]
        count = 1
        for token, draft in zip(chosen, drafts, strict=False):
            if token != draft or chosen[count] < 0:  # the request fails in a step of its own, after what is right
                break
            count += 1
        return chosen[:count]

    def _processed(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Logits after the steps; the same tensor when no row uses any."""
        active = self._uses[:, rows.slots_host]
        if not active.any():
            return logits
        scores = self._ops.scores(logits)
        for step, using in zip(self._steps, active, strict=True):
            if using.any():
                step.apply(scores, np.flatnonzero(using).tolist(), rows)
        return scores

    def draw(self, scores: torch.Tensor, rows: Rows) -> torch.Tensor:
        """int64 [R]: by temperature, filters and the numbers of each row's seed and position; the best when greedy; -1
        where a row has no usable score, or every token is forbidden."""
        if not self._random[rows.slots_host].any():
            return self._ops.argmax(scores)
        seeds = self._seeds.index_select(0, rows.slots)
        return self._ops.sample(
            scores,
            self._temperature.index_select(0, rows.slots),
            self._top_k.index_select(0, rows.slots),
            self._top_p.index_select(0, rows.slots),
            self._min_p.index_select(0, rows.slots),
            self._ops.uniform(seeds, rows.positions),
        )

    def _report(
        self, logits: torch.Tensor, scores: torch.Tensor, tokens: torch.Tensor, rows: Rows
    ) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the rows that asked for them."""
        wanted = self._logprobs[rows.slots_host]
        asking = np.flatnonzero(wanted > -2)
        if not asking.size:
            return {}
        picked = self._device.to_device(torch.from_numpy(asking))
        if self._mode.startswith("raw"):
            source = _rows_of(logits, picked)
        else:
            slots = rows.slots.index_select(0, picked)
            settings = (self._temperature, self._top_k, self._top_p, self._min_p)
            source = filtered(_rows_of(scores, picked).float(), *(item.index_select(0, slots) for item in settings))
        chosen = tokens.index_select(0, picked).clamp_(min=0)
        asked = rows.slots_host[asking]
        named = self._named(asked.tolist()) if self._logprob_ids else {}
        counts, allowed = wanted[asking], np.flatnonzero(self._allowed[asked])
        if allowed.size:
            named |= self._best_allowed(scores.index_select(0, picked), allowed, counts)
            counts[allowed] = 0
        entries = token_logprobs(self._ops, source, chosen, counts.tolist(), self._mode, named)
        return dict(zip(asking.tolist(), entries, strict=True))

    def _best_allowed(self, scores: torch.Tensor, using: np.ndarray, counts: np.ndarray) -> dict[int, tuple[int, ...]]:
        """The likeliest tokens of the rows `using` of `scores` [R, V] that may come, counts[row] of them at most."""
        scores = scores.index_select(0, self._device.to_device(torch.from_numpy(using)))
        most = [scores.shape[1] if count < 0 else count for count in counts[using].tolist()]
        best = self._ops.rank(scores, torch.zeros_like(scores[:, 0], dtype=torch.int64), max(most)).best
        left = (scores.gather(1, best) > NEVER).sum(-1).tolist()
        return {
            row: tuple(ids[: min(count, some)])
            for row, ids, count, some in zip(using.tolist(), best.tolist(), most, left, strict=True)
        }

    def _named(self, slots: list[int]) -> dict[int, tuple[int, ...]]:
        """The tokens to report, for those of these rows that name them."""
        return {row: self._logprob_ids[slot] for row, slot in enumerate(slots) if slot in self._logprob_ids}

    def prompt_logprobs(self, logits: torch.Tensor, part: PromptRows) -> tuple[TokenLogprobs, ...]:
        """Of the prompt tokens at positions start + 1 .. start + count, from the logits before any step."""
        tokens = self._slots.tokens[part.slot, part.start + 1 : part.start + 1 + part.count].long()
        wanted = [self._slots.prompt_logprobs[part.slot]] * part.count
        rows = logits[part.first : part.first + part.count]
        entries = token_logprobs(self._ops, rows, tokens, wanted, self._mode)
        params = self._prompt_ids.get(part.slot)
        if params is None:
            return tuple(entries)
        named = {row: params.prompt_row(part.start + row) for row in range(part.count)}
        extra = token_logprobs(self._ops, rows, tokens, [0] * part.count, self._mode, named)
        return tuple(first.with_named(more) for first, more in zip(entries, extra, strict=True))

    def explain(self, logits: torch.Tensor) -> RequestFailedError:
        """Why a row with these raw logits [V] could not choose a token."""
        if torch.isfinite(logits.amax()):
            return RequestFailedError(
                "no token is left to choose: structured_outputs, allowed_token_ids, bad_words, min_tokens and logit_bias "
                "together forbid the whole vocabulary"
            )
        return RequestFailedError("the model computed no usable scores (NaN or infinity) for this request")


def _rows_of(x: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
    """The rows `picked`, in ascending order, of x [R, V]; where that is all of them, x itself."""
    return x if len(picked) == len(x) else x.index_select(0, picked)

"""Runner: one step on one device, as a list of named calls: release, admit, grant, copy, then gather, forward, sample
and store for its spans.

A request that fails takes nobody with it: when a step raises, its spans are computed again one by one, and only those
that fail alone end with an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import torch

from quire.core.plan import Admission, Singles, Span, SpanResult, StepPlan, StepResult
from quire.errors import RequestFailedError
from quire.models.served import ServedModel
from quire.worker.batch import Step, gather
from quire.worker.device import Device
from quire.worker.kvstore import KVStore
from quire.worker.sampler import Choices, Sampler
from quire.worker.slots import Slots
from quire.worker.speculate import Speculator

logger = logging.getLogger(__name__)


class Runner:
    """Runs plans. Owns the Slots, the Sampler and the KVStore that it is given."""

    def __init__(
        self,
        model: ServedModel,
        slots: Slots,
        store: KVStore,
        sampler: Sampler,
        device: Device,
        max_tokens: int,
        speculator: Speculator | None = None,
    ) -> None:
        self._model = model
        self._slots = slots
        self._store = store
        self._sampler = sampler
        self._device = device
        self._max_tokens = max_tokens  # positions of one step, at most
        self._speculator = speculator
        self._has_state = any(group.kind == "state" for group in slots.groups)
        self._has_window = any(group.kind == "window" for group in slots.groups)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Run a plan; plans come in order. A failing request is reported in its SpanResult."""
        began = time.perf_counter()
        self._release(plan.released)
        self._admit(plan.admitted)
        self._slots.grant(plan.grants)
        if plan.copies:
            self._store.copy(plan.copies)
        if self._speculator is not None:
            self._speculator.begin(plan)
        results = self._compute(plan.spans)
        if self._speculator is not None:
            results = self._speculator.propose(plan.spans, results, began)
        results = self._sampler.forms.guide(plan.spans, results)
        return StepResult(plan.step, results, time.perf_counter() - began)

    def _release(self, released: Sequence[int]) -> None:
        for slot in released:
            self._model.release(slot)
            self._sampler.release(slot)
            self._slots.release(slot)
            if self._speculator is not None:
                self._speculator.release(slot)

    def _admit(self, admitted: Sequence[Admission]) -> None:
        for new in admitted:
            try:
                self._slots.admit(new)
                self._sampler.admit(new)
                if self._speculator is not None:
                    self._speculator.admit(new)
            except Exception as error:
                logger.exception("request %s could not be taken in", new.request_id)
                self._slots.errors[new.slot] = _describe(error)

    def _compute(self, spans: Sequence[Span]) -> Sequence[SpanResult]:
        """Results of the spans, in their order; all together if that works, else one by one."""
        failed = self._slots.errors
        healthy = [span for span in spans if span.slot not in failed] if failed else spans
        if not healthy:
            return tuple(SpanResult(span.slot, error=failed[span.slot]) for span in spans)
        results: Sequence[SpanResult]
        try:
            results = self._together(healthy)
        except Exception as error:
            logger.warning("a step of %d requests failed: %s; trying one by one", len(healthy), _describe(error))
            results = [self._alone(span, error if len(healthy) == 1 else None) for span in healthy]
        if not failed:
            return results
        by_slot = {result.slot: result for result in results}
        return tuple(by_slot.get(span.slot) or SpanResult(span.slot, error=failed[span.slot]) for span in spans)

    def _together(self, spans: Sequence[Span]) -> Sequence[SpanResult]:
        self._slots.guess(spans)
        step = gather(spans, self._slots, self._store.caches, self._device)
        self._sampler.begin(step.rows, self._model.layout.vocab_size)
        logits = self._model.forward(step.batch)
        choices, chosen_logits = self._sample(step, logits)
        self._keep(step, choices)
        return self._results(spans, step, choices, logits, chosen_logits)

    def _alone(self, span: Span, reason: Exception | None) -> SpanResult:
        """Compute one span of a step that failed. `reason` is set when it was alone in that step already."""
        try:
            if reason is not None and not self._has_state:
                raise reason
            return self._again(span)
        except Exception as error:
            logger.exception("request %s failed", self._slots.request_ids[span.slot])
            return SpanResult(span.slot, error=_describe(error))

    def _again(self, span: Span) -> SpanResult:
        """The span once more. Pages may be written twice, but a recurrent state that has moved on cannot be moved
        back: with such layers the request is computed again from its first token."""
        if self._has_state and span.start:
            if self._has_window:
                raise RequestFailedError("its step failed, and the pages that left its window cannot be computed again")
            for first in range(0, span.start, self._max_tokens):
                self._together([Span(span.slot, first, min(self._max_tokens, span.start - first), False)])
        return self._together([span])[0]

    def _sample(self, step: Step, logits: torch.Tensor) -> tuple[Choices | None, torch.Tensor]:
        """Choose tokens; also the logits they were chosen from."""
        rows = step.rows
        if not rows.spans:
            return None, logits
        if rows.logit_rows is not None:
            picked = self._device.to_device(torch.tensor(rows.logit_rows, dtype=torch.int64))
            logits = logits.index_select(0, picked)
        return self._sampler.choose(logits, rows), logits

    def _keep(self, step: Step, choices: Choices | None) -> None:
        if choices is not None:
            # A row that failed has -1, which no embedding could look up.
            self._slots.store(step.rows.slots, step.rows.positions, choices.tokens.clamp(min=0))

    def _results(
        self,
        spans: Sequence[Span],
        step: Step,
        choices: Choices | None,
        logits: torch.Tensor,
        chosen_logits: torch.Tensor,
    ) -> Sequence[SpanResult]:
        plain = step.rows.one_each and not step.prompts
        if plain and choices is not None and not choices.logprobs and min(choices.tokens_host) >= 0:
            return Singles(spans, choices.tokens_host)  # the common case, in one go
        prompts = {part.span: self._sampler.prompt_logprobs(logits, part) for part in step.prompts}
        results = []
        row = 0
        for index, span in enumerate(spans):
            prompt = prompts.get(index, ())
            if choices is None or not span.sample:
                results.append(SpanResult(span.slot, prompt_logprobs=prompt))
                continue
            tokens = self._sampler.verify(choices, row, span.drafts)
            if tokens[0] < 0:
                reason = self._slots.errors.get(span.slot) or str(self._sampler.explain(chosen_logits[row]))
                results.append(SpanResult(span.slot, error=reason))
            else:
                entries = (
                    (choices.logprobs.get(row + index) for index in range(len(tokens))) if choices.logprobs else ()
                )
                logprobs = tuple(entry for entry in entries if entry is not None)
                results.append(SpanResult(span.slot, tuple(tokens), logprobs, prompt))
            row += 1 + len(span.drafts)
        return results


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

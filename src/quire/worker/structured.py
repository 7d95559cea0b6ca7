"""StructuredOutputs: the logit step that forbids what the grammar of a row does not allow.

A row's constraint follows the tokens that were chosen, and where they are not what it knows, those in the Slots: so it is
right after retries, preemption and rejected drafts alike. Masks are filled as soon as a row's tokens are known, while the
next step is being planned; where that comes to something else, while the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from quire.core.params import SamplingParams
from quire.core.plan import Admission, Singles, Span, SpanResult
from quire.errors import RequestFailedError
from quire.grammar.compiler import Grammars
from quire.grammar.constraint import Constraint, MaskFiller, MaskWish, mask_width
from quire.grammar.forks import Forks
from quire.kernels.table import Ops
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots

NEVER = float("-inf")
MOST_FORCED = 16  # tokens that a step verifies because nothing else may come
PATIENCE = 8  # forced tokens that a row's model would write otherwise, until it is not asked any more


@dataclass(slots=True)
class _Followed:
    """One row: its constraint and the tokens that this has taken in."""

    constraint: Constraint
    first: int  # position of the first token of the output
    end: int  # and of the next one
    limit: int  # of the output: no token can come there
    taken: list[int] = field(default_factory=list)
    patience: int = PATIENCE


@dataclass(slots=True)
class _Masks:
    """The masks of a step, being filled: a row for each of the step's rows that are structured."""

    mask: np.ndarray  # int32 [R, words]
    rows: Rows | None = None  # of the step; None before it is known
    wishes: list[MaskWish] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # of the wishes
    ends: list[int] = field(default_factory=list)  # where the outputs of the wishes end
    filled: Future[None] | None = None
    count: int = 0  # rows wished for so far

    def add(self, slot: int, followed: _Followed, drafts: Sequence[int]) -> None:
        """Wish for the next row of a slot, and for one behind each draft."""
        self.wishes.append(MaskWish(followed.constraint, self.count, drafts))
        self.slots.append(slot)
        self.ends.append(followed.end)
        self.count += 1 + len(drafts)


class StructuredOutputs:
    """structured_outputs: only tokens that keep the output within its grammar."""

    def __init__(self, slots: Slots, ops: Ops, device: Device, grammars: Grammars | None, threads: int = 1) -> None:
        self._slots = slots
        self._ops = ops
        self._device = device
        self._grammars = grammars
        self._forks = Forks(grammars) if grammars is not None else None
        self._rows: dict[int, _Followed] = {}
        self._masks: _Masks | None = None
        self._ahead: _Masks | None = None  # for the step after this one, if its rows will be the same
        self._vocab_size = 0
        self._filler = MaskFiller(threads)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="quire-masks")
        self.takes_drafts = True  # whether the model can take a wrong guess out again

    def admit(self, new: Admission, params: SamplingParams) -> bool:
        """Start the row's constraint, with the tokens of an earlier run."""
        self._rows.pop(new.slot, None)
        if params.structured_outputs is None:
            return False
        if self._grammars is None:
            raise RequestFailedError("structured_outputs needs a tokenizer, and this worker has none")
        form, begin, output = params.structured_outputs, new.prompt_len, new.token_ids[new.prompt_len :]
        limit = begin + (params.max_tokens or self._slots.tokens.shape[1])
        if params.allowed_logprobs and self._forks is not None:
            constraint = self._forks.behind(form, output)
            self._rows[new.slot] = _Followed(constraint, begin, begin + len(output), limit, list(output))
        else:
            followed = _Followed(self._grammars.constraint(form), begin, begin, limit)
            _take(followed, output)
            self._rows[new.slot] = followed
        return True

    def release(self, slot: int) -> None:
        """Forget a row."""
        self._rows.pop(slot, None)

    def begin(self, rows: Rows, using: list[int], vocab_size: int) -> None:
        """Fill the masks of a step's rows beside whatever comes before apply(); `rows` as there."""
        ahead, self._ahead, self._vocab_size = self._ahead, None, vocab_size
        if ahead is not None and self._is_for(ahead, rows, using, vocab_size):
            ahead.rows, self._masks = rows, ahead
            return
        _settle(ahead)
        masks = self._prepared(rows, using, vocab_size)
        masks.filled = self._beside.submit(self._filler.fill, masks.wishes, masks.mask)
        self._masks = masks

    def apply(self, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        """Forbid the rest. A row whose grammar fails is left without any token, and Slots.errors says why."""
        masks, self._masks = self._masks, None
        if masks is None or masks.rows is not rows or masks.mask.shape[1] != mask_width(logits.shape[1]):
            _wait(masks)
            masks = self._prepared(rows, using, logits.shape[1])
            self._filler.fill(masks.wishes, masks.mask)
        _wait(masks)
        for wish, slot in zip(masks.wishes, masks.slots, strict=True):
            failure = wish.constraint.failure
            if failure is not None:
                logits[using[wish.row : wish.row + 1 + len(wish.drafts)]] = NEVER
                self._slots.errors[slot] = f"RequestFailedError: the grammar cannot go on: {failure}"
        allowed, index = torch.from_numpy(masks.mask), torch.tensor(using, dtype=torch.int64)
        self._ops.forbid(logits, self._device.to_device(allowed), self._device.to_device(index))

    def guide(self, spans: Sequence[Span], results: Sequence[SpanResult]) -> Sequence[SpanResult]:
        """Take in what was chosen. Returns the results with drafts that the grammars allow, or even force."""
        if not self._rows:
            return results
        _settle(self._ahead)
        self._ahead = None
        lone = results.tokens if isinstance(results, Singles) else None
        ahead = _Masks(np.zeros((0, 0), dtype=np.int32))
        changed: dict[int, tuple[int, ...]] = {}
        for index, span in enumerate(spans):
            followed = self._rows.get(span.slot)
            if followed is None:
                continue
            tokens, proposed = (
                ((lone[index],), ()) if lone is not None else (results[index].tokens, results[index].drafts)
            )
            known = span.start + span.count - len(span.drafts)
            if known + len(tokens) >= followed.limit:
                continue
            if tokens and followed.end == known:
                _take(followed, tokens)
            if tokens and followed.end == known + len(tokens):
                drafts = proposed
                if self.takes_drafts:
                    followed.patience -= len(span.drafts) - (len(tokens) - 1)
                    drafts = _drafts(followed, proposed)
                    if drafts != proposed:
                        changed[index] = drafts
                ahead.add(span.slot, followed, drafts)
        self._fill_ahead(ahead)
        if not changed:
            return results
        return tuple(
            result._replace(drafts=changed[index]) if index in changed else result
            for index, result in enumerate(results)
        )

    def _fill_ahead(self, masks: _Masks) -> None:
        """Fill masks before their step is known."""
        if masks.wishes and self._vocab_size:
            masks.mask = np.zeros((masks.count, mask_width(self._vocab_size)), dtype=np.int32)
            masks.filled = self._beside.submit(self._filler.fill, masks.wishes, masks.mask)
            self._ahead = masks

    def _is_for(self, ahead: _Masks, rows: Rows, using: list[int], vocab_size: int) -> bool:
        """Whether masks that were filled ahead are those of a step's rows."""
        if ahead.mask.shape != (len(using), mask_width(vocab_size)):
            return False
        slots, ends = rows.slots_host[using].tolist(), rows.positions_host[using].tolist()
        for wish, slot, end in zip(ahead.wishes, ahead.slots, ahead.ends, strict=True):
            followed, first, count = self._rows.get(slot), wish.row, len(wish.drafts)
            if followed is None or followed.constraint is not wish.constraint or ends[first] != end:
                return False
            if slots[first : first + count + 1] != [slot] * (count + 1):
                return False
            if count and self._slots.tokens[slot, end : end + count].tolist() != list(wish.drafts):
                return False
        return True

    def _prepared(self, rows: Rows, using: list[int], vocab_size: int) -> _Masks:
        """Bring the constraints to where the rows are. Of several rows of a slot, the later ones hold drafts."""
        mask = np.zeros((len(using), mask_width(vocab_size)), dtype=np.int32)
        masks = _Masks(mask, rows)
        slots, ends = rows.slots_host[using].tolist(), rows.positions_host[using].tolist()
        index = 0
        while index < len(using):
            slot, end = slots[index], ends[index]
            count = 1
            while index + count < len(using) and slots[index + count] == slot:
                count += 1
            try:
                followed = self._rows[slot]
                if followed.end != end:
                    self._follow(followed, slot, end)
                drafts = self._slots.tokens[slot, end : end + count - 1].tolist() if count > 1 else ()
                masks.count = index
                masks.add(slot, followed, drafts)
            except Exception as error:  # whatever a grammar does, it must not reach the neighbours
                self._slots.errors[slot] = f"{type(error).__name__}: {error}"
            index += count
        return masks

    def _follow(self, followed: _Followed, slot: int, end: int) -> None:
        """Bring the constraint to the output that ends before position `end`, as the Slots have it."""
        output, taken = self._slots.tokens[slot, followed.first : end].tolist(), followed.taken
        same = _common(taken, output)
        if same < len(taken):
            followed.constraint.rollback(len(taken) - same)
            del taken[same:]
            followed.end = followed.first + same
        if _take(followed, output[same:]) < len(output) - same:
            raise RequestFailedError("the output has a token that its grammar does not allow")


def _take(followed: _Followed, tokens: Sequence[int]) -> int:
    """Take in tokens, as far as the grammar allows them; how many that were."""
    count = followed.constraint.advance(tokens)
    followed.taken.extend(tokens[:count])
    followed.end += count
    return count


def _drafts(followed: _Followed, proposed: tuple[int, ...]) -> tuple[int, ...]:
    """What the next step shall verify: what must come, or as much of the proposals as may."""
    if followed.patience > 0:
        forced = followed.constraint.forced()
        if forced:
            return tuple(forced[:MOST_FORCED])
    return proposed[: followed.constraint.fits(proposed)] if proposed else ()


def _wait(masks: _Masks | None) -> None:
    if masks is not None and masks.filled is not None:
        masks.filled.result()


def _settle(masks: _Masks | None) -> None:
    """Wait for masks that are not wanted any more, whatever became of them: their constraints are."""
    if masks is not None and masks.filled is not None:
        masks.filled.exception()


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens the two begin with in common."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count

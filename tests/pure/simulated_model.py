"""A model for the simulation whose every number is an integer: what attention, windows and states do, by hashing.

FakeModel.alone() says which tokens a request must get when nothing else exists. PagedWorker gets the same numbers the
hard way: it obeys plans, and reads all context back through the page tables, so a page that is stale, shared by mistake
or written by somebody else gives wrong tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quire.core.plan import Admission, GroupSpec, Span, SpanResult, StepPlan, StepResult, TokenLogprobs

EOS = 0
VOCABULARY = 6
OUT_OF_LUCK = "out of luck"
NONSENSE = -7
STOP_RATE = 61  # one token in so many is EOS


@dataclass(frozen=True, slots=True)
class FakeModel:
    """The values of each group's cache, and the next token, as hashes.

    full: a position's value depends on the one before. window: on those its window covers. state: one running value.
    cross: a value of the encoder's input. The next token depends on everything that the last position can see.
    """

    seed: int
    groups: tuple[GroupSpec, ...]

    def root(self, adapter: int) -> int:
        """What stands before the first position."""
        return hash((self.seed, adapter))

    def choose(self, seen: Sequence[object]) -> int:
        """The next token from all that the last position sees."""
        digest = hash(tuple(seen)) & 0xFFFFFFFFFFFF
        return EOS if digest % STOP_RATE == 0 else 1 + (digest >> 16) % (VOCABULARY - 1)

    def alone(self, tokens: Sequence[int], adapter: int, more: int) -> list[int]:
        """The `more` tokens that follow `tokens`, computed without pages and without stop rules."""
        root, known = self.root(adapter), list(tokens)
        values: list[list[int]] = [[] for _ in self.groups]
        made: list[int] = []
        position = 0
        while len(made) < more:
            for group, column in zip(self.groups, values, strict=True):
                for place in range(position, len(known)):
                    if group.kind == "window":
                        column.append(hash((root, known[place], *column[max(0, place - group.window + 1) :])))
                    elif group.kind != "cross":
                        column.append(hash((column[-1] if column else root, known[place])))
            position = len(known)
            seen: list[object] = [root]
            for group, column in zip(self.groups, values, strict=True):
                if group.kind == "full":
                    seen.append(tuple(column))
                elif group.kind == "window":
                    seen.append(tuple(column[max(0, position - group.window) :]))
                elif group.kind == "state":
                    seen.append(column[-1])
                else:
                    seen.append(root)
            made.append(self.choose(seen))
            known.append(made[-1])
        return made


@dataclass(slots=True)
class Row:
    """One slot of the worker."""

    admission: Admission
    tokens: list[int]
    tables: list[list[int]]
    next: int | None = None  # where the next span must start; None right after admission


@dataclass(slots=True)
class Habits:
    """How the worker behaves besides computing. `future` gives the true tokens of a request from an index on."""

    rng: random.Random
    future: Callable[[str, int], Sequence[int]]
    drafts: float = 0.0  # share of samples that come with proposals
    right: float = 0.7  # share of proposed tokens that are right
    errors: float = 0.0  # share of spans that fail
    gather_copies: bool = False  # read all sources of a plan's copies first, or copy in order


@dataclass(slots=True)
class PagedWorker:
    """Obeys plans as a real worker does, in the order release, admit, grant, copy, compute, sample."""

    model: FakeModel
    habits: Habits
    longest: int  # tokens of a request
    rows: dict[int, Row] = field(default_factory=dict)
    store: list[list[list[int]]] = field(default_factory=list)
    _writers: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Give every page a place for its values."""
        self.store = [[[0] * group.page_size for _ in range(group.num_pages)] for group in self.model.groups]

    def run(self, plan: StepPlan) -> StepResult:
        """Execute one plan."""
        self._writers.clear()
        for slot in plan.released:
            del self.rows[slot]
        for admission in plan.admitted:
            assert admission.slot not in self.rows, f"slot {admission.slot} is given to a second request"
            tables: list[list[int]] = [[] for _ in self.model.groups]
            self.rows[admission.slot] = Row(admission, list(admission.token_ids), tables)
        for grant in plan.grants:
            row = self.rows[grant.slot]
            assert grant.index == len(row.tables[grant.group]), "a grant leaves a gap in a page table"
            row.tables[grant.group].extend(grant.pages)
            if self.model.groups[grant.group].kind == "cross":
                self._encode(row, grant.group)
        self._copy(plan)
        assert len({span.slot for span in plan.spans}) == len(plan.spans), "two spans for one row"
        # Within a step nobody may rely on anybody: the order in which the spans are computed is not known.
        order = list(range(len(plan.spans)))
        self.habits.rng.shuffle(order)
        results = {index: self._compute(plan.spans[index]) for index in order}
        return StepResult(plan.step, tuple(results[index] for index in range(len(order))))

    def _encode(self, row: Row, group: int) -> None:
        for page in row.tables[group]:
            self.store[group][page] = [self.model.root(row.admission.adapter)] * self.model.groups[group].page_size

    def _copy(self, plan: StepPlan) -> None:
        contents = [list(self.store[copy.group][copy.source]) for copy in plan.copies]
        for copy, gathered in zip(plan.copies, contents, strict=True):
            assert copy.source and copy.target, "a copy of the null page"
            content = gathered if self.habits.gather_copies else list(self.store[copy.group][copy.source])
            self.store[copy.group][copy.target] = content

    def _compute(self, span: Span) -> SpanResult:
        row, root = self.rows[span.slot], self.model.root(self.rows[span.slot].admission.adapter)
        known = span.start + span.count - len(span.drafts)
        assert row.next is None or span.start == row.next, f"span at {span.start} instead of {row.next}"
        assert span.count > 0 and known <= len(row.tokens), "a span beyond the known tokens"
        assert span.sample == (known == len(row.tokens)), "`sample` must tell whether the known tokens end here"
        assert span.sample or not span.drafts, "drafts behind a gap"
        params, given = row.admission.params, row.admission.prompt_len
        assert known < min(self.longest, given + (params.max_tokens or self.longest)), "a span behind the request's end"
        tokens = row.tokens[span.start : known] + list(span.drafts)
        rng = self.habits.rng
        if self.habits.errors and rng.random() < self.habits.errors:
            self._spoil(row, span)
            return SpanResult(span.slot, error=OUT_OF_LUCK)
        seen = [
            self._advance(row, index, root, span.start, tokens) if group.kind != "cross" else self._encoder(row, index)
            for index, group in enumerate(self.model.groups)
        ]
        made = self._sample(root, seen, span, known) if span.sample else ()
        row.tokens += made
        row.next = len(row.tokens) - 1 if span.sample else known
        drafts = self._propose(row) if span.sample and rng.random() < self.habits.drafts else ()
        return SpanResult(span.slot, made, (), self._prompt_logprobs(row, span), drafts)

    def _spoil(self, row: Row, span: Span) -> None:
        """A span that failed half-way leaves nonsense in its pages, and a row that must not be asked again for more."""
        for group, table, store in zip(self.model.groups, row.tables, self.store, strict=True):
            if group.kind == "state":
                store[table[0]][0] = NONSENSE
            elif group.kind != "cross":
                for place in range(span.start, span.start + span.count):
                    store[table[place // group.page_size]][place % group.page_size] = NONSENSE
        row.next = span.start + span.count - len(span.drafts)
        row.tokens += [0] * span.sample

    def _encoder(self, row: Row, index: int) -> list[int]:
        return [value for page in row.tables[index] for value in self.store[index][page]]

    def _advance(self, row: Row, index: int, root: int, start: int, tokens: list[int]) -> list[int]:
        """Write the values of the span into the pages of one group. Returns what can be seen, from the first visible
        position to the end of the span; for a state, the states after each position of the span.
        """
        group, table, store = self.model.groups[index], row.tables[index], self.store[index]
        size = group.page_size
        if group.kind == "state":
            value, states = (store[table[0]][0] if start else root), []
            for token in tokens:
                value = hash((value, token))
                states.append(value)
            self._write(index, table[0], row.admission.slot)
            store[table[0]][0] = value
            return states
        window = group.window if group.kind == "window" else None
        first = 0 if window is None else max(0, start - window + 1)
        seen: list[int] = []
        for page in table[first // size : -(-start // size)]:
            assert page, "a visible position has the null page"
            seen += store[page]
        seen = seen[first % size : first % size + start - first]
        assert len(seen) == start - first, "the page table is too short"
        for place, token in enumerate(tokens, start):
            if window is None:
                value = hash((seen[-1] if seen else root, token))
            else:
                value = hash((root, token, *seen[max(0, place - window + 1) - first :]))
            seen.append(value)
            page = table[place // size]
            assert page, "a position is written to the null page"
            self._write(index, page, row.admission.slot)
            store[page][place % size] = value
        return seen

    def _write(self, group: int, page: int, slot: int) -> None:
        assert self._writers.setdefault((group, page), slot) == slot, f"page {page} is written by two requests"

    def _sample(self, root: int, seen: list[list[int]], span: Span, known: int) -> tuple[int, ...]:
        """The token after `known`, and after each draft as long as the drafts are what the model says."""
        made: list[int] = []
        for place in range(known, span.start + span.count + 1):
            made.append(
                self.model.choose([root, *(self._visible(seen, span, place, index) for index in range(len(seen)))])
            )
            if place - known >= len(span.drafts) or span.drafts[place - known] != made[-1]:
                break
        return tuple(made)

    def _visible(self, seen: list[list[int]], span: Span, end: int, index: int) -> object:
        """What the query at position end - 1 sees in one group."""
        group = self.model.groups[index]
        if group.kind == "full":
            return tuple(seen[index][:end])
        if group.kind == "state":
            return seen[index][end - span.start - 1]
        if group.kind == "cross":
            assert len(set(seen[index])) == 1, "the encoder's pages hold something else"
            return seen[index][0]
        first = max(0, span.start - group.window + 1)
        return tuple(seen[index][max(0, end - group.window) - first : end - first])

    def _propose(self, row: Row) -> tuple[int, ...]:
        rng = self.habits.rng
        true = self.habits.future(row.admission.request_id, len(row.tokens) - row.admission.prompt_len)
        return tuple(
            token if rng.random() < self.habits.right else rng.randrange(VOCABULARY)
            for token in true[: rng.randint(1, 4)]
        )

    def _prompt_logprobs(self, row: Row, span: Span) -> tuple[TokenLogprobs, ...]:
        """For positions start + 1 .. start + count of the prompt; the rank says which position it was."""
        if row.admission.params.prompt_logprobs is None:
            return ()
        end = min(span.start + span.count + 1, row.admission.prompt_len)
        return tuple(TokenLogprobs((row.tokens[place],), (0.0,), (place,)) for place in range(span.start + 1, end))

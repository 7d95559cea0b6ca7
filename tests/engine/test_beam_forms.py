"""Beam search with a form: what Transformers finds with a prefix_allowed_tokens_fn, all that there is, no work twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from library_beams import SETTINGS, library_beams, library_model

from quire import LLM, BeamSearchParams, SamplingParams
from quire.core.structured import StructuredOutputsParams
from quire.errors import ValidationError
from quire.grammar import Constraint, MaskFiller, MaskWish, forks
from quire.grammar.constraint import mask_width
from quire.kernels import choosing
from quire.worker.logprobs import FEW, token_logprobs

PROMPT = "The old man went to the"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
FORMS = [
    {"json": SCHEMA},
    {"regex": r"[A-Z][a-z]{2,8}( [a-z]+){1,3}\."},
    {"choice": ["mill", "mill house", "river", "sea"]},
    {"grammar": 'start: "to " WORD ("," " " WORD)*\nWORD: /[a-z]{1,6}/'},
]
FILLER = MaskFiller(1)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS, dtype="float32") as made:
        yield made


@pytest.fixture(scope="module")
def reference() -> Any:
    return library_model()


def started(llm: LLM, form: dict[str, Any]) -> Constraint:
    grammars = llm._engine._grammars
    assert grammars is not None
    return grammars.constraint(StructuredOutputsParams(**form))


def allowed(llm: LLM, constraint: Constraint) -> list[int]:
    mask = np.zeros((1, mask_width(llm._engine.settings.vocab_size)), dtype=np.int32)
    FILLER.fill([MaskWish(constraint, 0)], mask)
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def allowing(llm: LLM, form: dict[str, Any], start: int) -> Callable[[int, torch.Tensor], list[int]]:
    """A prefix_allowed_tokens_fn; behind an end, where Transformers looks too, another end may come."""
    ends = list(llm._engine.settings.eos_token_ids)

    def following(_: int, tokens: torch.Tensor) -> list[int]:
        constraint, output = started(llm, form), tokens[start:].tolist()
        return allowed(llm, constraint) if constraint.advance(output) == len(output) else ends

    return following


def expected(llm: LLM, reference: Any, form: dict[str, Any], params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """Sequences without their end, and their scores. Rows that Transformers fills up with are left out."""
    prompt, ends = llm.get_tokenizer().encode(PROMPT), list(llm._engine.settings.eos_token_ids)
    found = library_beams(reference, prompt, params, ends, allowing(llm, form, len(prompt)))
    return [(row, score) for row, score in found if score > -1e6]


def keeps(form: dict[str, Any], text: str) -> bool:
    if "json" in form:
        return set(json.loads(text)) == {"name", "old"}
    if "choice" in form:
        return text in form["choice"]
    return re.fullmatch(form.get("regex", r"to [a-z]{1,6}(, [a-z]{1,6})*"), text) is not None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
@pytest.mark.parametrize(
    ("width", "penalty", "early"), [(2, 1.0, False), (4, 0.0, False), (3, 2.0, "never"), (5, -1.0, False)]
)
def test_the_sequences_of_transformers(
    llm: LLM, reference: Any, form: dict[str, Any], width: int, penalty: float, early: Any
) -> None:
    params = BeamSearchParams(
        beam_width=width, max_tokens=24, length_penalty=penalty, early_stopping=early, structured_outputs=form
    )
    found = llm.beam_search(PROMPT, params)[0].sequences
    wanted = expected(llm, reference, form, params)
    assert [sequence.tokens for sequence in found] == [row for row, _ in wanted]
    assert [sequence.score for sequence in found] == pytest.approx([score for _, score in wanted], rel=1e-4)
    ended = [sequence for sequence in found if sequence.finish_reason == "stop"]
    assert all(keeps(form, str(sequence.text)[len(PROMPT) :]) for sequence in ended)


def every(llm: LLM, constraint: Constraint) -> list[list[int]]:
    """Whatever the model could write, ends included."""
    found: list[list[int]] = []
    for token in allowed(llm, constraint):
        if token in llm._engine.settings.eos_token_ids:
            found.append([token])
        else:
            after = constraint.fork()
            assert after.advance([token]) == 1
            found += [[token, *rest] for rest in every(llm, after)]
    return found


def test_all_that_there_is_is_found(llm: LLM) -> None:
    """A width for everything finds everything, with the log-probabilities that the model has without any form."""
    form = {"regex": "(a|b)(c|de?)?"}
    prompt, ends = llm.get_tokenizer().encode(PROMPT), llm._engine.settings.eos_token_ids
    outputs = every(llm, started(llm, form))
    width = 20 - len(ends)
    assert 8 <= len(outputs) <= width
    params = BeamSearchParams(
        beam_width=width, max_tokens=8, length_penalty=0.0, structured_outputs=form, include_stop_str_in_output=True
    )
    found = llm.beam_search([prompt], params)[0].sequences
    scores = []
    for output in outputs:
        scored = llm.generate([[*prompt, *output]], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
        assert scored is not None
        scores.append(
            sum(scored[len(prompt) + place][token].logprob for place, token in enumerate(output))  # type: ignore[index]
        )
    ranked = sorted(zip(scores, outputs, strict=True), reverse=True)
    assert [sequence.tokens[len(prompt) :] for sequence in found] == [output for _, output in ranked]
    assert [sequence.cum_logprob for sequence in found] == pytest.approx([score for score, _ in ranked], rel=1e-4)


def test_a_beam_goes_on_where_its_parent_was(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round computes one position of each beam and takes one token into its grammar; without that, it finds the same."""
    taken: list[int] = []
    advance = Constraint.advance

    def counted(self: Constraint, token_ids: Sequence[int]) -> int:
        taken.append(len(token_ids))
        return advance(self, token_ids)

    monkeypatch.setattr(Constraint, "advance", counted)
    prompt = [5 + index % 40 for index in range(69)]
    params = BeamSearchParams(
        beam_width=4, max_tokens=20, structured_outputs={"regex": "[a-z ]{200}"}, early_stopping=True
    )
    before = llm._engine.stats()
    found = llm.beam_search([prompt], params)[0].sequences
    after = llm._engine.stats()
    assert after.computed_tokens - before.computed_tokens == len(prompt) + 4 * 19
    assert sum(taken) == 4 * 19
    monkeypatch.setattr(forks, "MOST_KEPT", 0)
    again = llm.beam_search([prompt], params)[0].sequences
    assert sum(taken) > 4 * 19 * 5, "led there token by token"
    assert [(one.tokens, one.cum_logprob) for one in again] == [(one.tokens, one.cum_logprob) for one in found]


def test_without_a_cache_and_with_little_memory(llm: LLM) -> None:
    """Beams that must be computed anew, or wait for pages, find the same."""
    params = [BeamSearchParams(beam_width=8, max_tokens=20, structured_outputs=form) for form in (FORMS[0], FORMS[1])]
    wanted = [[one.tokens for one in llm.beam_search(PROMPT, wish)[0].sequences] for wish in params]
    settings = SETTINGS | {"kv_cache_memory_bytes": 1 << 20, "enable_prefix_caching": False, "max_num_seqs": 3}
    with LLM(**settings, dtype="float32") as small:
        for wish, tokens in zip(params, wanted, strict=True):
            assert [one.tokens for one in small.beam_search(PROMPT, wish)[0].sequences] == tokens


def test_log_probabilities_are_of_what_may_come(llm: LLM) -> None:
    form = {"regex": "[0-9]{2}[a-z]+"}
    params = BeamSearchParams(beam_width=3, max_tokens=6, structured_outputs=form, logprobs=5)
    plain = llm.generate(PROMPT, SamplingParams(max_tokens=1, logprobs=1))[0].outputs[0].logprobs
    assert plain
    for sequence in llm.beam_search(PROMPT, params)[0].sequences:
        assert sequence.logprobs is not None
        for place, entry in enumerate(sequence.logprobs):
            texts = [str(found.decoded_token) for found in entry.values()]
            assert len(entry) >= 5 and all(
                re.fullmatch("[0-9]+[a-z]*" if place == 0 else "[0-9a-z]*", t) for t in texts
            )
        first = sequence.logprobs[0].values()
        assert all(found.rank > 1 for found in first), "ranks are those among all tokens"
        assert sum(next(iter(entry.values())).logprob for entry in sequence.logprobs) == pytest.approx(
            sequence.cum_logprob, abs=1e-4
        )


def test_ranks_of_few_and_of_many_tokens() -> None:
    """One way to find them takes memory, the other time; they agree, on equal scores too."""
    torch.manual_seed(3)
    logits = torch.randn(1, 1000).mul(8).round().div(8)
    ids, chosen = list(range(FEW + 40)), torch.tensor([7])
    mode: Any = "raw_logprobs"
    many = token_logprobs(choosing, logits, chosen, [0], mode, {0: ids})[0]  # type: ignore[arg-type]
    few = token_logprobs(choosing, logits, chosen, [0], mode, {0: ids[: FEW // 2]})[0]  # type: ignore[arg-type]
    assert few.token_ids == many.token_ids[: FEW // 2 + 1]
    assert (few.ranks, few.logprobs) == (many.ranks[: FEW // 2 + 1], many.logprobs[: FEW // 2 + 1])


def test_forms_that_cannot_be_had(llm: LLM) -> None:
    with pytest.raises(ValidationError, match=r"structured_outputs\.regex"):
        llm.beam_search(PROMPT, BeamSearchParams(beam_width=2, max_tokens=4, structured_outputs={"regex": "("}))
    with pytest.raises(ValidationError, match="structured_outputs"):
        BeamSearchParams(beam_width=2, max_tokens=2, structured_outputs="json")  # type: ignore[arg-type]

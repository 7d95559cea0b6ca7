"""Log-probabilities as columns, and those of tokens that a request names at positions of its prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from quire import LLM, SamplingParams
from quire.core.plan import TokenLogprobs
from quire.engine.logprobs import FlatLogprobs, named_logprobs
from quire.errors import ValidationError

PROMPT = [5 + 7 * index % 600 for index in range(75)]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    settings = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26, "max_num_batched_tokens": 32}
    with LLM(max_num_seqs=4, max_model_len=256, logprobs_mode="raw_logprobs", **settings) as made:
        yield made


def test_columns_are_the_list_in_another_shape(llm: LLM) -> None:
    wishes = {"temperature": 0.0, "max_tokens": 8, "logprobs": 3, "prompt_logprobs": 2}
    listed = llm.generate(PROMPT, SamplingParams(**wishes))[0]
    flat = llm.generate(PROMPT, SamplingParams(**wishes, flat_logprobs=True))[0]
    for columns, dicts in (
        (flat.outputs[0].logprobs, listed.outputs[0].logprobs),
        (flat.prompt_logprobs, listed.prompt_logprobs),
    ):
        assert isinstance(columns, FlatLogprobs) and isinstance(dicts, list)
        assert len(columns) == len(dicts) and list(columns) == dicts and columns[-1] == dicts[-1]
        assert list(columns[2:5]) == dicts[2:5] and isinstance(columns[2:5], FlatLogprobs)
        assert len(columns.token_ids) == len(columns.logprobs) == len(columns.ranks) == columns.end_indices[-1]
    assert flat.prompt_logprobs is not None and flat.prompt_logprobs[0] is None
    assert flat.outputs[0].cumulative_logprob == listed.outputs[0].cumulative_logprob


def test_columns_of_a_stopped_output_end_with_it(llm: LLM) -> None:
    whole = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].text
    params = SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, stop=whole[8:11], flat_logprobs=True)
    found = llm.generate(PROMPT, params)[0].outputs[0]
    assert isinstance(found.logprobs, FlatLogprobs) and len(found.logprobs) == len(found.token_ids) < 12
    sums = sum(position[token].logprob for position, token in zip(found.logprobs, found.token_ids, strict=True))
    assert found.cumulative_logprob == pytest.approx(sums, abs=1e-5)


def test_a_token_that_comes_twice_counts_once() -> None:
    entry = TokenLogprobs((4, 9, 4), (-1.0, -0.5, -1.0), (2, 1, 2))
    columns = FlatLogprobs()
    columns.add(entry, None)
    assert columns[0] == named_logprobs(entry, None) and len(columns.token_ids) == 3


@pytest.mark.parametrize("start", [0, 40, 73])
@pytest.mark.parametrize("beside", [None, 0, 2])
def test_named_tokens_of_a_prompt(llm: LLM, start: int, beside: int | None) -> None:
    """A row for each position, in pieces of 32 positions, equals what all log-probabilities say."""
    llm._engine.settings = _with(llm, max_logprobs=-1)
    every = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=-1))[0].prompt_logprobs
    llm._engine.settings = _with(llm, max_logprobs=20)
    assert every is not None
    rows = [[PROMPT[start + 1 + row], (13 * row) % 4096, -1][: 2 + row % 2] for row in range(len(PROMPT) - 1 - start)]
    params = SamplingParams(
        max_tokens=2,
        temperature=0.0,
        prompt_logprobs=beside,
        prompt_logprob_token_ids=rows,
        prompt_logprob_start=start,
    )
    output = llm.generate(PROMPT, params)[0]
    scores = output.prompt_token_id_logprobs
    assert scores is not None and len(scores) == len(rows) and {len(row) for row in scores} <= {2, 3}
    for position, (row, found) in enumerate(zip(rows, scores, strict=True), start + 1):
        for token, value in zip(row, found, strict=False):
            wanted = -math.inf if token == -1 else (every[position] or {})[token].logprob
            assert value == pytest.approx(wanted, abs=1e-5)
    if beside is None:
        assert output.prompt_logprobs is None
    else:
        again = llm.generate(PROMPT, SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=beside))[0]
        assert output.prompt_logprobs == again.prompt_logprobs
    assert len(output.outputs[0].token_ids) == 2


def test_one_row_counts_for_all_positions_and_may_be_an_array(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprob_token_ids=[7, 9])
    scores = llm.generate(PROMPT, params)[0].prompt_token_id_logprobs
    rows = np.tile(np.array([7, 9], dtype=np.int32), (len(PROMPT) - 1, 1))
    again = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprob_token_ids=rows))[0]
    assert scores == again.prompt_token_id_logprobs and np.shape(scores) == (74, 2)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt_logprob_token_ids", {"prompt_logprob_token_ids": "ab"}),
        ("prompt_logprob_token_ids", {"prompt_logprob_token_ids": [[1.5]]}),
        ("prompt_logprob_token_ids", {"prompt_logprob_token_ids": [[1], [2]]}),
        ("prompt_logprob_token_ids", {"prompt_logprob_token_ids": [4096]}),
        ("prompt_logprob_token_ids", {"prompt_logprob_token_ids": list(range(21))}),
        ("prompt_logprob_start", {"prompt_logprob_token_ids": [1], "prompt_logprob_start": 75}),
        ("prompt_logprob_start", {"prompt_logprob_start": 3}),
        ("prompt_logprob_start", {"prompt_logprob_token_ids": [1], "prompt_logprob_start": -1}),
        ("flat_logprobs", {"flat_logprobs": 1}),
    ],
)
def test_what_does_not_fit_is_named(llm: LLM, field: str, values: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        llm.generate(PROMPT, SamplingParams(**values))
    assert caught.value.field == field


def _with(llm: LLM, **changes: int) -> object:
    from dataclasses import replace

    llm._engine._resolve.cache_clear()
    return replace(llm._engine.settings, **changes)

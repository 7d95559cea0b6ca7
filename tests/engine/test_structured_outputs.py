"""Structured outputs on the bundled model: hundreds of invented schemas, and every other wish beside them."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from quire import LLM, SamplingParams
from quire.core.plan import Admission, Span, SpanResult
from quire.errors import ValidationError
from quire.grammar import Constraint
from quire.kernels.table import load_ops
from quire.text.format_parser import CallArguments, CallEnd, CallStart, FormatParser
from quire.text.tool_formats import tool_format
from quire.worker.batch import Rows
from quire.worker.device import Device
from quire.worker.slots import Slots
from quire.worker.structured import StructuredOutputs

sys.path.insert(0, str(Path(__file__).parent.parent / "pure"))

from schemas import fits, invent
from test_grammar_constraint import TOKENS, made

BASE = {"max_num_seqs": 32, "max_model_len": 512, "device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26}
COUNT = 300


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**BASE) as made:
        yield made


def ask(llm: LLM, params: list[SamplingParams] | SamplingParams, prompt: str = "Once upon a time"):
    count = len(params) if isinstance(params, list) else 1
    return [output.outputs for output in llm.generate([prompt] * count, params, use_tqdm=False)]


def one(llm: LLM, **wish):
    return ask(llm, SamplingParams(**({"max_tokens": 64} | wish)))[0][0]


def test_invented_schemas_are_kept(llm: LLM) -> None:
    """Whatever ends by itself fits its schema; a number with endless digits may be cut off by max_tokens."""
    chance = random.Random(11)
    schemas = [invent(chance) for _ in range(COUNT)]
    params = [
        SamplingParams(
            max_tokens=160,
            temperature=0.0 if index % 3 == 0 else 1.0,
            seed=index,
            structured_outputs={"json": schema, "disable_any_whitespace": index % 2 == 0},
        )
        for index, schema in enumerate(schemas)
    ]
    ended = 0
    for schema, outputs in zip(schemas, ask(llm, params), strict=True):
        assert outputs[0].finish_reason in ("stop", "length"), outputs[0].error
        if outputs[0].finish_reason == "stop":
            ended += 1
            assert fits(json.loads(outputs[0].text), schema), (schema, outputs[0].text)
        else:
            assert len(outputs[0].token_ids) == 160
    assert ended > 0.9 * COUNT, ended


def test_regexes_and_choices(llm: LLM) -> None:
    regexes = ["[a-z]{3,8} [0-9]{2,4}", "(ab|cd){1,5}", "[A-Z][a-z]{1,9}, [0-9]{5}", "#[0-9a-f]{6}"]
    params = [
        SamplingParams(max_tokens=64, seed=number, structured_outputs={"regex": regexes[number % 4]})
        for number in range(40)
    ]
    for number, outputs in enumerate(ask(llm, params)):
        assert re.fullmatch(regexes[number % 4], outputs[0].text), outputs[0].text
    for seed in range(5):
        assert one(llm, seed=seed, structured_outputs={"choice": ["red", "dark red", "réd"]}).text in (
            "red",
            "dark red",
            "réd",
        )


def test_unconstrained_neighbours_do_not_notice(llm: LLM) -> None:
    free = [SamplingParams(max_tokens=20, seed=number, temperature=1.0) for number in range(6)]
    alone = [outputs[0].token_ids for outputs in ask(llm, free)]
    bound = [SamplingParams(max_tokens=20, structured_outputs={"regex": "[0-9]{30}"}) for _ in free]
    mixed = ask(llm, [item for pair in zip(free, bound, strict=True) for item in pair])
    assert [outputs[0].token_ids for outputs in mixed[::2]] == alone
    assert all(re.fullmatch("[0-9]{1,30}", outputs[0].text) for outputs in mixed[1::2])


def mixed_wishes() -> list[SamplingParams]:
    chance = random.Random(2)
    return [
        SamplingParams(
            max_tokens=40,
            seed=number,
            temperature=float(number % 2),
            structured_outputs=None if number % 4 == 3 else {"json": invent(chance)},
        )
        for number in range(16)
    ]


@pytest.mark.parametrize(
    "way",
    [
        {"num_gpu_blocks_override": 14, "block_size": 16, "enable_prefix_caching": False},
        {"num_gpu_blocks_override": 14, "block_size": 16, "async_scheduling": True},
        {"max_num_batched_tokens": 9, "max_num_seqs": 5},
    ],
    ids=["preempted", "preempted, with hits, planned ahead", "chunked"],
)
def test_the_same_output_under_every_schedule(llm: LLM, way: dict) -> None:
    wanted = [outputs[0].token_ids for outputs in ask(llm, mixed_wishes())]
    with LLM(**{**BASE, "max_model_len": 128} | way, disable_log_stats=False) as other:
        found = other.generate(["Once upon a time"] * 16, mixed_wishes(), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in found] == wanted
    if "num_gpu_blocks_override" in way:
        assert sum(output.metrics.num_preemptions for output in found) > 0


def test_many_completions_of_one_prompt(llm: LLM) -> None:
    outputs = ask(
        llm, SamplingParams(n=5, temperature=1.5, seed=3, max_tokens=30, structured_outputs={"regex": "[a-z]{4,9}"})
    )[0]
    assert len({output.text for output in outputs}) > 1
    assert all(re.fullmatch("[a-z]{4,9}", output.text) for output in outputs)


def test_min_tokens_gives_way_to_a_complete_output(llm: LLM) -> None:
    output = one(llm, min_tokens=30, structured_outputs={"choice": ["yes"]})
    assert (output.text, output.finish_reason) == ("yes", "stop")
    output = one(llm, min_tokens=20, temperature=0.0, structured_outputs={"regex": "[a-z ]*"})
    assert len(output.token_ids) >= 20  # an output that may go on does


def test_stop_strings_and_ids_end_an_output_early(llm: LLM) -> None:
    output = one(llm, stop=["3"], structured_outputs={"choice": ["12345"]})
    assert (output.text, output.stop_reason) == ("12", "3")


def test_ignore_eos_says_nothing_more(llm: LLM) -> None:
    output = one(llm, ignore_eos=True, max_tokens=12, structured_outputs={"choice": ["yes"]})
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("yes", "length", 12)


def test_other_wishes_about_tokens_hold_too(llm: LLM) -> None:
    output = one(llm, bad_words=["yes"], structured_outputs={"choice": ["yes", "no"]})
    assert output.text == "no"
    output = one(llm, allowed_token_ids=[5], structured_outputs={"choice": ["yes"]})
    assert output.finish_reason == "error" and "no token is left" in output.error


def test_a_failing_grammar_fails_its_own_request(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int, int] = {}

    def fails(self: Constraint) -> str | None:
        asked[id(self)] = asked.get(id(self), 0) + 1
        return "too complex" if id(self) == next(iter(asked)) and asked[id(self)] == 3 else None

    monkeypatch.setattr(Constraint, "failure", property(fails))
    params = SamplingParams(max_tokens=30, seed=1, structured_outputs={"regex": "[a-z]{20}"})
    outputs = [outputs[0] for outputs in ask(llm, [params] * 4)]
    assert [output.finish_reason for output in outputs] == ["error", "stop", "stop", "stop"]
    assert "too complex" in outputs[0].error
    assert len({output.text for output in outputs[1:]}) == 1
    assert ask(llm, params)[0][0].text == outputs[1].text  # the row is usable again


def test_forced_tokens_are_the_same_in_fewer_steps(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What must come is verified at once; an output is the same as one that comes token by token."""
    schema = {
        "type": "object",
        "properties": {name: {"enum": ["red", "green"]} for name in ("first_colour", "second_colour", "third_colour")},
        "required": ["first_colour", "second_colour", "third_colour"],
        "additionalProperties": False,
    }
    params = [
        SamplingParams(
            max_tokens=80,
            seed=seed,
            temperature=1.0 if seed % 2 else 0.0,
            logprobs=2,
            structured_outputs={"json": schema, "disable_any_whitespace": True},
        )
        for seed in range(6)
    ]

    def run() -> tuple[list, int]:
        before = llm._engine.stats().steps
        outputs = [outputs[0] for outputs in ask(llm, params)]
        return [(found.token_ids, found.text, found.logprobs) for found in outputs], llm._engine.stats().steps - before

    quick, few = run()
    monkeypatch.setattr(Constraint, "forced", lambda self: [])
    slow, many = run()
    assert quick == slow
    assert few < 0.7 * many, (few, many)


def test_a_schema_that_cannot_be_had_is_refused_at_once(llm: LLM) -> None:
    with pytest.raises(ValidationError, match="uniqueItems"):
        one(llm, structured_outputs={"json": {"type": "array", "uniqueItems": True}})
    assert one(llm, structured_outputs={"choice": ["fine"]}).text == "fine"


def test_a_conversation_can_be_held_to_tools(llm: LLM) -> None:
    """LLM.chat with tools: forced calls are in the text as the model writes them, and the parser of formats reads them."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a"]}
    tools = [{"type": "function", "function": {"name": name, "parameters": schema}} for name in ("add", "take")]
    talk = [{"role": "user", "content": "Tell me a tale."}]
    for choice in ("required", {"type": "function", "function": {"name": "take"}}):
        params = SamplingParams(max_tokens=200, temperature=1.2, seed=4)
        text = llm.chat(talk, params, use_tqdm=False, tools=tools, tool_choice=choice)[0].outputs[0].text
        parser = FormatParser(tool_format("hermes"))
        starts = [delta for delta in parser.push(text) + parser.finish() if not isinstance(delta, CallArguments)]
        assert starts and all(isinstance(delta, (CallStart, CallEnd)) for delta in starts), text
        if choice != "required":
            assert [delta.name for delta in starts if isinstance(delta, CallStart)] == ["take"]
    with pytest.raises(ValidationError, match="tool_choice"):
        llm.chat(talk, tools=tools, tool_choice="some", use_tqdm=False)


def test_masks_filled_ahead_are_taken_for_the_rows_that_they_are_for() -> None:
    slots = Slots(2, 16, (), Device("cpu"))
    outputs = StructuredOutputs(slots, load_ops("cpu"), Device("cpu"), made())

    def admit(slot: int, *choices: str) -> None:
        new = Admission(slot, "r", (65, 66), 2, SamplingParams(structured_outputs={"choice": list(choices)}), 0)
        slots.admit(new)
        outputs.admit(new, new.params)

    def allowed(places: list[tuple[int, int]]) -> tuple[list[str], bool]:
        """What may come at (slot, position) of each row, and whether that had been filled ahead."""
        which, ends = (np.array(column) for column in zip(*places, strict=True))
        rows = Rows([], None, which, ends, torch.from_numpy(which), torch.from_numpy(ends))
        ahead = outputs._ahead
        outputs.begin(rows, list(range(len(places))), TOKENS.vocab_size)
        taken = ahead is not None and outputs._masks is ahead
        scores = torch.zeros(len(places), TOKENS.vocab_size)
        outputs.apply(scores, list(range(len(places))), rows)
        return ["".join(map(chr, np.flatnonzero(np.isfinite(row))))[:4] for row in scores.numpy()], taken

    def said(slot: int, start: int, token: str, drafts: tuple[int, ...] = ()) -> SpanResult:
        slots.tokens[slot, start + 1] = ord(token)
        return outputs.guide([Span(slot, start, 1, True)], [SpanResult(slot, (ord(token),), drafts=drafts)])[0]

    admit(0, "axy", "bz", "ac")
    assert allowed([(0, 2)]) == (["ab"], False)
    said(0, 1, "a")
    assert allowed([(0, 3)]) == (["cx"], True)
    admit(0, "kl", "mn", "ki")  # the row is another request's now, and ends at the same place
    assert allowed([(0, 2)]) == (["km"], False)
    said(0, 1, "k")
    admit(0, "qkr", "qs", "qkt")
    slots.tokens[0, 2] = ord("q")
    assert allowed([(0, 3)]) == (["ks"], False)
    admit(1, "mno", "mpq", "r")
    assert said(1, 1, "m", drafts=(ord("n"), ord("x"))).drafts == (ord("n"),)
    slots.tokens[1, 3] = ord("n")
    assert allowed([(1, 3), (1, 4)]) == (["np", "o"], True)
    admit(1, "mno", "mpq", "r")
    said(1, 1, "m", drafts=(ord("n"),))
    slots.tokens[1, 3] = ord("p")  # the scheduler wants something else verified
    assert allowed([(1, 3), (1, 4)]) == (["np", "q"], False)
    said(1, 2, "p")
    assert allowed([(0, 3), (1, 4)]) == (["ks", "q"], False)

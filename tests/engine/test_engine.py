"""The Engine over a model that is a function: text, stops, n, aborts, errors, prompts, whatever the scheduler does."""

from __future__ import annotations

import random

import pytest
from bytes_engine import EOS, VOCAB, BytePieces, Shape, byte_engine, drain, finals, mixer, speaker

from quire.core.params import RequestOutputKind, SamplingParams
from quire.core.plan import StepPlan, StepResult
from quire.engine.executor import Done, FakeExecutor, Handle
from quire.engine.outputs import RequestOutput
from quire.errors import CapacityError, OverloadedError, ValidationError

DELTA = RequestOutputKind.DELTA
FINAL = RequestOutputKind.FINAL_ONLY
SHAPES = {
    "plain": Shape(),
    "ahead": Shape(max_in_flight=2),
    "chunked": Shape(max_num_batched_tokens=9, max_num_seqs=8),
    "preempting": Shape(num_pages=14, prefix_caching=False),
    "preempting, ahead": Shape(num_pages=14, max_in_flight=2),
}


def run(engine, *requests) -> dict[str, RequestOutput]:
    for request_id, prompt, params in requests:
        engine.add(request_id, prompt, params)
    found = finals(drain(engine))
    engine.close()
    return found


def text_of(output: RequestOutput) -> str:
    return output.outputs[0].text


# ---------------------------------------------------------------- text and stops


def test_one_request_from_prompt_to_text():
    output = run(byte_engine(speaker("hello")), ("a", "?", SamplingParams(max_tokens=20)))["a"]
    completion = output.outputs[0]
    assert (output.prompt, output.prompt_token_ids, output.finished) == ("?", [63], True)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("hello", "stop", None)
    assert completion.token_ids == [*b"hello", EOS]
    assert (completion.logprobs, completion.cumulative_logprob) == (None, None)


def test_max_tokens_and_the_context_limit_end_with_length():
    engine = byte_engine(speaker("abcdefgh" * 100), Shape(max_model_len=30))
    found = run(engine, ("few", "?", SamplingParams(max_tokens=3)), ("all", "?", SamplingParams(max_tokens=None)))
    assert (text_of(found["few"]), found["few"].outputs[0].finish_reason) == ("abc", "length")
    assert len(found["all"].outputs[0].token_ids) == 29
    assert found["all"].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("kind", list(RequestOutputKind))
@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(kind, include):
    params = SamplingParams(max_tokens=50, stop=["END"], include_stop_str_in_output=include, output_kind=kind)
    engine = byte_engine(speaker("one ENE two END three"))
    engine.add("a", "?", params)
    outputs = drain(engine)
    last = outputs[-1].outputs[0]
    expected = "one ENE two " + ("END" if include else "")
    shown = "".join(map(text_of, outputs)) if kind is DELTA else last.text
    assert (shown, last.finish_reason, last.stop_reason) == (expected, "stop", "END")
    ids = [token for output in outputs for token in output.outputs[0].token_ids] if kind is DELTA else last.token_ids
    assert bytes(ids) == b"one ENE two END"
    assert engine.stats().running == 0


def test_stream_holds_back_what_may_become_a_stop_string():
    engine = byte_engine(speaker("xENy"))
    engine.add("a", "?", SamplingParams(max_tokens=9, stop=["END"], output_kind=DELTA))
    pieces = [output.outputs[0].text for output in drain(engine)]
    assert "".join(pieces) == "xENy"
    assert "E" not in pieces  # it came with what followed


def test_delta_and_cumulative_say_the_same_as_the_end():
    params = {kind: SamplingParams(max_tokens=30, output_kind=kind) for kind in RequestOutputKind}
    engine = byte_engine(speaker("Grüße, 世界!"))
    for kind, wish in params.items():
        engine.add(kind.name, "?", wish)
    outputs = drain(engine)
    deltas = [output.outputs[0] for output in outputs if output.request_id == "DELTA"]
    cumulative = [output.outputs[0] for output in outputs if output.request_id == "CUMULATIVE"]
    final = [output.outputs[0] for output in outputs if output.request_id == "FINAL_ONLY"]
    assert len(final) == 1 and final[0].text == "Grüße, 世界!"
    assert "".join(item.text for item in deltas) == cumulative[-1].text == final[0].text
    assert [token for item in deltas for token in item.token_ids] == cumulative[-1].token_ids == final[0].token_ids
    assert all(later.text.startswith(sooner.text) for sooner, later in zip(cumulative, cumulative[1:], strict=False))
    assert not any("\N{REPLACEMENT CHARACTER}" in item.text for item in deltas)


def test_stop_ids_are_reported_and_eos_can_be_ignored():
    engine = byte_engine(speaker("ab.cd"))
    found = run(
        engine,
        ("dot", "?", SamplingParams(max_tokens=9, stop_token_ids=[ord(".")])),
        ("on", "?", SamplingParams(max_tokens=9, ignore_eos=True)),
        ("shown", "?", SamplingParams(max_tokens=9, skip_special_tokens=False, include_stop_str_in_output=True)),
    )
    dot = found["dot"].outputs[0]
    assert (dot.text, dot.token_ids, dot.stop_reason) == ("ab", list(b"ab."), ord("."))
    assert (text_of(found["on"]), found["on"].outputs[0].finish_reason) == ("ab.cd", "length")
    assert text_of(found["shown"]) == "ab.cd<eos>"


def test_without_detokenizing_there_is_no_text():
    output = run(byte_engine(speaker("abc")), ("a", "?", SamplingParams(detokenize=False)))["a"]
    assert (text_of(output), output.outputs[0].token_ids) == ("", [*b"abc", EOS])


def test_logprobs_name_their_tokens():
    output = run(byte_engine(speaker("hi")), ("a", "?", SamplingParams(logprobs=1)))["a"]
    first = output.outputs[0].logprobs[0]
    assert list(first) == [ord("h")]
    assert (first[ord("h")].decoded_token, first[ord("h")].rank) == ("h", 1)
    assert len(output.outputs[0].logprobs) == 3
    assert output.outputs[0].cumulative_logprob == pytest.approx(-3.0)


def test_a_stop_string_drops_the_logprobs_behind_it():
    output = run(byte_engine(speaker("a. b")), ("a", "?", SamplingParams(logprobs=0, stop=".")))["a"].outputs[0]
    assert len(output.logprobs) == len(output.token_ids) == 2
    assert output.cumulative_logprob == pytest.approx(-2.0)


# ---------------------------------------------------------------- n, seeds, order


def seeds_of(engine_run: FakeExecutor) -> list[int]:
    return [new.seed for plan in engine_run.plans for new in plan.admitted]


def test_n_gathers_children_with_their_own_seeds():
    executor = FakeExecutor(speaker("hey"))
    output = run(byte_engine(executor), ("a", "?", SamplingParams(n=3, seed=40, output_kind=FINAL)))["a"]
    assert [item.index for item in output.outputs] == [0, 1, 2]
    assert [item.text for item in output.outputs] == ["hey"] * 3
    assert seeds_of(executor) == [40, 41, 42]


def test_n_streams_every_child_to_its_end():
    engine = byte_engine(speaker("hey"))
    engine.add("a", "?", SamplingParams(n=3, output_kind=DELTA))
    outputs = drain(engine)
    texts = ["", "", ""]
    for output in outputs:
        for item in output.outputs:
            texts[item.index] += item.text
    assert texts == ["hey"] * 3
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_requests_without_seed_get_different_ones_and_the_same_in_every_run():
    found = []
    for _ in range(2):
        executor = FakeExecutor(speaker("x"))
        run(byte_engine(executor), ("a", "?", None), ("b", "?", None))
        found.append(seeds_of(executor))
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_the_largest_seed_wraps_for_the_next_child():
    executor = FakeExecutor(speaker("x"))
    run(byte_engine(executor), ("a", "?", SamplingParams(n=2, seed=2**63 - 1)))
    assert seeds_of(executor) == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_tokens_are_those_of_a_lonely_run_whatever_the_scheduler_does(shape):
    rng = random.Random(5)
    prompts = ["".join(rng.choice("abc") for _ in range(rng.randint(1, 24))) for _ in range(20)]
    params = [SamplingParams(max_tokens=rng.randint(1, 22), output_kind=FINAL) for _ in prompts]
    engine = byte_engine(mixer, shape)
    found = run(engine, *((str(i), prompts[i], params[i]) for i in range(20)))
    assert sorted(found) == sorted(str(i) for i in range(20))
    for index, (prompt, wish) in enumerate(zip(prompts, params, strict=True)):
        tokens = list(prompt.encode())
        for _ in range(wish.max_tokens):
            tokens.append(mixer(tuple(tokens)))
        assert found[str(index)].outputs[0].token_ids == tokens[len(prompt) :]


def test_preemption_happens_and_shows_only_in_the_metrics():
    engine = byte_engine(mixer, Shape(num_pages=14, prefix_caching=False))
    for index in range(4):
        engine.add(str(index), "p" * 8, SamplingParams(max_tokens=20, output_kind=DELTA))
    outputs = drain(engine)
    assert engine.stats().preemptions > 0
    for index in range(4):
        mine = [output.outputs[0] for output in outputs if output.request_id == str(index)]
        assert sum(len(item.token_ids) for item in mine) == 20
    assert max(output.metrics.num_preemptions for output in outputs if output.finished) > 0


def test_a_prefix_hit_is_reported():
    engine = byte_engine(mixer)
    engine.add("a", "the same long beginning", SamplingParams(max_tokens=2))
    drain(engine)
    output = run(engine, ("b", "the same long beginning", SamplingParams(max_tokens=2)))["b"]
    assert output.num_cached_tokens == 20


def test_a_salt_keeps_prefixes_apart():
    engine = byte_engine(mixer)
    engine.add("a", "the same long beginning", SamplingParams(max_tokens=2))
    drain(engine)
    output = run(engine, ("b", {"prompt": "the same long beginning", "cache_salt": "mine"}, None))["b"]
    assert output.num_cached_tokens == 0


# ---------------------------------------------------------------- aborts


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("after", [0, 1, 2, 5, 12])
def test_abort_at_any_moment(shape, after):
    engine = byte_engine(mixer, shape)
    for index in range(12):
        engine.add(str(index), "prompt" * 2, SamplingParams(max_tokens=15, output_kind=FINAL))
    outputs = []
    for _ in range(after):
        outputs.extend(engine.step())
    engine.abort([str(index) for index in range(0, 12, 2)])
    engine.abort("never heard of")
    found = finals([*outputs, *drain(engine)])
    engine.close()
    assert sorted(found) == sorted(str(i) for i in range(12))
    for index in range(1, 12, 2):
        assert found[str(index)].outputs[0].finish_reason == "length"
        assert len(found[str(index)].outputs[0].token_ids) == 15
    reasons = {found[str(index)].outputs[0].finish_reason for index in range(0, 12, 2)}
    assert reasons <= {"abort", "length"} and ("abort" in reasons or after == 12)
    assert engine.stats().running == engine.stats().waiting == 0


def test_abort_of_n_ends_every_child_and_keeps_what_came():
    engine = byte_engine(speaker("hello"))
    engine.add("a", "?", SamplingParams(n=2, output_kind=RequestOutputKind.CUMULATIVE))
    engine.step()
    engine.step()
    engine.abort("a")
    last = engine.step()[-1]
    assert last.finished
    assert [(item.text, item.finish_reason) for item in last.outputs] == [("he", "abort")] * 2
    assert not engine.has_work()


# ---------------------------------------------------------------- errors stay with their request


def test_a_failing_request_leaves_its_neighbours_alone():
    def model(tokens: tuple[int, ...]) -> int:
        if tokens[0] == ord("!") and len(tokens) > 4:
            raise ArithmeticError("no such token")
        return mixer(tokens)

    engine = byte_engine(model)
    found = run(engine, *((f"{mark}", mark * 2, SamplingParams(max_tokens=6)) for mark in "a!b"))
    bad = found["!"].outputs[0]
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 3)
    assert "no such token" in bad.error
    assert [found[mark].outputs[0].finish_reason for mark in "ab"] == ["length", "length"]


class BreakingExecutor(FakeExecutor):
    """Fails in step 2: "submit" raises at once, "wait" raises later, "short" brings a result with nothing in it."""

    def __init__(self, way: str) -> None:
        super().__init__(mixer)
        self._way = way

    def submit(self, plan: StepPlan) -> Handle:
        if plan.step != 2:
            return super().submit(plan)
        if self._way == "submit":
            raise OSError("the pipe is gone")
        if self._way == "wait":
            return Done(None, OSError("the pipe is gone"))
        return Done(StepResult(plan.step, ()))


@pytest.mark.parametrize("way", ["submit", "wait", "short"])
def test_a_step_that_fails_as_a_whole_ends_its_requests_and_not_the_engine(way):
    engine = byte_engine(BreakingExecutor(way))
    engine.add("a", "xy", SamplingParams(max_tokens=9))
    found = finals(drain(engine))
    assert ("the pipe is gone" if way != "short" else "0 entries") in found["a"].outputs[0].error
    assert run(engine, ("b", "xy", SamplingParams(max_tokens=3)))["b"].outputs[0].finish_reason == "length"


def test_a_tokenizer_that_fails_ends_its_request_only():
    engine = byte_engine(mixer)

    class Broken(BytePieces):
        def __getitem__(self, token_id: int) -> bytes:
            raise RuntimeError("bad piece")

    engine.add("a", "xy", SamplingParams(max_tokens=9))
    engine.step()
    engine._completions["a"]._stream._reader._pieces = Broken()
    engine.add("b", "xy", SamplingParams(max_tokens=3))
    found = finals(drain(engine))
    assert "bad piece" in found["a"].outputs[0].error
    assert found["b"].outputs[0].finish_reason == "length"
    assert engine.stats().running == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "cannot be empty"),
        ([], "cannot be empty"),
        ({"prompt_token_ids": []}, "cannot be empty"),
        ([1, VOCAB], "out of vocabulary"),
        ([1, -1], "out of vocabulary"),
        ([1, "2"], "must be integers"),
        ([1, True], "must be integers"),
        ({"prompt_token_ids": "123"}, "must be a list of integers"),
        ({"promt": "x"}, "Did you mean 'prompt'"),
        ({}, "needs 'prompt' or 'prompt_token_ids'"),
        ({"prompt": 7}, "must be a string"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        (b"bytes", "must be a string, a list"),
        (None, "must be a string, a list"),
        (
            "x" * 40,
            r"plus the number of requested output tokens \(at least 1\) is longer than the maximum model length",
        ),
        ("x" * 41, "is longer than the maximum model length of 40"),
        ("\ud800", "surrogate|Unicode|utf-8"),
    ],
)
def test_bad_prompts_are_refused_and_nothing_else_happens(prompt, message):
    engine = byte_engine(speaker("ok"), Shape(max_model_len=40))
    with pytest.raises((ValidationError, UnicodeEncodeError), match=message):
        engine.add("bad", prompt, None)
    assert not engine.has_work()
    assert text_of(run(engine, ("good", "?", None))["good"]) == "ok"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (SamplingParams(stop_token_ids=[VOCAB]), "outside the vocabulary"),
        (SamplingParams(allowed_token_ids=[VOCAB]), "outside the vocabulary"),
        (SamplingParams(logit_bias={VOCAB: 1.0}), "outside the vocabulary"),
        (SamplingParams(logprobs=21), "may be at most 20"),
        (SamplingParams(prompt_logprobs=-1), "may be at most 20"),
        ({"temperature": 1.0}, "must be SamplingParams"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(ValidationError, match=message):
        byte_engine(mixer).add("bad", "x", params)


def test_without_tokenizer_only_ids_work():
    engine = byte_engine(speaker("ok"))
    engine.tokenizer = None
    with pytest.raises(ValidationError, match="prompt_token_ids"):
        engine.add("a", "text", None)
    with pytest.raises(ValidationError, match="stop needs a tokenizer"):
        engine.add("a", [63], SamplingParams(stop="x"))
    assert run(engine, ("a", [63], None))["a"].outputs[0].token_ids == [*b"ok", EOS]


def test_an_id_in_use_is_refused():
    engine = byte_engine(mixer)
    engine.add("a", "x", None)
    with pytest.raises(ValidationError, match="already running"):
        engine.add("a", "y", None)
    assert len(finals(drain(engine))) == 1


def test_a_request_larger_than_all_pages_is_refused():
    engine = byte_engine(mixer, Shape(num_pages=5, max_model_len=100))
    with pytest.raises(CapacityError, match="pages"):
        engine.add("a", "x" * 30, SamplingParams(n=2, max_tokens=5))
    assert not engine.has_work()


def test_a_full_queue_refuses():
    engine = byte_engine(mixer, Shape(settings={"max_num_queued_reqs": 2}))
    engine.add("a", "x", None)
    engine.add("b", "x", None)
    with pytest.raises(OverloadedError, match="2 requests wait"):
        engine.add("c", "x", None)
    few = byte_engine(mixer, Shape(settings={"max_num_queued_tokens": 10}))
    few.add("a", "x" * 9, None)
    with pytest.raises(OverloadedError, match="9 prompt tokens wait"):
        few.add("b", "xy", None)


def test_bad_words_become_token_sequences():
    engine = byte_engine(mixer)
    prepared = engine.prepare("a", "x", SamplingParams(bad_words=["no", " so"]))
    assert prepared.params.bad_words_token_ids == ((110, 111), (115, 111))

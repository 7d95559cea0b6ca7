"""LLM handled roughly: arguments of odd kinds, Ctrl-C within a step, threads, copies, forks, use after its end."""

from __future__ import annotations

import copy
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from quire import LLM, EngineOptions, SamplingParams
from quire.errors import EngineDeadError, ValidationError

SETTINGS = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 256, "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
TALK = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as made:
        yield made


def texts(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (lambda: iter(["a", "b"]), ["a", "b"]),
        (lambda: np.array([5, 6, 7]), [5, 6, 7]),
        (lambda: torch.tensor([[5, 6], [7, 8]]), [[5, 6], [7, 8]]),
        (lambda: [np.array([5, 6]), torch.tensor([7, 8])], [[5, 6], [7, 8]]),
        (lambda: {"prompt_token_ids": np.array([5, 6])}, [5, 6]),
        (lambda: np.array(["a", "b"]), ["a", "b"]),
        (lambda: list(np.array([5, 6])), [5, 6]),
        (lambda: [list(torch.tensor([5, 6])), [np.uint8(7)]], [[5, 6], [7]]),
        (list, []),
    ],
)
def test_what_holds_prompts_is_as_good_as_the_list_of_them(llm: LLM, given: Callable[[], Any], same: Any) -> None:
    assert texts(llm, given()) == texts(llm, same)


def test_a_data_type_may_be_torchs_own() -> None:
    assert EngineOptions.from_flat({"dtype": torch.half}).model.dtype == "float16"


def test_chat_takes_what_holds_messages(llm: LLM) -> None:
    (answer,) = llm.chat(TALK, GREEDY, use_tqdm=False)
    for talk in (tuple(TALK), iter(TALK), iter([TALK])):
        (again,) = llm.chat(talk, GREEDY, use_tqdm=False)
        assert again.outputs[0].token_ids == answer.outputs[0].token_ids
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert llm.chat([], GREEDY, use_tqdm=False, tools=tools, tool_choice="required") == []


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda llm: llm.generate({"a", "b"}, GREEDY), "prompt"),
        (lambda llm: llm.generate("a", {"max_tokens": 3}), "sampling_params"),
        (lambda llm: llm.generate("a", 3), "sampling_params"),
        (lambda llm: llm.generate("a", SamplingParams), "sampling_params"),
        (lambda llm: llm.generate("a", GREEDY, priority=3), "priority"),
        (lambda llm: llm.generate("a", GREEDY, priority=["high"]), "priority"),
        (lambda llm: llm.generate("a", GREEDY, tokenization_kwargs=[1]), "tokenization_kwargs"),
        (lambda llm: llm.chat(TALK[0], GREEDY), "messages"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(llm: LLM, call: Callable[[LLM], object], field: str) -> None:
    with pytest.raises(ValidationError) as found:
        call(llm)
    assert found.value.field == field


@pytest.fixture
def heeded() -> Iterator[None]:
    """SIGINT as Python has it, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded")
def test_ctrl_c_in_the_middle_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    core = llm._engine._core
    submit, steps = core._executor.submit, []

    def interrupted(plan: Any) -> Any:
        if steps.append(plan) or len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return submit(plan)

    before = texts(llm, ["a", "b"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(core._executor, "submit", interrupted)
        llm.generate(["a", "b"], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)
    assert len(steps) in (3, 4), "the step was made whole, and the requests were ended in the next one"
    assert not llm._engine.has_work() and not llm._done
    assert texts(llm, ["a", "b"]) == before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_step_that_is_broken_off_is_the_last() -> None:
    with LLM(**SETTINGS) as llm:

        def broken(plan: Any) -> Any:
            raise KeyboardInterrupt

        llm._engine._core._executor.submit = broken  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            texts(llm, "a")
        with pytest.raises(EngineDeadError, match="Make a new one"):
            texts(llm, "a")


def test_threads_take_turns(llm: LLM) -> None:
    alone = {name: texts(llm, [name, name + " b"]) for name in "abcdef"}
    found: dict[str, list[str]] = {}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: texts(llm, [name, name + " b"])}))
        for name in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == alone
    assert not llm._done


def test_it_is_not_copied(llm: LLM) -> None:
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            copied(llm)


def test_a_fork_has_no_model(llm: LLM) -> None:
    child = os.fork()
    if child == 0:
        try:
            texts(llm, "a")
        except EngineDeadError as error:
            os._exit(7 if "forked" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert texts(llm, "a")


def test_two_at_once_and_use_after_the_end(llm: LLM) -> None:
    with LLM(**SETTINGS) as other:
        assert texts(other, "a") == texts(llm, "a")
    other.close()
    for use in (lambda: texts(other, "a"), lambda: other.chat(TALK, GREEDY), lambda: other.enqueue("a")):
        with pytest.raises(EngineDeadError, match="closed"):
            use()
    assert texts(llm, "a")

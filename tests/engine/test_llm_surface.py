"""The methods of LLM that users of other engines know: their arguments, and what is said of those that are not here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from quire import LLM, EngineOptions, SamplingParams
from quire.engine.outputs import RequestOutput
from quire.errors import NoSuchMethodError, ValidationError
from quire.llm import NOT_HERE

SETTINGS = {"device": "cpu", "threads": 1, "kv_cache_memory_bytes": 1 << 26, "max_model_len": 128, "max_num_seqs": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=6)
TALK = [{"role": "user", "content": "Tell me a story."}]
ARGUMENTS = {
    "generate": "prompts sampling_params use_tqdm lora_request priority tokenization_kwargs mm_processor_kwargs",
    "enqueue": "prompts sampling_params lora_request priority tokenization_kwargs mm_processor_kwargs",
    "wait_for_completion": "output_type use_tqdm",
    "chat": "messages sampling_params use_tqdm lora_request priority chat_template chat_template_content_format "
    "add_generation_prompt continue_final_message tools chat_template_kwargs tokenization_kwargs mm_processor_kwargs",
    "enqueue_chat": "messages sampling_params priority chat_template",
    "beam_search": "prompts params lora_request use_tqdm concurrency_limit",
    "get_tokenizer": "",
    "get_default_sampling_params": "",
    "get_world_size": "include_dp",
    "get_metrics": "",
    "reset_prefix_cache": "",
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS) as made:
        yield made


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_arguments_have_their_names(name: str) -> None:
    known = list(inspect.signature(getattr(LLM, name)).parameters)
    assert set(ARGUMENTS[name].split()) <= set(known)
    positional = {"chat": ARGUMENTS["chat"].split()[:6], "beam_search": ["prompts", "params", "lora_request"]}
    for place, argument in enumerate(positional.get(name, [])):
        assert known[1 + place] == argument


@pytest.mark.parametrize("name", NOT_HERE)
def test_what_is_not_here_says_so(llm: LLM, name: str) -> None:
    with pytest.raises(NoSuchMethodError, match=f"LLM.{name} does not exist"):
        getattr(llm, name)("a")
    assert not hasattr(llm, name)


def test_a_misspelt_method_is_an_attribute_error(llm: LLM) -> None:
    with pytest.raises(AttributeError, match="generat"):
        llm.generat("a")  # type: ignore[attr-defined]


def test_what_is_enqueued_comes_in_its_order(llm: LLM) -> None:
    wanted = llm.generate(["Once", "The old man", "It was"], GREEDY, use_tqdm=False)
    first = llm.enqueue(["Once", "The old man"], GREEDY)
    between = llm.generate("It was", GREEDY, use_tqdm=False)  # runs beside them, and takes none of their outputs
    second = llm.enqueue("It was", GREEDY)
    outputs = llm.wait_for_completion(RequestOutput, use_tqdm=False)
    assert [output.request_id for output in outputs] == first + second
    assert [output.outputs[0].token_ids for output in outputs] == [output.outputs[0].token_ids for output in wanted]
    assert between[0].outputs[0].text == wanted[2].outputs[0].text
    assert llm.wait_for_completion() == [] and not llm._done
    talk = llm.chat(TALK, GREEDY, use_tqdm=False)[0]
    llm.enqueue_chat([TALK, TALK], GREEDY)
    assert [found.outputs[0].text for found in llm.wait_for_completion(use_tqdm=False)] == [talk.outputs[0].text] * 2


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"lora_request": "x"}, "lora_request"),
        ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
        ({"tokenization_kwargs": {"truncation": True}}, "tokenization_kwargs"),
    ],
)
def test_arguments_that_cannot_be_honoured(llm: LLM, values: dict[str, Any], field: str) -> None:
    for call in (lambda: llm.generate("a", GREEDY, **values), lambda: llm.chat(TALK, GREEDY, **values)):
        with pytest.raises(ValidationError) as caught:
            call()
        assert caught.value.field == field
    with pytest.raises(ValidationError, match="output_type"):
        llm.wait_for_completion(dict)


def test_special_tokens_can_be_left_out(llm: LLM) -> None:
    plain = llm.generate("Once", GREEDY, tokenization_kwargs={"add_special_tokens": False}, use_tqdm=False)[0]
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None and plain.prompt_token_ids == tokenizer.encode("Once", add_special_tokens=False)


def test_from_engine_args() -> None:
    with LLM.from_engine_args(EngineOptions.from_flat(SETTINGS)) as made:
        assert made.get_world_size() == 1
        assert made.generate("Once", GREEDY, use_tqdm=False)[0].outputs[0].token_ids

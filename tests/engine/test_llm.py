"""LLM on a tiny real model: prompt forms, order, parameters, chat, the progress bar, and every kind of bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import VOCAB, write_tiny
from tqdm import tqdm

from quire import LLM, SamplingParams
from quire.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
    ValidationError,
)

SMALL = {"max_model_len": 64, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 24, "device": "cpu", "threads": 1}
GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny(tmp_path_factory.mktemp("llm") / "tiny", "llama")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9], "temperature": 0.6, "top_k": 7}))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), **SMALL) as made:
        yield made


def generate(llm: LLM, prompts, params=GREEDY):
    return llm.generate(prompts, params, use_tqdm=False)


# ---------------------------------------------------------------- what works


def test_results_come_in_the_order_of_the_prompts(llm):
    prompts = [f"{'word ' * index}?" for index in range(12)]
    lengths = [12 - index for index in range(12)]
    params = [SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True) for most in lengths]
    outputs = generate(llm, prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert [int(output.request_id) for output in outputs] == sorted(int(output.request_id) for output in outputs)


def test_every_form_of_a_prompt(llm):
    text = "Once upon a time"
    ids = llm.get_tokenizer().encode(text)
    expected = generate(llm, text)[0].outputs[0].token_ids
    forms = [ids, {"prompt": text}, {"prompt_token_ids": ids}, {"prompt_token_ids": ids, "prompt": "shown"}]
    for form in forms:
        assert generate(llm, form)[0].outputs[0].token_ids == expected
    together = generate(llm, [text, *forms])
    assert [output.outputs[0].token_ids for output in together] == [expected] * 5
    assert [output.prompt for output in together] == [text, None, text, None, "shown"]
    assert generate(llm, []) == []


def test_defaults_come_from_the_generation_config(llm):
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.max_tokens) == (0.6, 7, 16)
    prepared = llm._prepare(["x", "y"], None, None, special=True)
    assert [item.params.temperature for item in prepared] == [0.6, 0.6]
    # One's own parameters are not mixed with them, but the ids that end a text count always.
    own = llm._prepare(["x"], SamplingParams(), None, special=True)[0].params
    assert (own.temperature, own.top_k, own.eos_token_ids) == (1.0, 0, (2, 9))


def test_generation_config_can_be_ignored(folder):
    with LLM(str(folder), generation_config="vllm", **SMALL) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


def test_a_seed_makes_a_request_repeatable(llm):
    params = SamplingParams(temperature=1.0, max_tokens=8, seed=4, ignore_eos=True)
    first, second = generate(llm, "a b c", params)[0], generate(llm, "a b c", params)[0]
    other = generate(llm, "a b c", SamplingParams(temperature=1.0, max_tokens=8, seed=5, ignore_eos=True))[0]
    assert first.outputs[0].token_ids == second.outputs[0].token_ids != other.outputs[0].token_ids


def test_n_gives_different_children_and_each_is_a_seed_of_its_own(llm):
    wish = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    output = generate(llm, "a b c", SamplingParams(n=3, seed=10, **wish))[0]
    texts = [tuple(item.token_ids) for item in output.outputs]
    assert len(set(texts)) == 3
    for index, expected in enumerate(texts):
        alone = generate(llm, "a b c", SamplingParams(seed=10 + index, **wish))[0]
        assert tuple(alone.outputs[0].token_ids) == expected


def test_chat_uses_the_template(llm):
    talk = [{"role": "user", "content": "hi"}]
    output = llm.chat(talk, GREEDY, use_tqdm=False)[0]
    assert output.prompt == "user: hi\nassistant: "
    two = llm.chat([talk, [*talk, {"role": "assistant", "content": "yes"}]], GREEDY, use_tqdm=False)
    assert [item.prompt for item in two] == ["user: hi\nassistant: ", "user: hi\nassistant: yes\nassistant: "]
    own = llm.chat(talk, GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}!")[0]
    assert own.prompt == "hi!"


def test_logprobs_of_prompt_and_output(llm):
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    output = generate(llm, [5, 6, 7, 8], params)[0]
    assert output.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in output.prompt_logprobs[1:]] == [6, 7, 8]
    completion = output.outputs[0]
    assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids
    # Greedy: the chosen token is the best one, so it stands there once.
    assert all(len(entry) == 2 and next(iter(entry.values())).rank == 1 for entry in completion.logprobs)


def test_prompt_logprobs_do_not_depend_on_chunks(folder, llm):
    prompt = list(range(10, 50))
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=2, ignore_eos=True)
    whole = generate(llm, prompt, params)[0].prompt_logprobs
    with LLM(str(folder), **{**SMALL, "max_num_batched_tokens": 8, "max_num_seqs": 2}) as chunked:
        assert generate(chunked, prompt, params)[0].prompt_logprobs == whole
    assert len(whole) == 40
    # What is cached has no log-probabilities, so it is not read when they are asked for.
    assert generate(llm, prompt, params)[0].prompt_logprobs == whole


def test_the_progress_bar_counts_prompts_and_speed(llm):
    written = io.StringIO()
    bars = []

    def bar(**settings) -> tqdm:
        bars.append(tqdm(file=written, **settings))
        return bars[0]

    llm.generate(["a", "b", "c"], GREEDY, use_tqdm=bar)
    assert (bars[0].n, bars[0].total) == (3, 3)
    assert "est. speed input:" in written.getvalue() and "toks/s, output:" in written.getvalue()


def test_an_interrupted_run_leaves_nothing_behind(llm):
    def interrupt(**settings):
        made = tqdm(disable=True, **settings)
        made.update = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        return made

    params = [GREEDY, SamplingParams(max_tokens=50, ignore_eos=True)]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], params, use_tqdm=interrupt)
    assert not llm._engine.has_work()
    assert len(generate(llm, "a")) == 1


def test_the_prefix_cache_can_be_reset(llm):
    prompt = list(range(10, 50))
    generate(llm, prompt)
    assert generate(llm, prompt)[0].num_cached_tokens == 32
    assert llm.reset_prefix_cache() is True
    assert generate(llm, prompt)[0].num_cached_tokens == 0


def test_metrics_count_when_asked_to(folder, llm):
    with LLM(str(folder), disable_log_stats=False, **SMALL) as counting:
        output = generate(counting, "a b c", SamplingParams(max_tokens=4, ignore_eos=True, n=2))[0]
        found = {
            item.name: item for item in counting.get_metrics() if not getattr(item, "labels", {}).get("finished_reason")
        }
    assert output.metrics.num_generation_tokens == 8
    assert output.metrics.arrival_time > 0 < output.metrics.first_token_latency
    assert found["quire:generation_tokens"].value == 8
    assert found["quire:time_to_first_token_seconds"].count == 2
    assert found["quire:num_requests_running"].value == 0
    assert generate(llm, "a")[0].metrics is None
    with pytest.raises(ConfigError, match="disable_log_stats"):
        llm.get_metrics()


def test_without_tokenizer(folder):
    with LLM(str(folder), skip_tokenizer_init=True, **SMALL) as llm:
        assert llm.get_tokenizer() is None
        output = generate(llm, [[5, 6]])[0]
        assert output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 5
        with pytest.raises(ValidationError, match="needs a tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}])
        with pytest.raises(ValidationError, match="prompt_token_ids"):
            generate(llm, "text")


def test_options_of_other_engines_that_change_nothing(folder):
    with LLM(str(folder), enforce_eager=True, tokenizer_mode="auto", **SMALL) as llm:
        assert len(generate(llm, "a")) == 1
    with pytest.raises(ConfigError, match="cpu_offload_gb is 4"):
        LLM(str(folder), cpu_offload_gb=4)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        (["fine", ""], GREEDY, "cannot be empty"),
        ([[VOCAB + 5]], GREEDY, "out of vocabulary"),
        (["fine", "x " * 100], GREEDY, "longer than the maximum model length of 64"),
        (["a", "b"], [GREEDY], r"prompts \(2\) and sampling_params \(1\)"),
        (["a"], [{"temperature": 1}], "must be SamplingParams"),
        ([3.5], GREEDY, "must be a string, a list of token ids"),
    ],
)
def test_one_wrong_request_starts_none(llm, prompts, params, message):
    with pytest.raises(ValidationError, match=message):
        generate(llm, prompts, params)
    assert not llm._engine.has_work()


def test_priorities_must_be_as_many_as_prompts(llm):
    with pytest.raises(ValidationError, match="priority"):
        llm.generate(["a"], GREEDY, use_tqdm=False, priority=[1, 2])


def test_an_unknown_option_names_the_nearest(folder):
    with pytest.raises(ConfigError, match="Did you mean 'max_model_len'"):
        LLM(str(folder), max_modl_len=5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_model_len": 100_000}, ConfigError, "longest context is 512"),
        ({"gpu_memory_utilization": 1.5}, ConfigError, "share of the memory"),
        ({"kv_cache_memory_bytes": 1000}, CapacityError, "needs"),
        ({"quantization": "int3"}, ConfigError, "quantiz"),
        ({"tensor_parallel_size": 2}, ConfigError, "one device"),
        ({"max_num_seqs": 0}, ConfigError, "at least 1"),
        ({"generation_config": "/nowhere"}, ConfigError, "generation_config"),
        ({"override_generation_config": {"temperature": 9.0}}, ConfigError, "impossible default"),
    ],
)
def test_impossible_options(folder, options, error, message):
    with pytest.raises(error, match=message):
        LLM(str(folder), **{**SMALL, **options})


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        LLM(str(tmp_path))


def test_an_unknown_architecture(tmp_path):
    path = write_tiny(tmp_path / "odd", "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForWhatever"], "model_type": "whatever"})
    )
    with pytest.raises(UnsupportedModelError, match="whatever"):
        LLM(str(path), **SMALL)


def test_weights_that_are_cut_off(tmp_path):
    path = write_tiny(tmp_path / "cut", "llama")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(path), **SMALL)


def test_weights_in_bfloat16_stay_in_bfloat16(tmp_path):
    path = write_tiny(tmp_path / "half", "llama", dtype=torch.bfloat16)
    with LLM(str(path), **SMALL) as llm:
        assert len(generate(llm, "a")[0].outputs[0].token_ids) == 5


# ---------------------------------------------------------------- the package


def test_what_is_imported_by_name_brings_no_torch():
    code = (
        "import sys; from quire import SamplingParams, RequestOutput, EngineOptions, TextPrompt, AsyncEngine, Engine\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_every_public_name_is_there():
    import quire

    for name in quire.__all__:
        assert getattr(quire, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        _ = quire.LMM

"""What is decided for an engine: each rule's value, and each refusal with what to do about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quire import resolve
from quire.config import EngineOptions
from quire.errors import CapacityError, ConfigError
from quire.layers.spec import LayerSpec, ModelLayout

GIB = 1 << 30
MACHINE = resolve.Machine("cpu", total_memory=8 * GIB, free_memory=6 * GIB, threads=2)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
}
LAYOUT = ModelLayout((LayerSpec("layer", heads=4, kv_heads=2, key_dim=16, value_dim=16),), 512, 64, "A")


@pytest.fixture
def decide(tmp_path: Path) -> Any:
    """resolve() for a small Llama with random weights: decide({changes of its config}, option=value, ...)."""

    def run(changes: dict[str, Any] | None = None, machine: resolve.Machine = MACHINE, **values: Any) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | (changes or {})))
        options = {"model": str(tmp_path), "load_format": "dummy", "skip_tokenizer_init": True, **values}
        return resolve.resolve(EngineOptions.from_flat(options), machine)

    return run


def reasons(config: resolve.EngineConfig) -> dict[str, str]:
    return {rule: reason for rule, _, reason in config.decisions}


def test_everything_open_is_decided(decide: Any, tmp_path: Path) -> None:
    config = decide()
    assert config.device == "cpu"
    assert config.dtype == config.cache_dtype == torch.bfloat16
    assert config.max_model_len == 4096
    assert config.max_num_batched_tokens >= config.max_num_seqs
    assert config.chunked_prefill
    assert config.prefix_caching
    assert config.threads == 2
    assert config.served_model_names == (str(tmp_path),)
    assert [group.kind for group in config.groups] == ["full"]
    assert config.groups[0].num_pages * config.block_size >= config.max_model_len
    assert {"dtype", "max_model_len", "pages", "memory"} <= set(reasons(config))
    assert all(reason for reason in reasons(config).values())


def test_weights_and_pages_stay_in_the_memory(decide: Any) -> None:
    config = decide()
    # Embedding and head are tied, but the head is packed for its own product.
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert config.memory.weights == 2 * (2 * 512 * 64 + 2 * layer + 64)
    assert config.memory.weights + config.memory.activations + config.memory.pages <= MACHINE.free_memory


def test_wishes_are_granted(decide: Any) -> None:
    config = decide(
        dtype="float32",
        max_model_len=100,
        block_size=32,
        max_num_seqs=3,
        max_num_batched_tokens=17,
        enable_prefix_caching=False,
        async_scheduling=True,
        kv_cache_memory_bytes=1 << 20,
        served_model_name=["a", "b"],
    )
    assert config.dtype == torch.float32
    assert (config.max_model_len, config.block_size, config.max_num_seqs) == (100, 32, 3)
    assert config.max_num_batched_tokens == 17
    assert not config.prefix_caching
    assert config.max_in_flight == 2
    assert config.memory.pages == 1 << 20
    assert config.served_model_names == ("a", "b")
    assert reasons(config)["dtype"] == "as asked"


def test_number_of_pages_for_tests(decide: Any) -> None:
    assert decide(num_gpu_blocks_override=7, max_model_len=64).groups[0].num_pages == 7


# ---------------------------------------------------------------- dtype


@pytest.mark.parametrize(
    ("wanted", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", torch.bfloat16),
        ("auto", torch.float16, "cuda", torch.float16),
        ("auto", torch.float16, "cpu", torch.bfloat16),
        ("auto", torch.float32, "cpu", torch.bfloat16),
        ("auto", None, "cpu", torch.bfloat16),
        ("half", torch.float32, "cpu", torch.float16),
        ("float", torch.bfloat16, "cuda", torch.float32),
    ],
)
def test_dtype(wanted: str, stored: torch.dtype | None, device: str, expected: torch.dtype) -> None:
    assert resolve.choose_dtype(wanted, stored, device).value == expected


# ---------------------------------------------------------------- length


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4096),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 8192),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}},
            16384,
        ),
        (
            {
                "max_position_embeddings": 16384,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 2048,
                },
            },
            16384,
        ),
    ],
)
def test_length_of_the_model(changes: dict[str, Any], expected: int, decide: Any) -> None:
    config = decide(changes)
    assert config.max_model_len == expected


def test_more_than_the_model_can_is_refused(decide: Any) -> None:
    with pytest.raises(ConfigError, match="max_model_len is 5000.*longest context is 4096.*hf-overrides"):
        decide(max_model_len=5000)


def test_more_than_the_memory_holds_is_refused_with_what_fits(decide: Any) -> None:
    per_page = 2 * 16 * 2 * 32 * 2
    with pytest.raises(CapacityError, match="Ask for --max-model-len 144 or auto"):
        decide(kv_cache_memory_bytes=10 * per_page)
    assert decide(kv_cache_memory_bytes=10 * per_page, max_model_len="auto").max_model_len == 144


def test_auto_length_takes_the_models_own_when_it_fits(decide: Any) -> None:
    assert decide(max_model_len=-1).max_model_len == 4096


# ---------------------------------------------------------------- memory


def test_a_model_that_does_not_fit_is_refused(decide: Any) -> None:
    small = replace(MACHINE, free_memory=100_000)
    with pytest.raises(CapacityError, match="for weights and activations.*are free.*Take a smaller model"):
        decide(machine=small)
    with pytest.raises(CapacityError, match="7.00 GiB for the pages that were asked for"):
        decide(kv_cache_memory_bytes=7 * GIB)


def test_share_of_the_memory(decide: Any) -> None:
    half = decide(max_num_seqs=256).memory
    most = decide(gpu_memory_utilization=0.9).memory
    free = MACHINE.free_memory - half.weights - half.activations
    assert half.pages == pytest.approx(free * 0.5, rel=1e-6)
    assert most.pages == pytest.approx(free * 0.9, rel=1e-6)


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0.0"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"block_size": 17}, "multiple of 16"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2.*one device"),
        ({"quantization": "int9"}, "quantization is 'int9'"),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 512}, "max_num_batched_tokens is 512.*4096"),
    ],
)
def test_impossible_options_are_refused(decide: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide(**values)


def test_a_missing_gpu_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match="finds no GPU here.*--device cpu"):
        resolve.choose_device("cuda")


def test_step_tokens_follow_the_prompt_when_it_cannot_be_split() -> None:
    assert resolve.choose_step_tokens(None, "cpu", 16, 4096, chunked=False).value == 4096
    assert resolve.choose_step_tokens(None, "cpu", 2000, 4096, chunked=True).value == 2000
    assert resolve.choose_step_tokens(None, "cuda", 16, 4096, chunked=True).value == 8192


def test_what_a_model_cannot_do_is_switched_off() -> None:
    alone = replace(LAYOUT, batched=False, chunked_prefill=False, prefix_caching=False)
    assert resolve.choose_max_num_seqs(64, alone).value == 1
    assert resolve.choose_chunked(True, alone).value is False
    assert resolve.choose_prefix_caching(True, alone, chunked=True).value is False
    assert resolve.choose_prefix_caching(True, LAYOUT, chunked=False).value is False
    assert resolve.choose_prefix_caching(True, LAYOUT, chunked=True).value is True


def test_the_next_step_is_planned_ahead_on_a_gpu_only() -> None:
    assert resolve.choose_in_flight(None, "cpu").value == 1
    assert resolve.choose_in_flight(None, "cuda").value == 2
    assert resolve.choose_in_flight(True, "cpu").value == 2


def test_decisions_are_logged(decide: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="quire.resolve"):
        decide()
    assert "max_model_len = 4096: the config's max_position_embeddings" in caplog.text

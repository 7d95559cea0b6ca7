"""Our own reader of config.json against the Transformers library's: the same values wherever quire reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quire.config import ModelOptions
from quire.models.files.describe import sampling_defaults, stop_token_ids
from quire.models.files.hub import ModelFiles, find_model
from quire.models.files.native_config import MODEL_TYPES, NativeConfig
from quire.models.native.decoder import native_layout, native_shapes, shape_of
from quire.models.native.frequencies import frequencies_of
from quire.resolve import activation_bytes, checkpoint_dtype, count_parameters, model_length

SMALL = {"vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# As such models are published, sizes apart.
LLAMA_32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 16, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama", "num_key_value_heads": 2,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3, "rope_theta": 500000.0,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.45.0", "use_cache": True,
}  # fmt: skip
LLAMA_2 = {
    "_name_or_path": "somewhere", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 4096, "model_type": "llama", "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "use_cache": True,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2, "rope_theta": 1000000.0,
    "sliding_window": None, "torch_dtype": "bfloat16", "head_dim": 128, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151645, "model_type": "qwen2",
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_mrope": False, "use_sliding_window": False,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "eos_token_id": 151645, "head_dim": 128,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3", "num_key_value_heads": 2,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}  # fmt: skip
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "head_dim": 32, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 48, "norm_topk_prob": True, "num_experts": 4,
    "num_experts_per_tok": 2, "num_key_value_heads": 2, "output_router_logits": False, "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001, "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
LONG = {"long_factor": [2.0 + i for i in range(8)], "short_factor": [1.0 + i / 9 for i in range(8)]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

CASES: dict[str, dict[str, Any]] = {
    "llama 3.2": LLAMA_32,
    "llama 2": LLAMA_2,
    "llama, type alone": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "llama, as written by a newer library": {
        **LLAMA_32,
        "rope_scaling": None,
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
        "dtype": "float32",
    },
    "llama, older spelling": {**LLAMA_2, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 12345},
    "llama, dynamic": {**LLAMA_2, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
    "llama, longrope": {**LLAMA_2, "rope_scaling": {"type": "su", **LONG}},
    "llama, longrope with all its fields": {
        **LLAMA_2,
        "rope_scaling": {"rope_type": "longrope", **LONG, "factor": 8.0, "original_max_position_embeddings": 512},
    },
    "llama, longrope, its scaling given": {
        **LLAMA_2,
        "rope_scaling": {"rope_type": "longrope", **LONG, "attention_factor": 1.25},
    },
    "mistral": MISTRAL,
    "mistral, windows": {**MISTRAL, "sliding_window": 24, "rope_theta": 10000.0, "head_dim": None},
    "mistral, type alone": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "qwen2": QWEN2,
    "qwen2, windows": {**QWEN2, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen2, yarn": {**QWEN2, "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "qwen3": QWEN3,
    "qwen3, type alone": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "qwen3, yarn": {**QWEN3, "rope_scaling": YARN, "max_position_embeddings": 131072},
    "qwen3, yarn with all its fields": {
        **QWEN3,
        "rope_scaling": {
            **YARN, "beta_fast": 24, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False
        },
    },
    "qwen3, yarn, its scaling given": {**QWEN3, "rope_scaling": {**YARN, "attention_factor": 1.5}},
    "qwen3, layer types": {
        **QWEN3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 24,
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe, some dense, windows": {
        **QWEN3_MOE,
        "mlp_only_layers": [0],
        "decoder_sparse_step": 2,
        "use_sliding_window": True,
        "sliding_window": 24,
    },
    "qwen3_moe, type alone": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4},
}  # fmt: skip


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelFiles:
    (folder / "config.json").write_text(json.dumps({**SMALL, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return find_model(ModelOptions(model=str(folder), load_format="dummy"))


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_of_the_library(case: str, tmp_path: Path) -> None:
    files = read(tmp_path, CASES[case])
    ours, theirs = files.config, files.library_config
    assert isinstance(ours, NativeConfig) and not isinstance(theirs, NativeConfig)
    name = files.architecture
    assert ours.architectures == theirs.architectures == [name] and ours.name_or_path == theirs.name_or_path
    assert ours.model_type == theirs.model_type and ours.rope_parameters == theirs.rope_parameters
    assert shape_of(name, ours) == shape_of(name, theirs)
    assert native_layout(name, ours) == native_layout(name, theirs)
    assert [ours.to_dict()[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")] == [
        getattr(theirs, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")
    ]
    assert stop_token_ids({}, ours) == stop_token_ids({}, theirs)
    options = ModelOptions()
    assert sampling_defaults({}, ours, options) == sampling_defaults({}, theirs, options)


@pytest.mark.parametrize("case", CASES)
def test_what_is_decided_from_them_is_the_same(case: str, tmp_path: Path) -> None:
    ours = read(tmp_path, CASES[case])
    theirs = replace(ours, config=ours.library_config)
    layout = native_layout(ours.architecture, ours.config)
    assert model_length(ours) == model_length(theirs)
    assert checkpoint_dtype(ours) is checkpoint_dtype(theirs)
    sizes = [activation_bytes(files, layout, torch.bfloat16, 64, 8) for files in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert (
        count_parameters(ours)
        == count_parameters(theirs)
        == sum(torch.Size(shape).numel() for shape in native_shapes(ours).values())
    )


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_the_library_bit_for_bit(case: str, tmp_path: Path) -> None:
    files = read(tmp_path, CASES[case])
    config = files.library_config
    size = files.config.head_dim
    config.head_dim = size  # the library reads it from there
    found = frequencies_of(files.config, size)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        expected, scaling = (
            1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2).float() / size)),
            1.0,
        )
    else:
        expected, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    assert torch.equal(found.inverse, expected) and found.scaling == scaling
    assert (found.threshold is not None) == (kind in ("dynamic", "longrope"))
    if found.threshold is not None and found.beyond is not None:
        for length in (found.threshold, found.threshold + 1, 3 * found.threshold):
            assert torch.equal(
                found.beyond(length), ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)[0]
            )


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "proportional", "factor": 2.0}},
        {"rope_scaling": {**YARN, "new_field": 1.0}},
        {"partial_rotary_factor": 0.5},
        {"use_mrope": True},
        {"attention_multiplier": 2.0},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen2"},
        {"architectures": ["Qwen3ForCausalLM", "Other"]},
        {"rms_norm_eps": 1},
        {"max_sequence_length": 1024},
    ],
)
def test_what_is_not_certain_is_read_by_the_library(change: dict[str, Any], tmp_path: Path) -> None:
    try:
        files = read(tmp_path, {**QWEN3, **change})
    except Exception as error:
        assert "transformers" in str(error)  # its own message
    else:
        assert not isinstance(files.config, NativeConfig)


def test_every_native_family_has_cases() -> None:
    assert {case["architectures"][0] for case in CASES.values()} == set(MODEL_TYPES)

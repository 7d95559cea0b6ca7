"""The native decoder against the library's own generate: same weights, greedy, float32, same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, write_tiny
from transformers import AutoModelForCausalLM

from quire.config import ModelOptions
from quire.errors import UnsupportedModelError
from quire.kernels import reference
from quire.kernels.table import Ops, load_ops, ops_of
from quire.models.files.hub import ModelFiles, find_model
from quire.models.native.decoder import FAMILIES, NativeDecoder, frequencies_of, native_layout, shape_of
from quire.models.twin.trial import PagedLoop, Sequence

CPU = torch.device("cpu")
NEW = 12
LENGTHS = (37, 5, 22)
CHUNKS = (7, 1, 13, 3)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama gelu, one kv head": ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "yarn rope": ("llama", {"rope_parameters": YARN}),
    "linear rope": ("llama", {"rope_parameters": LINEAR, "max_position_embeddings": 24}),
    "dynamic rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "longrope": ("llama", {"rope_parameters": LONG, "max_position_embeddings": 96}),
    "mistral, all windows": ("mistral", {"sliding_window": 9}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, tied": ("qwen2", {}),
    "qwen2, some windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3 with biases": ("qwen3", {"attention_bias": True, "rope_parameters": YARN}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe, windows, weights as they are": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 9, "norm_topk_prob": False, "mlp_only_layers": []},
    ),
}


def prompts(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def find(folder: Path) -> ModelFiles:
    return find_model(ModelOptions(model=str(folder)))


def build(folder: Path, ops: Ops, dtype: torch.dtype = torch.float32) -> NativeDecoder:
    files = find(folder)
    model = NativeDecoder(files, dtype, CPU, ops)
    model.load(files, seed=0)
    return model


def expected_tokens(folder: Path, prompt: list[int]) -> list[int]:
    """What the library generates for one prompt alone. A fresh model each time: dynamic ropes keep state in it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=-1)
    return out[0, len(prompt) :].tolist()


def run(loop: PagedLoop, sequences: list[Sequence], until: dict[int, int]) -> None:
    """Greedy steps of all sequences together, prompts in odd chunks, until each has its number of tokens."""
    turn = 0
    while True:
        work = []
        for sequence in sequences:
            left = len(sequence.tokens) - sequence.computed
            if left and len(sequence.tokens) < until[sequence.slot]:
                work.append((sequence, min(left, CHUNKS[(turn + sequence.slot) % len(CHUNKS)])))
        if not work:
            return
        for (sequence, _), logits in zip(work, loop.step(work), strict=True):
            if sequence.computed == len(sequence.tokens):
                sequence.tokens.append(int(logits[-1].argmax()))
        turn += 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("case", CASES)
def test_same_tokens_as_generate(case: str, backend: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    folder = write_tiny(tmp_path, family, tokenizer=False, **changes)
    ops = ops_of(reference) if backend == "reference" else load_ops("cpu")
    model = build(folder, ops)
    loop = PagedLoop(model, ops)
    sequences = [loop.start(slot, prompt) for slot, prompt in enumerate(prompts())]
    run(loop, sequences, {s.slot: s.prompt_length + NEW for s in sequences})
    for sequence in sequences:
        expected = expected_tokens(folder, sequence.tokens[: sequence.prompt_length])
        assert sequence.tokens[sequence.prompt_length :] == expected, f"prompt of {sequence.prompt_length}"


@pytest.mark.parametrize("case", ["llama", "mistral, all windows", "qwen3_moe", "dynamic rope"])
def test_same_tokens_after_a_prefix_hit_and_a_preemption(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    folder = write_tiny(tmp_path, family, tokenizer=False, **changes)
    ops = load_ops("cpu")
    model = build(folder, ops)
    loop = PagedLoop(model, ops)
    first, second = prompts(1, (40, 30))
    shared = 0 if not model.layout.prefix_caching else 16
    one = loop.start(0, first)
    run(loop, [one], {0: 44})
    two = loop.start(1, first[:shared] + second)
    if shared:
        loop.adopt(two, one, shared)
    run(loop, [one, two], {0: 47, 1: two.prompt_length + 5})
    loop.preempt(one)
    run(loop, [one, two], {0: 40 + NEW, 1: two.prompt_length + NEW})
    for sequence in (one, two):
        expected = expected_tokens(folder, sequence.tokens[: sequence.prompt_length])
        assert sequence.tokens[sequence.prompt_length :] == expected


def test_bfloat16_stays_near_the_library(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen3", tokenizer=False)
    ops = load_ops("cpu")
    model = build(folder, ops, torch.bfloat16)
    loop = PagedLoop(model, ops, dtype=torch.bfloat16)
    prompt = prompts()[0]
    ours = loop.step([(loop.start(0, prompt), len(prompt))], all_rows=True)[0]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([prompt])).logits[0]
    in_bfloat = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(torch.tensor([prompt]))
    error, usual = (ours - theirs).norm(), (in_bfloat.logits[0].float() - theirs).norm()
    assert error < 1.5 * usual, (error, usual)


def test_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen3_moe", tokenizer=False)
    ops = load_ops("cpu")
    model = build(folder, ops, torch.bfloat16)
    prompt = prompts()[0]
    whole = PagedLoop(model, ops, dtype=torch.bfloat16)
    alone = whole.step([(whole.start(0, prompt), len(prompt))], all_rows=True)[0]
    loop = PagedLoop(model, ops, dtype=torch.bfloat16)
    one, others = loop.start(0, prompt), [loop.start(i, p) for i, p in enumerate(prompts(3, (12, 30, 14)), 1)]
    pieces = []
    for count in (5, 1, 17, 14):
        work = [(other, 3) for other in others[:2]] + [(one, count)] + [(others[2], 1)]
        pieces.append(loop.step(work, all_rows=True)[2])
    assert torch.equal(torch.cat(pieces), alone)


def test_layout_follows_the_config() -> None:
    layout = native_layout("MistralForCausalLM", tiny_config("mistral", sliding_window=9))
    assert {layer.window for layer in layout.layers} == {9} and layout.layers[0].kv_heads == 2
    mixed = tiny_config("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1)
    layout = native_layout("Qwen2ForCausalLM", mixed)
    assert [(layer.window, layer.group) for layer in layout.layers] == [(None, 0), (9, 1), (9, 1)]
    assert layout.prefix_caching and layout.tier == "native"
    dynamic = tiny_config("llama", rope_parameters=DYNAMIC)
    assert not native_layout("LlamaForCausalLM", dynamic).prefix_caching


def test_what_the_native_decoder_cannot_compute() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no activation 'mish'.*--model-impl transformers"):
        shape_of("LlamaForCausalLM", tiny_config("llama", hidden_act="mish"))
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match=r"rope type 'spiral' is unknown.*--hf-overrides"):
        frequencies_of(config, 8)


def test_every_family_has_a_case() -> None:
    assert {tiny_config(family).model_type for family, _ in CASES.values()} == {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
    }
    assert len(FAMILIES) == 5

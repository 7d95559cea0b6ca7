"""Quantizing while loading: both paths, merged siblings and experts, what stays as it is, memory, and the quality left."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

from quire.cli.compare import compare, run_served
from quire.cli.verify import VerifyOptions
from quire.config import EngineOptions
from quire.errors import ConfigError
from quire.kernels.reference import PackedLinear
from quire.kernels.rounding import restored, round_to_bytes, round_to_nibbles
from quire.kernels.table import load_ops
from quire.models.build import build_model
from quire.quant.format import quantized_ops
from quire.quant.int4 import group_for
from quire.resolve import EngineConfig, check_quantized_device, resolve
from quire.text.tokenizer import load_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "src" / "quire" / "bundled" / "model"
BUNDLED_VOCAB, BUNDLED_SIZE = 4096, 256

TEXTS = (
    "The old miller had a daughter who was kind and clever. One evening, when the sun had gone down behind the hill, "
    "she heard a knock at the door. 'Who is there?' she asked. 'It is only a poor soldier,' answered a voice, 'and I "
    "have had nothing to eat for three days.' She opened the door and gave him bread and milk. When he had eaten, he "
    "looked at her for a long time and said that he would never forget her kindness, and then he went out into the "
    "night. In the morning she went to the window, and there, upon the table, lay a golden ring.",
    "There was once a king who had three sons. The two elder were proud and strong, but the youngest was so quiet that "
    "everybody called him the simpleton. When the king grew old and weak, he called them to his bed and said: 'Whoever "
    "brings me the water of life shall have my kingdom when I am dead.' So the eldest rode away upon a white horse, and "
    "on the road he met a little old man with a grey beard, who asked him: 'Where are you going so fast?' 'What is that "
    "to you?' said the prince, and rode on without looking round. But the little man grew angry and wished him ill, and "
    "soon the way between the mountains became so narrow that the horse could go neither forward nor back.",
    "A fox went through the forest one cold winter day, and he was very hungry. At last he came to a house at the edge "
    "of the wood, where an old woman kept a cock and seven hens. 'Good morning, mother,' said the fox. 'Let me come in "
    "and warm myself at your fire.' 'No, no,' said the old woman, 'I know you well enough; yesterday you ate my "
    "neighbour's goose, and tomorrow you would eat my hens.' Then the fox lay down in the snow before the door and "
    "waited till it was dark. But the dog had heard every word, and when the fox put his nose in at the window, he "
    "caught him by the ear and did not let him go until he had promised never to come back.",
)


@cache
def perplexity_of(model: str, method: str | None, dtype: str) -> float:
    """Of all texts, each token given those before it."""
    options = EngineOptions.from_flat({"model": model, "quantization": method, "dtype": dtype, "max_model_len": 512})
    config = resolve(options)
    logits, ids = logits_of(config)
    losses = [
        torch.nn.functional.cross_entropy(one[:-1], torch.tensor(tokens[1:]), reduction="sum")
        for one, tokens in zip(logits, ids, strict=True)
    ]
    return math.exp(torch.stack(losses).sum().item() / sum(len(tokens) - 1 for tokens in ids))


def logits_of(config: EngineConfig) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The logits of all positions of each text, and its tokens."""
    tokenizer = load_tokenizer(config.files.tokenizer)
    ids = [tokenizer.encode(text) for text in TEXTS]
    served = build_model(config.files, config.options.model, config.dtype, torch.device("cpu"), load_ops("cpu"))
    return run_served(served, config, ids, None).logits, ids


# ---------------------------------------------------------------- quality


@pytest.mark.parametrize(
    ("method", "most"),
    [
        ("int8", 0.01),
        ("int4-g32", 0.04),
        ("int4", 0.06),
        ("int4-g128-int8-head", 0.04),
        ("int4-g32-zp", 0.04),
        ("int4-zp", 0.06),
    ],
)
def test_the_bundled_model_keeps_its_sense(method: str, most: float) -> None:
    plain = perplexity_of(str(BUNDLED), None, "bfloat16")
    assert perplexity_of(str(BUNDLED), method, "bfloat16") < plain * (1 + most)


def test_float32_activations_are_fine_too() -> None:
    assert perplexity_of(str(BUNDLED), "int8", "float32") < perplexity_of(str(BUNDLED), None, "float32") * 1.01


@pytest.mark.parametrize("method", ["int8", "int4-g32"])
def test_verify_shows_the_divergence(method: str) -> None:
    """`quire verify` with a method compares with the unquantized weights, by the tolerances of that method."""
    options = EngineOptions.from_flat({"model": str(BUNDLED), "quantization": method, "dtype": "bfloat16"})
    report = compare(options, VerifyOptions(), TEXTS[:1])
    assert 1e-4 < report.mean_kl < report.kl_tolerance
    assert report.passed
    assert report.dtype == f"bfloat16 with {method} weights"


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_search_beats_plain_rounding(group: int, zero_points: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(64, 256).pow(3) * 0.01
    error = (restored(round_to_nibbles(weight, group, zero_points)) - weight).square().mean()
    groups = weight.view(64, -1, group)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15 if zero_points else torch.maximum(high, -low) / 7
    zero = (-low / scale).round() if zero_points else 8
    plain = (((groups / scale).round() + zero).clamp(0, 15) - zero) * scale
    assert error < 0.98 * (plain.view_as(weight) - weight).square().mean()


def test_rounding_leaves_the_weight_alone_and_keeps_zeros() -> None:
    """The weight may be a view of a mapped file that an embedding shares."""
    weight = torch.randn(40, 70)
    weight[3] = 0
    before = weight.clone()
    eight, four = round_to_bytes(weight), round_to_nibbles(weight, 32, True)
    assert torch.equal(weight, before)
    assert not eight.values[3].any() and not restored(four)[3].any()
    assert (eight.values.float() * eight.scales - weight).abs().max() <= weight.abs().max() / 254 * 1.01
    assert (restored(four) - weight).abs().max() < 0.5


def test_group_sizes_follow_the_width() -> None:
    assert [group_for(k, None) for k in (256, 192, 96, 100)] == [128, 64, 32, 32]
    assert group_for(192, 128) == 128


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("kind", "method"),
    [("qwen3", "int8"), ("qwen2", "int4-zp"), ("qwen2", "int8-keep-head"), ("qwen3_moe", "int4-g32")],
)
def test_both_paths_give_the_same_logits(tmp_path: Path, kind: str, method: str) -> None:
    """Merged siblings, tied heads and stacked experts, on the native path and on the library's own code."""
    folder = write_tiny(tmp_path, kind)
    found = []
    for impl in ("native", "transformers"):
        values = {"model": str(folder), "quantization": method, "dtype": "float32", "model_impl": impl}
        found.append(logits_of(resolve(EngineOptions.from_flat(values)))[0][0])
    assert torch.isfinite(found[0]).all()
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=0.02 * found[0].abs().max().item())


def test_what_is_quantized_and_what_is_not(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen3_moe")
    served = {}
    for method in ("int4-g32", "int4-g32-int8-head", "int4-g32-keep-head"):
        config = resolve(
            EngineOptions.from_flat({"model": str(folder), "quantization": method, "model_impl": "native"})
        )
        served[method] = build_model(
            config.files, config.options.model, config.dtype, torch.device("cpu"), load_ops("cpu")
        )
    decoder = served["int4-g32"]
    expert = decoder.layers[0].mlp
    assert isinstance(expert.router.packed, PackedLinear)
    for linear in (decoder.layers[0].qkv, decoder.layers[1].mlp.down, expert.experts.blocks[0].gate_up):
        assert load_ops("cpu").unpack_quantized(linear.packed).bits == 4
    heads = {name: found.head.packed for name, found in served.items()}
    assert load_ops("cpu").unpack_quantized(heads["int4-g32"]).bits == 4
    assert load_ops("cpu").unpack_quantized(heads["int4-g32-int8-head"]).bits == 8
    assert isinstance(heads["int4-g32-keep-head"], PackedLinear)
    assert decoder.embedding.weight.dtype == torch.bfloat16


def test_unpacking_gives_the_weight_that_is_multiplied() -> None:
    weight = torch.randn(48, 64)
    for method in ("int8", "int4-g32", "int4-g64-zp"):
        ops = quantized_ops(load_ops("cpu"), method)
        packed = ops.pack_linear(weight, None)
        back = ops.unpack_linear(packed)
        assert (back - weight).norm() < (0.01 if method == "int8" else 0.15) * weight.norm()
        # Rows of the unit matrix are rounded without loss, so the product shows the columns.
        torch.testing.assert_close(ops.linear(torch.eye(64), packed).T, back, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- deciding


def test_the_plan_counts_fewer_bytes() -> None:
    def weights(method: str | None) -> int:
        return resolve(EngineOptions.from_flat({"model": str(BUNDLED), "quantization": method})).memory.weights

    methods = (None, "int8", "int4-g32", "int4-g32-keep-head", "int4-g32-int8-head")
    plain, eight, four, kept, head = (weights(method) for method in methods)
    table = 2 * BUNDLED_VOCAB * BUNDLED_SIZE
    assert table + (plain - 2 * table) // 2 <= eight < 0.8 * plain  # the embedding stays, the tied head is halved
    assert four < head < eight and head < kept < plain


def test_methods_that_do_not_exist_are_refused() -> None:
    for wrong, hint in (
        ("int9", "int8"),
        ("int8-int8-head", "int8"),
        ("int4-g16", "int4-g"),
        ("awq", "has no quantization_config"),
    ):
        with pytest.raises(ConfigError, match=f"quantization is '{wrong}'.*{hint}"):
            resolve(EngineOptions.from_flat({"model": str(BUNDLED), "quantization": wrong}))


def test_only_the_cpu_multiplies_quantized_weights() -> None:
    check_quantized_device(None, "cuda")
    with pytest.raises(ConfigError, match="on the CPU only"):
        check_quantized_device("int8", "cuda")

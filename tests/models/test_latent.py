"""Latent attention: one latent for all heads in the pages, proved equal, the same bits however a prompt is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import tiny_model, write_tiny
from torch import nn
from transformers.models.youtu import modeling_youtu

from quire import LLM, SamplingParams
from quire.config import ModelOptions
from quire.kernels.rounding import restored
from quire.kernels.table import load_ops
from quire.layers.latent import LatentProjection
from quire.models.build import build_model
from quire.models.files.hub import find_model
from quire.models.served import ServedModel
from quire.models.twin.trial import PagedLoop
from quire.quant.checkpoints import Scheme, StoredWeight

CPU = torch.device("cpu")
PROMPT = [5 + (17 * place) % 300 for place in range(70)]
RANK, ROPE = 16, 8  # of the tiny youtu


@pytest.fixture(autouse=True)
def own_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def build(folder: Path, dtype: torch.dtype = torch.float32, method: str | None = None) -> ServedModel:
    options = ModelOptions(model=str(folder), model_impl="transformers", quantization=method)
    return build_model(find_model(options), options, dtype, CPU, load_ops("cpu"))


def logits_of(
    model: ServedModel, cuts: list[int], dtype: torch.dtype, stored: torch.dtype | None = None
) -> torch.Tensor:
    """Logits of all positions of PROMPT, computed in pieces that end at `cuts`, beside another sequence."""
    loop = PagedLoop(model, load_ops("cpu"), page_size=16, num_pages=32, dtype=stored or dtype)
    one, other = loop.start(0, PROMPT), loop.start(1, PROMPT[::-1])
    found = []
    for first, last in zip([0, *cuts], [*cuts, len(PROMPT)], strict=True):
        beside = [(other, 1)] if len(found) % 2 else []
        found.append(loop.step([*beside, (one, last - first)], all_rows=True)[-1])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("family", "dtype"), [("youtu", torch.float32), ("youtu", torch.bfloat16), ("deepseek_v3", torch.bfloat16)]
)
def test_the_same_bits_however_a_prompt_is_cut(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = build(write_tiny(tmp_path, family, tokenizer=False), dtype)
    assert all(layer.shared and layer.kv_heads == 1 for layer in model.layout.layers)
    whole = logits_of(model, [], dtype)
    assert torch.equal(logits_of(model, [1, 2, 19, 50, 69], dtype), whole)
    assert torch.equal(logits_of(model, list(range(30, 70, 3)), dtype), whole)


def test_close_to_the_library_in_bfloat16(tmp_path: Path) -> None:
    """Rounding the absorbed queries costs no more than rounding keys and values of each head."""
    folder = write_tiny(tmp_path, "youtu", tokenizer=False)
    with torch.no_grad():
        exact = tiny_model("youtu")(torch.tensor([PROMPT])).logits[0]
        narrow = tiny_model("youtu").bfloat16()(torch.tensor([PROMPT])).logits[0].float()
    found = logits_of(build(folder, torch.bfloat16), [], torch.bfloat16)
    assert (found - exact).square().mean() < 2 * (narrow - exact).square().mean()


def test_a_position_takes_the_latent_and_the_rotated_part(tmp_path: Path) -> None:
    model = build(write_tiny(tmp_path, "youtu", tokenizer=False))
    loop = PagedLoop(model, load_ops("cpu"), page_size=16)
    assert {(layer.key_dim, layer.value_dim) for layer in model.layout.layers} == {(RANK + ROPE, RANK)}
    assert loop.caches[0].data[0].nbytes == 16 * (RANK + ROPE) * 4  # expanded: 16 * 4 * (8 + 8 + 12) * 4


def test_bytes_in_the_cache_and_in_the_linears(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "youtu", tokenizer=False)
    plain = build(folder, torch.bfloat16)
    want = logits_of(plain, [], torch.bfloat16)
    spread = float(want.std())
    rounded = logits_of(plain, [], torch.bfloat16, torch.int8)
    assert 0 < float((rounded - want).abs().mean()) < 0.05 * spread
    assert torch.equal(logits_of(plain, [9, 33], torch.bfloat16, torch.int8), rounded)
    narrow = build(folder, torch.bfloat16, "int8")
    assert all(layer.shared for layer in narrow.layout.layers)
    assert 0 < float((logits_of(narrow, [], torch.bfloat16) - want).abs().mean()) < 0.1 * spread


def test_a_weight_stored_with_few_bits_is_widened() -> None:
    values = torch.randint(-127, 128, (2 * (6 + 4), 8), dtype=torch.int8)
    scheme = Scheme("compressed-tensors", "int-quantized")
    stored = StoredWeight(scheme, "kv_b_proj", (20, 8), {"weight": values, "weight_scale": torch.rand(20, 1)})
    one, two = (LatentProjection(load_ops("cpu"), 2, 8, 6, 4, torch.float32, CPU) for _ in range(2))
    one.load_weight(stored)
    two.load_weight(restored(stored.unpack()))
    query, mixed = torch.randn(3, 2, 6 + 5), torch.randn(3, 2, 8)
    assert torch.equal(one.query(query), two.query(query))
    assert torch.equal(one.result(mixed), two.result(mixed))


def test_other_code_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that are more than one linear of the latents are written out, as before."""
    original = modeling_youtu.YoutuAttention.expand_kv

    def odd(self: nn.Module, latents: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = original(self, latents, rope)
        return key, value.tanh()

    monkeypatch.setattr(modeling_youtu.YoutuAttention, "expand_kv", odd)
    model = build(write_tiny(tmp_path, "youtu", tokenizer=False))
    assert not any(layer.shared for layer in model.layout.layers)
    assert model.layout.tier == "A"


def test_what_does_not_prove_equal_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        LatentProjection, "result", lambda self, mixed: mixed.new_ones(*mixed.shape[:2], self.value_dim)
    )
    model = build(write_tiny(tmp_path, "youtu", tokenizer=False))
    assert not any(layer.shared for layer in model.layout.layers)


def test_the_engine_with_prefixes_drafts_and_few_pages(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "youtu")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    prompts = [{"prompt_token_ids": PROMPT[:48] + [place] * 3} for place in (7, 9, 11, 7)]
    found = []
    for more in (
        {},
        {"enable_prefix_caching": False, "max_num_batched_tokens": 16},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}, "kv_cache_memory_bytes": 100_000},
    ):
        with LLM(str(folder), model_impl="transformers", max_model_len=128, dtype="float32", **more) as llm:
            found.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert found[0] == found[1] == found[2]
    with torch.no_grad():
        ids = torch.tensor([prompts[0]["prompt_token_ids"]])
        want = tiny_model("youtu").generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert list(found[0][0]) == want[0, ids.shape[1] :].tolist()

"""Keys and values in 8 bits: what it costs the bundled model, what it saves, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from quire import LLM, SamplingParams
from quire.cli.compare import run_served
from quire.config import EngineOptions
from quire.errors import ConfigError
from quire.kernels.table import load_ops
from quire.models.build import build_model
from quire.resolve import choose_cache_dtype, resolve
from quire.text.tokenizer import load_tokenizer

BUNDLED = Path(__file__).resolve().parents[2] / "src" / "quire" / "bundled" / "model"
TALE = (
    "Once upon a time there lived a poor woodcutter with his wife and his two children at the edge of a great forest. "
    "They had little to eat, and when a great famine came to the land, he could no longer get even their daily bread. "
    "In the evening, as he lay in bed and thought about it, he could not sleep for worry, and he sighed and said to his "
    "wife: 'What is to become of us? How can we feed our poor children, when we have nothing left for ourselves?' The "
    "children had not been able to sleep for hunger either, and had heard what was said. The girl wept bitter tears, but "
    "her brother said: 'Be quiet, do not grieve; I will find a way to help us.' And when the old people had fallen asleep, "
    "he got up, put on his little coat, opened the door below, and crept outside."
)


def perplexity(cache: str, model_dtype: str) -> float:
    options = {"model": str(BUNDLED), "dtype": model_dtype, "kv_cache_dtype": cache, "max_model_len": 512}
    config = resolve(EngineOptions.from_flat(options))
    ids = load_tokenizer(config.files.tokenizer).encode(TALE)
    served = build_model(config.files, config.options.model, config.dtype, torch.device("cpu"), load_ops("cpu"))
    logits = run_served(served, config, [ids], None).logits[0]
    return math.exp(torch.nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])).item())


@pytest.mark.parametrize("model_dtype", ["bfloat16", "float32"])
def test_the_bundled_model_keeps_its_sense(model_dtype: str) -> None:
    plain, rounded = perplexity("auto", model_dtype), perplexity("int8", model_dtype)
    print(f"perplexity {plain:.4f} -> {rounded:.4f} ({rounded / plain - 1:+.2%}), {model_dtype}")
    assert rounded != plain
    assert rounded < plain * 1.005


def test_generation_and_the_pages_it_has_room_for() -> None:
    found = {}
    for dtype in ("auto", "int8"):
        with LLM(str(BUNDLED), kv_cache_dtype=dtype, kv_cache_memory_bytes=8 << 20, max_model_len=256) as llm:
            outputs = llm.generate(["Once upon a time", "The king"] * 3, SamplingParams(max_tokens=24, temperature=0))
            found[dtype] = [output.outputs[0].text for output in outputs]
    assert found["int8"][:2] * 3 == found["int8"]  # whoever else is there
    assert all(found["int8"])


def test_a_gpu_refuses_it() -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype is int8.*CPU only"):
        choose_cache_dtype("int8", torch.bfloat16, "cuda")
    with pytest.raises(ConfigError, match="kv_cache_dtype.*'fp8'"):
        EngineOptions.from_flat({"model": str(BUNDLED), "kv_cache_dtype": "fp8"})

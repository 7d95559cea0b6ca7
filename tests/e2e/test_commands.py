"""The commands around an engine, in this process, on the bundled model: run, plan, verify, bench, collect-env."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from quire.cli import compare
from quire.cli.main import main
from quire.models.native.decoder import NativeDecoder

FAST = ("--threads", "1", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "32M")


def output_of(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    capsys.readouterr()
    assert main(words) == status, capsys.readouterr().err
    return capsys.readouterr().out


def test_run_prints_prompt_and_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("run", "Once upon a time", "--max-tokens", "8", "--temperature", "0", *FAST)
    text = output_of(capsys, *words)
    assert text.startswith("Once upon a time")
    assert len(text) > len("Once upon a time") + 4
    assert output_of(capsys, *words) == text


def test_run_as_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "run", "Tell me a tale.", "--chat", "--max-tokens", "8", *FAST)
    assert text.strip()
    assert not text.startswith("Tell me a tale.")


def test_run_names_a_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "./no/such/model", "Hi"]) == 1
    assert "no/such/model" in capsys.readouterr().err


def test_plan_is_what_an_engine_would_take(capsys: pytest.CaptureFixture[str]) -> None:
    from quire.config import EngineOptions
    from quire.engine.engine import Engine

    plan = json.loads(output_of(capsys, "plan", "--json", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "32M"))
    assert plan["architecture"]
    assert plan["pages_bytes"] <= 32 << 20
    assert plan["longest_context"] <= plan["model_context"]
    assert 1 <= plan["concurrent_at_2k"] <= 4
    assert plan["decode_batch"] > plan["decode_alone"] > 0
    flat = {"max_num_seqs": 4, "kv_cache_memory_bytes": 32 << 20, "threads": 1}
    engine = Engine.from_options(EngineOptions.from_flat(flat))
    try:
        assert engine.settings.max_model_len == plan["longest_context"]
        assert list(engine.stats().pages) == [group["pages"] - 1 for group in plan["groups"]]
    finally:
        engine.close()


def test_plan_of_a_large_shape_reads_no_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ("plan", str(tmp_path), "--load-format", "dummy", "--kv-cache-memory-bytes", "1G")
    try:
        text = output_of(capsys, *words)
    except AssertionError as error:
        if "are free" in str(error):
            pytest.skip("less memory here than the shape needs")
        raise
    assert "1,235,814,400 parameters" in text
    assert "16 positions in 16 layers" in text
    assert "of the model's 131,072: the pages hold no more" in text
    assert "memory limits the context" in text


def test_verify_agrees_with_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (("--dtype", "float32"), ("--dtype", "float32", "--chunk", "5", "--model-impl", "transformers"), ()):
        report = json.loads(output_of(capsys, "verify", "--json", "--threads", "1", *flags))
        assert report["passed"]
        assert report["first_departing_layer"] is None
        assert len(report["layers"]) > 2


def test_verify_finds_the_layer_that_departs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build = compare.build_model

    def damaged(*arguments: Any) -> Any:
        model = build(*arguments)
        assert isinstance(model, NativeDecoder)
        model.layers[2].post_norm.weight.mul_(-1)
        return model

    monkeypatch.setattr(compare, "build_model", damaged)
    text = output_of(
        capsys, "verify", "--json", "--dtype", "float32", "--model-impl", "native", "--prompt", "A tale.", status=1
    )
    report = json.loads(text)
    assert not report["passed"]
    assert report["first_departing_layer"] == 2
    assert report["mean_kl"] > report["kl_tolerance"]


def test_verify_needs_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--load-format", "dummy"]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_bench_latency(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    words = ("--input-len", "16", "--output-len", "4", "--batch-size", "2", "--num-iters", "3")
    text = output_of(capsys, "bench", "latency", *words, "--num-iters-warmup", "1", "--output-json", str(path), *FAST)
    assert "Avg latency:" in text
    assert "Roofline:" in text
    report = json.loads(path.read_text())
    assert len(report["latencies"]) == 3
    assert set(report["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert report["roofline"]["seconds"] > 0


def test_bench_throughput(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "throughput.json"
    words = ("--num-prompts", "3", "--input-len", "16", "--output-len", "4", "--output-json", str(path))
    text = output_of(capsys, "bench", "throughput", *words, *FAST)
    assert "output tokens/s" in text
    report = json.loads(path.read_text())
    assert report["num_requests"] == 3
    assert report["total_num_tokens"] == 3 * 20


def test_collect_env(capsys: pytest.CaptureFixture[str]) -> None:
    text = output_of(capsys, "collect-env")
    assert f"torch:             {torch.__version__}" in text
    assert "native library:" in text

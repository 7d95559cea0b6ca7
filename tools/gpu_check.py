"""Parity and a first benchmark on a machine with a GPU, from the source tree, with nothing installed but torch,
transformers, tokenizers and triton. `make gpu-check` runs it; the exit status is 0 only when everything agrees.

Three parts: the Triton kernels against the reference; tiny random models through the whole engine against the
library's own generate; and the speed of kernels and of a real shape beside PyTorch, with the card's bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests" / "models")]

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "gpt2", "qwen3_moe")
PROMPTS = ([5, 9, 3, 7], list(range(3, 60)), [11] * 23)
NEW_TOKENS = 24


def kernels() -> bool:
    """Run the kernel tests on the card."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/kernels/test_cuda.py")]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def models() -> dict[str, Any]:
    """For each family: how many of the prompts get the same greedy tokens as generate, in float32."""
    from tiny import write_tiny
    from transformers import AutoModelForCausalLM

    from quire import LLM, SamplingParams

    found: dict[str, Any] = {}
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny(Path(folder), family)
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
            expected = [
                theirs.generate(
                    torch.tensor([prompt], device="cuda"),
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                    do_sample=False,
                )[0, len(prompt) :].tolist()
                for prompt in PROMPTS
            ]
            with LLM(folder, dtype="float32", device="cuda", kv_cache_memory_bytes=1 << 26) as llm:
                outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
        same = sum(output.outputs[0].token_ids == answer for output, answer in zip(outputs, expected, strict=True))
        found[family] = {"same": same, "of": len(PROMPTS)}
        print(f"{family:12} {same} of {len(PROMPTS)} prompts equal", flush=True)
    return found


def milliseconds(work: Callable[[], object], repeat: int = 20) -> float:
    """Median time of one call on the card."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeat):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second that the card reads and writes in a plain copy."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def decode_attention(batch: int, context: int, speed: float) -> dict[str, float]:
    """32 query heads over 8 key heads of 128: our time, PyTorch's on contiguous tensors, and the share of bandwidth."""
    from quire.kernels.table import load_ops

    ops = load_ops("cuda")
    pages = -(-context // 16)
    cache = ops.new_cache(batch * pages + 1, 16, 8, 128, 128, torch.bfloat16, "cuda")
    cache.data.normal_()
    order = torch.randperm(batch * pages, device="cuda") + 1
    tables = order.view(batch, pages).int()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, 32, 128, dtype=torch.bfloat16, device="cuda")
    ours = milliseconds(lambda: ops.attention(query, cache, tables, starts, lengths, 128**-0.5))
    key, value = (torch.randn(batch, 8, context, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    theirs = milliseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(query[:, :, None], key, value, enable_gqa=True)
    )
    moved = 2 * batch * context * 8 * 128 * 2
    return {"batch": batch, "context": context, "quire_ms": ours, "torch_ms": theirs,
            "share_of_bandwidth": moved / (ours / 1e3) / speed}  # fmt: skip


def throughput(model: Path, prompts: int) -> dict[str, float]:
    """Output tokens per second of a dummy model: 256 tokens in, 128 out."""
    from quire import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=128, ignore_eos=True)
    with LLM(str(model), load_format="dummy", device="cuda", skip_tokenizer_init=True) as llm:
        batch = [{"prompt_token_ids": [3 + (7 * i + j) % 1000 for j in range(256)]} for i in range(prompts)]
        llm.generate(batch[:2], params, use_tqdm=False)
        llm.reset_prefix_cache()
        began = time.perf_counter()
        llm.generate(batch, params, use_tqdm=False)
        seconds = time.perf_counter() - began
    return {"prompts": prompts, "seconds": seconds, "output_tokens_per_second": prompts * 128 / seconds}


def write_shape(folder: Path) -> None:
    """The config of a Qwen3-0.6B-shaped model; its weights are made up while loading."""
    from transformers import Qwen3Config

    config = Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)


def main() -> int:
    """Run all parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-json", type=Path, help="where to write the figures")
    parser.add_argument("--skip-benchmark", action="store_true", help="parity only")
    wanted = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here. The kernels' tests run on the CPU with Triton's interpreter: make test")
        return 1
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    report: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    report["kernels"] = kernels()
    report["models"] = models()
    if not wanted.skip_benchmark:
        speed = bandwidth()
        report["bandwidth"] = speed
        report["attention"] = [decode_attention(batch, 2048, speed) for batch in (1, 32, 256)]
        with tempfile.TemporaryDirectory() as folder:
            write_shape(Path(folder))
            report["throughput"] = [throughput(Path(folder), prompts) for prompts in (1, 32, 256)]
    print(json.dumps(report, indent=2))
    if wanted.output_json:
        wanted.output_json.write_text(json.dumps(report, indent=2))
    equal = all(entry["same"] == entry["of"] for entry in report["models"].values())
    return 0 if report["kernels"] and equal else 1


if __name__ == "__main__":
    sys.exit(main())

"""Runs in the process of an engine that is a Python library: loads one model, then does one workload per line of input.

    python run.py '{"engine": "vllm", "model": "FOLDER", ...}'

Uses the standard library and the engine alone, because it runs in the engine's environment. Prompts are token ids; output
lengths are fixed; every run has prompts of its own, or a prefix cache would answer.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], None]
TALES = Path(__file__).with_name("tales.txt")


def load_quire(settings: dict[str, Any]) -> tuple[Generate, int]:
    """quire's LLM, and the size of its vocabulary."""
    from quire import LLM, SamplingParams

    options = {
        "load_format": settings["load_format"],
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": settings["cache_bytes"],
        "packed_cache": settings["packed_cache"],
        "threads": settings["threads"],
        "device": "cpu",
    }
    if settings["quantization"] is not None:
        options["quantization"] = settings["quantization"]
    llm = LLM(settings["model"], **options)

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        check([len(item.outputs[0].token_ids) for item in outputs], count)

    return generate, settings["vocab_size"]


def load_vllm(settings: dict[str, Any]) -> tuple[Generate, int]:
    """vLLM's LLM, and the size of its vocabulary."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=settings["model"],
        load_format=settings["load_format"],
        dtype=settings["dtype"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=256,
    )

    def generate(prompts: list[list[int]], count: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        check([len(item.outputs[0].token_ids) for item in outputs], count)

    return generate, settings["vocab_size"]


def check(lengths: list[int], count: int) -> None:
    """A run with missing tokens must not count."""
    if any(length != count for length in lengths):
        raise RuntimeError(f"asked for {count} tokens of each request, got {sorted(set(lengths))}")


def make_prompts(workload: dict[str, Any], vocab_size: int, draw: random.Random) -> list[list[int]]:
    """Random token ids, the first ones special in many vocabularies and left out."""

    def ids(count: int) -> list[int]:
        return [draw.randrange(16, vocab_size) for _ in range(count)]

    shared = ids(workload["shared_len"])
    return [shared + ids(workload["input_len"]) for _ in range(workload["requests"])]


def timed(generate: Generate, prompts: list[list[int]], count: int) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    generate(prompts, count)
    return time.perf_counter() - start


def measure(generate: Generate, vocab_size: int, workload: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The figure of one workload, in its unit."""
    count, requests = workload["output_len"], workload["requests"]
    kind = workload["kind"]
    if kind not in ("start", "restart"):
        few = workload | {"requests": min(2, requests), "input_len": 16, "shared_len": 0}
        generate(make_prompts(few, vocab_size, draw), 2)
    samples = []
    for _ in range(workload["repeats"]):
        seconds = timed(generate, make_prompts(workload, vocab_size, draw), count + (kind == "decode"))
        if kind == "decode":  # without the prompt and the first token
            first = timed(generate, make_prompts(workload, vocab_size, draw), 1)
            samples.append(count / (seconds - first))
        elif kind == "prefill":
            samples.append(requests * workload["input_len"] / seconds)
        elif kind == "generate":
            samples.append(requests * count / seconds)
        else:
            samples.append(seconds)
    return {"value": statistics.median(samples), "samples": samples}


def perplexity(settings: dict[str, Any]) -> dict[str, Any]:
    """Of the bundled model on the tales, each token given those before it."""
    from quire import LLM, SamplingParams

    options = {} if settings["quantization"] is None else {"quantization": settings["quantization"]}
    llm = LLM(max_model_len=512, dtype="bfloat16", threads=settings["threads"], device="cpu", **options)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    texts = [text.replace("\n", " ").strip() for text in TALES.read_text(encoding="utf-8").split("\n\n")]
    losses: list[float] = []
    for output in llm.generate(texts, params, use_tqdm=False):
        given = output.prompt_logprobs
        assert isinstance(given, list)
        pairs = zip(output.prompt_token_ids[1:], given[1:], strict=True)
        losses += [-entry[token].logprob for token, entry in pairs if entry is not None]
    value = math.exp(statistics.fmean(losses))
    return {"value": value, "samples": [value], "details": {"tokens": len(losses)}}


def main() -> None:
    """Load, say so, and work until the input ends."""
    # Engines print to the standard output; only answers may go there.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    loaders = {"quire": load_quire, "vllm": load_vllm}

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    try:
        start = time.perf_counter()
        if settings["task"] == "generate":
            generate, vocab_size = loaders[settings["engine"]](settings)
        answer({"ready": time.perf_counter() - start})
        draw = random.Random(time.time_ns())  # no run may find another one's prompts in a cache
        for line in sys.stdin:
            if settings["task"] == "perplexity":
                answer(perplexity(settings))
            else:
                answer(measure(generate, vocab_size, json.loads(line), draw))
    except Exception as error:
        words = " ".join(str(error).split())
        answer({"error": f"{type(error).__name__}: {words[:200]}"})
        raise


if __name__ == "__main__":
    main()

"""The native decoder and the Transformers path side by side: decode steps of both engines in alternation, in one process.

    python bench/paths.py [--shape qwen3-0.6b] [--batch 1] [--steps 60] [--quantization int8]

Random weights of a well-known shape. Each engine has its own copy of them and its own requests; a step of one is followed
by a step of the other, so that a disturbed second disturbs both. Printed are the medians and the median of the ratios of
neighbouring steps, and whether the two programs are the same list of calls.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_shape

from quire import LLM, SamplingParams

PROMPT = 16
WARM = 6  # steps before any is counted


def start(model: Path, path: str, batch: int, steps: int, quantization: str | None) -> LLM:
    """An engine whose requests are about to decode."""
    llm = LLM(
        str(model), load_format="dummy", skip_tokenizer_init=True, model_impl=path, quantization=quantization,
        max_model_len=1024, max_num_seqs=batch, enable_prefix_caching=False, kv_cache_memory_bytes=256 << 20,
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=steps + 2 * WARM, ignore_eos=True)
    prompts = [[7 + (i * 31 + place) % 500 for place in range(PROMPT)] for i in range(batch)]
    for request in llm._prepare(prompts, params, None, special=True):
        llm._engine.submit(request)
    return llm


def program_of(llm: LLM) -> str:
    """What its steps are, in words."""
    core: Any = llm._engine._core
    model = core._executor._worker._runner._model
    return model.program.describe() if hasattr(model, "program") else "Python"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--quantization", default=None)
    options = parser.parse_args()
    paths = ("native", "transformers")
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(options.shape, Path(folder))
        engines = [start(model, path, options.batch, options.steps, options.quantization) for path in paths]
    times: list[list[float]] = [[], []]
    for step in range(options.steps + WARM):
        for llm, taken in zip(engines, times, strict=True):
            began = time.perf_counter()
            llm._engine.step()
            if step >= WARM:
                taken.append(time.perf_counter() - began)
    for path, llm, taken in zip(paths, engines, times, strict=True):
        print(f"{path:14}{1e3 * statistics.median(taken):8.2f} ms a step, {program_of(llm)}")
    ratio = statistics.median(two / one for one, two in zip(*times, strict=True))
    print(f"{options.shape}, batch {options.batch}: {paths[1]} takes {ratio:.3f} of {paths[0]}'s time")


if __name__ == "__main__":
    main()

"""quire beside `generate` of Transformers: one model shape, random weights, same prompts, in turn, with the roofline.

Both are in memory at once and run alternately, so that a slow minute of the machine hits both. Prints a table and
keeps the figures as JSON.

    python bench/vs_transformers.py --shape llama-3.2-1b --batch-sizes 1 8 --input-len 64 --output-len 32
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, write_shape
from transformers import AutoConfig, AutoModelForCausalLM

from quire import env
from quire.cli import bench
from quire.cli.workloads import Item, WorkloadOptions, make_items
from quire.config import EngineOptions


def main() -> None:
    """Load both, run them in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=sorted(SHAPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found = parser.parse_args()
    env.set_up_logging("warning")
    found.results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(found, write_shape(found.shape, Path(folder)))
    (found.results / f"vs-transformers-{found.shape}.json").write_text(json.dumps(rows, indent=2))
    print(f"{found.shape}, {found.input_len} tokens in, {found.output_len} out; output tokens per second")
    print(f"{'batch':>5} {'transformers':>12} {'quire':>8} {'ratio':>6} {'roofline':>8} {'reached':>7} {'GB/s':>6}")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['transformers']:>12.1f} {row['quire']:>8.1f} "
            f"{row['quire'] / row['transformers']:>6.2f} {row['roofline']:>8.1f} "
            f"{row['quire'] / row['roofline']:>7.0%} {row['bandwidth'] / 1e9:>6.1f}"
        )


def measure(found: argparse.Namespace, model: Path) -> list[dict[str, Any]]:
    """One row of figures per batch size."""
    options = EngineOptions.from_flat(
        {
            "model": str(model),
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "max_model_len": 4096,
            "device": "cpu",
        }
    )
    engine, config = bench.start(options)
    torch.set_num_threads(config.threads)
    theirs = random_transformer(model)
    rows = []
    for batch in found.batch_sizes:
        shape = WorkloadOptions(num_prompts=batch, input_len=found.input_len, output_len=found.output_len)
        items = make_items(shape, engine.settings.vocab_size, lambda _: [], seed=0)
        generate(theirs, items)
        bench.timed(engine, items, 1, False)
        seconds: dict[str, list[float]] = {"transformers": [], "quire": []}
        for turn in range(found.rounds):
            again = bench.rotated(items, turn + 1)
            seconds["transformers"].append(generate(theirs, again))
            seconds["quire"].append(bench.timed(engine, again, 1, False))
        best = {name: statistics.median(values) for name, values in seconds.items()}
        limit = bench.ceiling(config, items, 1, best["quire"])
        out = batch * found.output_len
        rows.append(
            {
                "batch": batch,
                "transformers": out / best["transformers"],
                "quire": out / best["quire"],
                "roofline": out / limit.seconds,
                "bandwidth": limit.bandwidth,
                "flops": limit.flops,
                "seconds": seconds,
            }
        )
    engine.close()
    return rows


def random_transformer(model: Path) -> Any:
    """The library's model with small random weights, without its slow initialization."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rotary = type(built.model.rotary_emb)(config)
    built = built.to_empty(device="cpu").eval()
    built.tie_weights()
    built.model.rotary_emb = rotary  # its table is computed, not loaded
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 20, generator=generator) * 0.02).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in built.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), block.numel()):
                part = flat[start : start + block.numel()]
                part.copy_(block[: part.numel()])
    return built


def generate(model: Any, items: list[Item]) -> float:
    """Seconds that the library's generate takes for the batch."""
    ids = torch.tensor([item.prompt_token_ids for item in items])
    count = items[0].output_len
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

"""Throughput of many requests at once for models of well-known shapes: quire bench throughput, once per shape.

python bench/throughput.py --shapes llama-3.2-1b --num-prompts 32 --input-len 256 --output-len 128
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from shapes import SHAPES, write_shape

from quire.cli import bench


def main() -> None:
    """Run all shapes and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b"], choices=sorted(SHAPES))
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found, rest = parser.parse_known_args()
    found.results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in found.shapes:
            model = write_shape(shape, Path(folder))
            print(f"== {shape}, {found.num_prompts} requests, {found.input_len} in, {found.output_len} out")
            words = [str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "4096"]
            words += ["--num-prompts", str(found.num_prompts)]
            words += ["--input-len", str(found.input_len), "--output-len", str(found.output_len)]
            words += ["--output-json", str(found.results / f"throughput-{shape}.json")]
            bench.throughput([*words, *rest])


if __name__ == "__main__":
    main()

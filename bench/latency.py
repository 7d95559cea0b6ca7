"""Latency of one batch for models of well-known shapes: quire bench latency, once per shape and batch size.

python bench/latency.py --shapes llama-3.2-1b --batch-sizes 1 8 --output-len 32
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from shapes import SHAPES, write_shape

from quire.cli import bench


def main() -> None:
    """Run all combinations and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-0.6b"], choices=sorted(SHAPES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--num-iters", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found, rest = parser.parse_known_args()
    found.results.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in found.shapes:
            model = write_shape(shape, Path(folder))
            for batch in found.batch_sizes:
                print(f"== {shape}, batch {batch}, {found.input_len} in, {found.output_len} out")
                words = [str(model), "--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "4096"]
                words += ["--batch-size", str(batch), "--num-iters", str(found.num_iters), "--num-iters-warmup", "1"]
                words += ["--input-len", str(found.input_len), "--output-len", str(found.output_len)]
                words += ["--output-json", str(found.results / f"latency-{shape}-{batch}.json")]
                bench.latency([*words, *rest])


if __name__ == "__main__":
    main()

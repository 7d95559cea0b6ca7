"""What one answer per request costs: the kernels that give a row the same bits in every step, beside what others would do.

    python bench/determinism.py [--threads 1] [--seconds 0.4]

linear      one kernel for every number of rows, sums in one order; PyTorch's library picks a kernel by the number of rows.
            The last two columns say in how many rows the bits differ from those of the row computed alone.
splits      attention over one long context, which is cut at fixed positions and merged, beside the same keys in as many
            short sequences, which need no merging.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from kernels import Case, Scene, Turn, attention_case, linear_case, measure
from quire.kernels.table import Ops, load_ops

SHAPE = (8192, 2048)
SPLIT = 512


def differing_rows(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> int:
    """Rows whose bits are not those of the row alone."""
    together = function(x)
    return sum(not torch.equal(together[row], function(x[row : row + 1])[0]) for row in range(len(x)))


def linear_rows(ops: Ops, seconds: float) -> None:
    """The table of linears."""
    n, k = SHAPE
    print(f"{'linear, ms':28}{'quire':>9}{'PyTorch':>9}{'ratio':>7}{'rows that differ':>20}{'PyTorch':>9}")
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(n, k).to(dtype)
        plain = Turn(weight.clone, weight.nbytes)
        packed = Turn(partial(ops.pack_linear, weight, None), weight.nbytes)
        for m in (1, 8, 32, 256, 1024):
            case = linear_case(ops, str(dtype).removeprefix("torch."), torch.randn(m, k).to(dtype), packed, plain)
            found = measure(case, seconds, 1.0, 1.0)
            few = torch.randn(m, k).to(dtype)[:32]
            differing = differing_rows(partial(ops.linear, packed=packed.copies[0]), few)
            other = differing_rows(partial(F.linear, weight=plain.copies[0]), few)
            print(
                f"{case.name:28}{found.ours_ms:9.2f}{found.torch_ms:9.2f}{found.ratio:7.2f}"
                f"{differing:13} of {len(few):2}{other:9}"
            )


def split_rows(ops: Ops, seconds: float) -> None:
    """One context of many splits beside as many contexts of one split."""
    print(f"\n{'attention, ms':44}{'one context':>12}{'apart':>9}{'ratio':>7}")
    for context in (1024, 2048, 4096):
        count = context // SPLIT
        long = attention_case(ops, "bf16", Scene(1, context, 1, 32, 8, 64))
        short = attention_case(ops, "bf16", Scene(count, SPLIT, 1, 32, 8, 64))
        found = measure(Case(long.name, long.ours, short.ours), seconds, 1.0, 1.0)
        print(
            f"{context:6} positions, {count} splits{'':20}{found.ours_ms:12.3f}{found.torch_ms:9.3f}{1 / found.ratio:7.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.4, help="time for each line")
    found = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(found.threads)
    ops = load_ops("cpu")
    ops.set_threads(found.threads)
    linear_rows(ops, found.seconds)
    split_rows(ops, found.seconds)


if __name__ == "__main__":
    main()

"""The CPU kernels beside PyTorch's own path and beside what the machine can do at best.

    python bench/kernels.py [--only linear,quantized,attention,shared,experts,fused,small] [--seconds 0.5] [--json FILE]

Both sides of a line run in alternation on the same inputs, so that a disturbed minute disturbs both; the time shown is
the lower quartile of each, the ratio the median of the ratios of neighbouring runs. The ceilings (reading memory,
multiplying from registers) are measured in the same minute. Quantized linears stand beside quire's own bfloat16 and beside
PyTorch's dynamic int8 and its int4 with bfloat16 activations; experts in one call beside one product for each; layers that
make their own rows beside the same in two calls. Weights and pages are taken in turn from copies that together exceed the
caches. `shared` is attention of sequences that begin with the same pages, beside the same with pages of their own.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F

from quire.kernels.cpu import CpuOps, native
from quire.kernels.cpu.packing import NativeQuantized
from quire.kernels.table import Ops, ops_of
from quire.kernels.weights import PackedLinear
from quire.layers.moe import mix
from quire.quant.format import quantized_ops

COLD_BYTES = 192 << 20
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
CACHE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the table. `flops` and `bytes` are what the work needs at least; 0 where they say nothing."""

    name: str
    ours: Callable[[], object]
    torch: Callable[[], object]
    flops: float = 0
    bytes: float = 0


@dataclass(frozen=True, slots=True)
class Result:
    name: str
    ours_ms: float
    torch_ms: float
    ratio: float
    gflops: float
    gbytes: float
    of_ceiling: float  # the larger of the shares of the two ceilings


def measure(case: Case, seconds: float, bandwidth: float, rate: float) -> Result:
    """Alternate both sides for `seconds`, at least five times each."""
    ours: list[float] = []
    other: list[float] = []
    for function in (case.ours, case.torch):
        function()
    until = time.perf_counter() + seconds
    while len(ours) < 5 or (time.perf_counter() < until and len(ours) < 2000):
        for function, times in ((case.ours, ours), (case.torch, other)):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    best = statistics.quantiles(ours, n=4)[0]
    return Result(
        case.name,
        best * 1e3,
        statistics.quantiles(other, n=4)[0] * 1e3,
        statistics.median(b / a for a, b in zip(ours, other, strict=True)),
        case.flops / best / 1e9,
        case.bytes / best / 1e9,
        max(case.flops / best / rate, case.bytes / best / bandwidth),
    )


class Turn(Generic[T]):
    """Hands out copies one after the other, so that none is still in a cache."""

    def __init__(self, make: Callable[[], T], size: int) -> None:
        self.copies = [make() for _ in range(max(2, min(64, COLD_BYTES // size + 1)))]
        self.at = 0

    def next(self) -> T:
        self.at = (self.at + 1) % len(self.copies)
        return self.copies[self.at]


def linear_cases(ops: CpuOps, rows: list[int], shape: tuple[int, int]) -> Iterator[Case]:
    n, k = shape
    for label, dtype in DTYPES.items():
        weight = torch.randn(n, k).to(dtype)
        plain = Turn(weight.clone, weight.nbytes)
        packed = Turn(partial(ops.pack_linear, weight, None), weight.nbytes)
        for m in rows:
            yield linear_case(ops, f"linear {label}", torch.randn(m, k).to(dtype), packed, plain)


def linear_case(
    ops: CpuOps | Ops, name: str, x: torch.Tensor, packed: Turn[PackedLinear], plain: Turn[torch.Tensor]
) -> Case:
    m, (n, k) = x.shape[0], plain.next().shape
    return Case(
        f"{name} M={m} N={n} K={k}",
        lambda: ops.linear(x, packed.next()),
        lambda: F.linear(x, plain.next()),
        2.0 * m * n * k,
        plain.next().nbytes,
    )


def quantized_cases(ops: CpuOps, rows: list[int], shape: tuple[int, int]) -> Iterator[Case]:
    n, k = shape
    weight = torch.randn(n, k).bfloat16()
    plain = Turn(lambda: ops.pack_linear(weight, None), weight.nbytes)
    for method, theirs in (("int8", torch_int8(weight)), ("int4-g32", None), ("int4-g128", torch_int4(weight))):
        table = quantized_ops(ops_of(ops), method)
        first = rounded(ops, method, weight)
        assert isinstance(first.data, torch.Tensor)
        weights, size = ops.unpack_quantized(first), first.data.nbytes
        packed = Turn(partial(ops.pack_quantized, weights, None, torch.bfloat16), size)
        for m in rows:
            x = torch.randn(m, k).bfloat16()
            name, work = f"linear {method} M={m} N={n} K={k} beside ", 2.0 * m * n * k
            ours = in_turn(table.linear, x, packed)
            yield Case(name + "our bf16", ours, in_turn(ops.linear, x, plain), work, size)
            if theirs is not None:
                yield Case(name + "torch", ours, partial(theirs, x), work, size)


def rounded(ops: CpuOps, method: str, weight: torch.Tensor) -> NativeQuantized:
    """A weight as layers of this method have it."""
    packed: object = quantized_ops(ops_of(ops), method).pack_linear(weight, None)
    assert isinstance(packed, NativeQuantized)
    return packed


def in_turn(linear: Callable[..., torch.Tensor], x: torch.Tensor, weights: Turn[Any]) -> Callable[[], object]:
    """Calls of a linear, each with the next weights."""
    return lambda: linear(x, weights.next())


def torch_int8(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's linear with activations rounded as they come; it takes and gives float32."""
    torch.backends.quantized.engine = "fbgemm"
    scales = weight.float().abs().amax(1).double() / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.long)
    with warnings.catch_warnings(action="ignore"):  # it says that these tensors will go away
        rounded = torch.quantize_per_channel(weight.float(), scales, zeros, 0, torch.qint8)
        turn = Turn(lambda: torch.ops.quantized.linear_prepack(rounded, None), weight.nbytes // 2)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), turn.next(), reduce_range=True)


def torch_int4(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """PyTorch's linear with groups of 128 and bfloat16 activations."""
    n, k = weight.shape
    values = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scales = torch.rand(k // 128, n, 2).bfloat16()
    aten = torch.ops.aten
    turn = Turn(lambda: aten._convert_weight_to_int4pack_for_cpu(values, 1), n * k // 2)
    return lambda x: aten._weight_int4pack_mm_for_cpu(x, turn.next(), 128, scales)


@dataclass(frozen=True, slots=True)
class Scene:
    """`batch` sequences of `context` positions each, the last `new` of them to compute, the first `shared` in the pages of
    all."""

    batch: int
    context: int
    new: int
    heads: int
    kv_heads: int
    dim: int
    shared: int = 0

    def __str__(self) -> str:
        return (
            f"batch={self.batch} context={self.context} new={self.new} heads={self.heads}/{self.kv_heads} d={self.dim}"
        )

    def flops(self) -> float:
        """What its scores and weighted values take."""
        seen = self.batch * self.new * (self.context - (self.new - 1) / 2)
        return 4.0 * seen * self.heads * self.dim


def paged(
    ops: CpuOps | Ops, scene: Scene, query: torch.Tensor, pair: torch.Tensor, stored: torch.dtype
) -> Callable[[], object]:
    """Attention over the keys and values of `pair` [2, batch, context, kv_heads, dim], stored in shuffled pages."""
    page, batch = 16, scene.batch
    pages, common = -(-scene.context // page), scene.shared // page
    cache = ops.new_cache(batch * pages + 1, page, scene.kv_heads, scene.dim, scene.dim, stored, "cpu")
    tables = (torch.randperm(batch * pages) + 1).int().view(batch, pages)
    tables[:, :common] = tables[0, :common]
    at = torch.arange(scene.context)
    for s in range(batch):
        ops.write_cache(cache, pair[0, s], pair[1, s], tables[s, at // page].long() * page + at % page)
    starts = (torch.arange(batch + 1) * scene.new).int()
    lengths = torch.full((batch,), scene.context, dtype=torch.int32)
    return lambda: ops.attention(query, cache, tables, starts, lengths, scene.dim**-0.5)


def attention_case(ops: CpuOps | Ops, label: str, scene: Scene) -> Case:
    """PyTorch gets its keys and values contiguous and in its own order, ours lie in shuffled pages."""
    dtype, batch, context, new = DTYPES[label], scene.batch, scene.context, scene.new
    pair = torch.randn(2, batch, context, scene.kv_heads, scene.dim).to(dtype)
    query = torch.randn(batch * new, scene.heads, scene.dim).to(dtype)
    q = query.view(batch, new, scene.heads, scene.dim).transpose(1, 2)
    # What is seen of a context of which a part is there already cannot be said by is_causal.
    mask = torch.ones(new, context, dtype=torch.bool).tril(context - new) if 1 < new < context else None
    causal = new == context
    k, v = pair.transpose(2, 3).contiguous()
    return Case(
        f"attention {label} {scene}",
        paged(ops, scene, query, pair, dtype),
        lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True),
        scene.flops(),
        pair.nbytes,
    )


def shared_case(ops: CpuOps, label: str, scene: Scene) -> Case:
    """Sequences that begin with the same pages beside the same number with pages of their own."""
    pair = torch.randn(2, scene.batch, scene.context, scene.kv_heads, scene.dim).bfloat16()
    query = torch.randn(scene.batch * scene.new, scene.heads, scene.dim).bfloat16()
    return Case(
        f"{label} {scene} shared={scene.shared}",
        paged(ops, scene, query, pair, CACHE_DTYPES[label]),
        paged(ops, replace(scene, shared=0), query, pair, CACHE_DTYPES[label]),
    )


def attention_cases(ops: CpuOps) -> Iterator[Case]:
    for label in DTYPES:
        for batch, context, new in [(1, 512, 1), (32, 512, 1), (1, 2048, 1), (1, 512, 512)]:
            yield attention_case(ops, label, Scene(batch, context, new, 32, 8, 64))
    yield attention_case(ops, "bf16", Scene(32, 512, 1, 16, 8, 128))
    for context, new in [(1024, 1024), (2048, 2048), (4096, 512), (4096, 2048)]:
        yield attention_case(ops, "bf16", Scene(1, context, new, 32, 8, 64))


def shared_cases(ops: CpuOps) -> Iterator[Case]:
    for label in CACHE_DTYPES:
        for heads, dim in ((16, 128), (32, 64)):
            yield shared_case(ops, label, Scene(32, 1100, 1, heads, 8, dim, 1024))


def experts_cases(ops: CpuOps) -> Iterator[Case]:
    """32 experts, four for each row, chosen at random."""
    count, size, inner = 32, 1024, 768
    up, down = torch.randn(count, 2 * inner, size).bfloat16() * 0.02, torch.randn(count, size, inner).bfloat16() * 0.02
    for method in (None, "int8", "int4-g128"):
        table = quantized_ops(ops_of(ops), method)
        ups, downs = ([table.pack_linear(weight, None) for weight in weights] for weights in (up, down))
        for m in (1, 8, 64):
            yield experts_case(ops, method or "bf16", table, ups, downs, torch.randn(m, size).bfloat16())


def experts_case(
    ops: CpuOps, label: str, table: Ops, ups: list[PackedLinear], downs: list[PackedLinear], x: torch.Tensor
) -> Case:
    count, choices, inner = len(ups), 4, downs[0].in_features
    stack = ops.stack_experts(ups, downs, "silu")
    assert stack is not None
    weights, first = torch.rand(len(x), choices), torch.rand(len(x), count).topk(choices).indices
    one, other = (
        Turn(lambda: (first + random.randrange(count)) % count, COLD_BYTES // 32) for _ in ("one call", "one by one")
    )

    def block(number: int, rows: torch.Tensor) -> torch.Tensor:
        return table.linear(ops.gated(table.linear(rows, ups[number]), "silu"), downs[number])

    return Case(
        f"experts {label} M={len(x)} beside one by one",
        lambda: ops.experts(x, one.next(), weights, stack),
        lambda: mix(x, other.next(), weights, count, block),
        6.0 * len(x) * choices * x.shape[1] * inner,
        sum(ups[e].data.nbytes + downs[e].data.nbytes for e in first.unique().tolist()),
    )


def fused_cases(ops: CpuOps, library: native.Library) -> Iterator[Case]:
    """What step programs make of a norm or a gated activation and the layer of 8 bits behind it, called without Python's
    part of an op on either side."""
    n, k = 4096, 2048
    layer = rounded(ops, "int8", torch.randn(n, k).bfloat16())
    scale, bias = torch.randn(2, k).bfloat16()
    for m in (1, 8, 64):
        x, y, out = torch.randn(m, 2 * k).bfloat16(), torch.empty(m, k).bfloat16(), torch.empty(m, n).bfloat16()
        at, up, weight, shift = x.data_ptr(), x.data_ptr() + 2 * k, scale.data_ptr(), bias.data_ptr()
        to = (layer.layout, 1, y.data_ptr(), k, layer.weights, None, out.data_ptr(), m)
        ends = (layer.layout, layer.weights, None, out.data_ptr())
        for name, first, whole in (
            (
                "rms_norm",
                (1, at, 2 * k, None, weight, y.data_ptr(), None, m, k, 1e-5, 0),
                (1, at, 2 * k, None, weight, None, None, m, k, 1e-5, 0, *ends),
            ),
            (
                "layer_norm",
                (1, at, 2 * k, weight, shift, y.data_ptr(), m, k, 1e-5),
                (1, at, 2 * k, weight, shift, None, m, k, 1e-5, *ends),
            ),
            (
                "gated",
                (1, at, up, 2 * k, y.data_ptr(), m, k, 0),
                (1, at, up, 2 * k, m, k, 0, *ends),
            ),
        ):
            both = partial(getattr(library, f"quire_{name}_quantized_linear"), *whole)
            apart = partial(getattr(library, f"quire_{name}"), *first), partial(library.quire_quantized_linear, *to)
            title = f"{name} + linear int8 M={m} N={n} K={k} beside two calls"
            yield fused_case(title, both, apart, (x, y, out, layer, scale, bias))


def fused_case(title: str, both: Callable[[], None], apart: tuple[Callable[[], None], ...], kept: object) -> Case:
    """`kept` is what the calls have addresses of."""

    def one_by_one() -> None:
        for call in apart:
            call()

    def at_once(_: object = kept) -> None:
        both()

    return Case(title, at_once, one_by_one)


def row_cases(ops: CpuOps, label: str, m: int) -> Iterator[Case]:
    dtype = DTYPES[label]
    x, residual, weight = torch.randn(m, 2048).to(dtype), torch.randn(m, 2048).to(dtype), torch.randn(2048).to(dtype)
    both = torch.randn(m, 2 * 8192).to(dtype)
    yield Case(
        f"add + rms_norm {label} M={m} D=2048",
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6, "down_then_scale"),
        lambda: F.rms_norm(x + residual, (2048,), weight, 1e-6),
    )
    yield Case(
        f"gated silu {label} M={m} F=8192",
        lambda: ops.gated(both, "silu"),
        lambda: F.silu(both[:, :8192]) * both[:, 8192:],
    )


def small_cases(ops: CpuOps) -> Iterator[Case]:
    for label in DTYPES:
        for m in (1, 32):
            yield from row_cases(ops, label, m)
    logits = torch.randn(8, 128256) * 3
    uniform = torch.rand(8, dtype=torch.float64)
    heat, all_ids, fifty, share, none = (torch.full((8,), value) for value in (0.8, 0, 50, 0.95, 0.0))
    yield Case("argmax f32 M=8 V=128256", lambda: ops.argmax(logits), lambda: logits.argmax(-1))
    yield Case(
        "sample top_k=50 top_p=0.95 M=8 V=128256",
        lambda: ops.sample(logits, heat, fifty, share, none, uniform),
        lambda: torch.multinomial(torch.softmax(logits.topk(50).values / 0.8, -1), 1),
    )
    row = logits[:1].bfloat16()
    yield Case(
        "sample bf16 top_k=50 top_p=0.95 M=1 V=128256",
        lambda: ops.sample(row, heat[:1], fifty[:1], share[:1], none[:1], uniform[:1]),
        lambda: torch.multinomial(torch.softmax(row.float().topk(50).values / 0.8, -1), 1),
    )
    yield Case(
        "sample top_p=0.95 M=8 V=128256",
        lambda: ops.sample(logits, heat, all_ids, share, none, uniform),
        lambda: torch.softmax(logits / 0.8, -1).sort(descending=True).values.cumsum(-1),
    )


def call_cost(ops: CpuOps) -> float:
    """Microseconds of one call of an op from Python that has next to nothing to do."""
    seeds = torch.zeros(1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(20_000):
        ops.uniform(seeds, seeds)
    return (time.perf_counter() - start) / 20_000 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="linear,quantized,attention,shared,experts,fused,small")
    parser.add_argument("--rows", default="1,8,32,256,1024", help="M of the linear and quantized cases")
    parser.add_argument("--shape", default="4096,2048", help="N,K of the linear and quantized cases")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each line")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    level = native.choose_level()
    if level is None:
        sys.exit("The native library is not built; `make setup` builds it.")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    ops, library = CpuOps(level), native.Library(level)
    library.set_threads(native.default_threads())
    n, k = (int(part) for part in options.shape.split(","))
    groups = {
        "linear": lambda: linear_cases(ops, [int(m) for m in options.rows.split(",")], (n, k)),
        "quantized": lambda: quantized_cases(ops, [int(m) for m in options.rows.split(",")], (n, k)),
        "attention": lambda: attention_cases(ops),
        "shared": lambda: shared_cases(ops),
        "experts": lambda: experts_cases(ops),
        "fused": lambda: fused_cases(ops, library),
        "small": lambda: small_cases(ops),
    }
    print(f"level {level}, {native.default_threads()} threads, a call from Python {call_cost(ops):.2f} us")
    results = []
    for group in options.only.split(","):
        bandwidth, rate = library.read_bandwidth(), library.multiply_rate(200_000)
        print(f"\nceilings now: {bandwidth / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s (float32)")
        print(f"{'':58s}{'quire ms':>10s}{'other ms':>10s}{'ratio':>7s}{'GFLOP/s':>9s}{'GB/s':>7s}{'ceiling':>9s}")
        for case in groups[group]():
            r = measure(case, options.seconds, bandwidth, rate)
            results.append(r)
            figures = f"{r.gflops:9.0f}{r.gbytes:7.1f}{r.of_ceiling:9.0%}" if case.bytes else ""
            print(f"{r.name:58s}{r.ours_ms:10.3f}{r.torch_ms:10.3f}{r.ratio:7.2f}{figures}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))


if __name__ == "__main__":
    main()

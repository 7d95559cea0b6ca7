"""quire bench latency | throughput: how fast an engine in this process is, beside what the machine allows at best.

Both send token ids and switch the end-of-text token off, so that every run computes the same number of tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire import env, roofline
from quire.cli import bench_serve
from quire.cli.flags import FlagParser
from quire.cli.options import add_engine_flags, add_model_argument, engine_options, section_of
from quire.cli.workloads import Item, WorkloadOptions, make_items
from quire.config import EngineOptions, option, refuse_nonsense
from quire.errors import ConfigError

if TYPE_CHECKING:
    from quire.engine.engine import Engine
    from quire.resolve import EngineConfig

USAGE = """usage: quire bench latency [MODEL] [options]     how long one batch takes
       quire bench throughput [MODEL] [options]  requests and tokens per second
       quire bench serve [options]               how any server that speaks the OpenAI API answers under load

Each with --help shows its options."""
PERCENTILES = (10, 25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    """One batch again and again."""

    input_len: int = option(32, help="prompt tokens of each request", least=1)
    output_len: int = option(128, help="output tokens of each request", least=1)
    batch_size: int = option(8, help="requests that run together", least=1)
    n: int = option(1, help="outputs of each request", least=1)
    num_iters_warmup: int = option(10, help="runs that are not counted", least=0)
    num_iters: int = option(30, help="runs that are counted", least=1)

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine allows at best for the work that was done, measured right after it."""

    bandwidth: float
    flops: float
    seconds: float  # the work at full bandwidth and full speed of arithmetic
    share: float  # of that limit that was reached


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    if argv and argv[0] == "serve":
        return bench_serve.main(argv[1:])
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    kinds = {"latency": latency, "throughput": throughput}
    if not argv or argv[0] not in kinds:
        raise ConfigError(f"Say what to measure.\n{USAGE}")
    env.set_up_logging("warning")
    kinds[argv[0]](argv[1:])
    return 0


def latency(argv: Sequence[str]) -> None:
    """Seconds that a batch takes from start to end."""
    parser = FlagParser("quire bench latency", "Measure how long one batch takes.", "[MODEL]")
    parser.add_section(LatencyOptions, "workload")
    found = parse_bench(parser, argv)
    wanted = section_of(LatencyOptions, found)
    options = engine_options(found)
    engine, config = start(options)
    shape = WorkloadOptions(num_prompts=wanted.batch_size, input_len=wanted.input_len, output_len=wanted.output_len)
    items = make_items(shape, engine.settings.vocab_size, lambda text: [], options.model.seed)
    # Each run has prompts of its own, or the prefix cache would answer.
    runs = [rotated(items, index) for index in range(wanted.num_iters_warmup + wanted.num_iters)]
    seconds = [timed(engine, run, wanted.n, not found.disable_detokenize) for run in runs][wanted.num_iters_warmup :]
    engine.close()
    spread = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else seconds * 99
    report: dict[str, Any] = {
        "avg_latency": statistics.mean(seconds),
        "latencies": seconds,
        "percentiles": {str(percent): spread[percent - 1] for percent in PERCENTILES},
    }
    limit = ceiling(config, items, wanted.n, statistics.median(seconds))
    print(f"Avg latency: {report['avg_latency']:.4f} seconds")
    for percent, value in report["percentiles"].items():
        print(f"{percent}% percentile latency: {value:.4f} seconds")
    finish(report, limit, found.output_json)


def throughput(argv: Sequence[str]) -> None:
    """Requests and tokens per second when all requests are there at once."""
    parser = FlagParser("quire bench throughput", "Measure requests and tokens per second.", "[MODEL]")
    parser.add_section(WorkloadOptions, "workload")
    found = parse_bench(parser, argv)
    wanted = section_of(WorkloadOptions, found)
    options = engine_options(found)
    engine, config = start(options)
    encode = engine.tokenizer.encode if engine.tokenizer is not None else no_tokenizer
    items = make_items(wanted, engine.settings.vocab_size, encode, options.model.seed)
    seconds = timed(engine, items, wanted.n, not found.disable_detokenize)
    engine.close()
    out = sum(item.output_len for item in items) * wanted.n
    total = out + sum(len(item.prompt_token_ids) for item in items)
    report: dict[str, Any] = {
        "elapsed_time": seconds,
        "num_requests": len(items),
        "total_num_tokens": total,
        "requests_per_second": len(items) / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": out / seconds,
    }
    print(
        f"Throughput: {report['requests_per_second']:.2f} requests/s, {report['tokens_per_second']:.2f} total tokens/s, "
        f"{report['output_tokens_per_second']:.2f} output tokens/s"
    )
    finish(report, ceiling(config, items, wanted.n, seconds), found.output_json)


def parse_bench(parser: FlagParser, argv: Sequence[str]) -> Any:
    """The flags that both benchmarks share."""
    add_model_argument(parser)
    parser.add_argument("--output-json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--disable-detokenize", action="store_true", help="leave out turning tokens into text")
    add_engine_flags(parser)
    found = parser.parse(argv)
    if found.output_json is not None and not Path(found.output_json).absolute().parent.is_dir():
        raise ConfigError(f"There is no folder for {found.output_json}; make it before anything is measured.")
    return found


def start(options: EngineOptions) -> tuple[Engine, EngineConfig]:
    """An engine, and what was decided for it."""
    # Imported here: torch and transformers take seconds, and mistakes in flags should answer at once.
    from quire.engine.engine import Engine
    from quire.resolve import resolve

    config = resolve(options)
    return Engine.from_options(options), config


def no_tokenizer(text: str) -> list[int]:
    """Stands in for a tokenizer where there is none."""
    raise ConfigError("A workload of texts needs a tokenizer; leave --skip-tokenizer-init out.")


def rotated(items: list[Item], by: int) -> list[Item]:
    """The same lengths with the tokens of each prompt moved round, so that no prompt begins like an earlier one."""
    found = []
    for item in items:
        ids = item.prompt_token_ids
        at = by % len(ids)
        found.append(replace(item, prompt_token_ids=ids[at:] + ids[:at]))
    return found


def timed(engine: Engine, items: list[Item], n: int, detokenize: bool) -> float:
    """Run all items together; seconds from the first request to the last token."""
    from quire.core.params import RequestOutputKind, SamplingParams

    start = time.perf_counter()
    for index, item in enumerate(items):
        params = SamplingParams(
            n=n,
            temperature=1.0,
            max_tokens=item.output_len,
            ignore_eos=True,
            detokenize=detokenize,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add(f"{start}-{index}", {"prompt_token_ids": item.prompt_token_ids}, params)
    while engine.has_work():
        for output in engine.step():
            if output.outputs[0].finish_reason == "error":
                raise ConfigError(f"Request {output.request_id} failed while it ran; the log says why.")
    return time.perf_counter() - start


def ceiling(config: EngineConfig, items: list[Item], n: int, seconds: float) -> Ceiling:
    """How long the same work would take at the limits of this machine, as they are now."""
    from quire import sizing
    from quire.kernels.table import load_ops

    costs = sizing.group_costs(
        config.layout, config.block_size, config.cache_dtype, load_ops(config.device).cache_bytes
    )
    speed = roofline.measure(config)
    load = roofline.load_of(config)
    prompt = sum(len(item.prompt_token_ids) for item in items)
    out = sum(item.output_len for item in items) * n
    context = prompt // len(items) + out // (2 * len(items) * n)
    together = min(len(items) * n, config.max_num_seqs)
    decode = roofline.decode_rate(load, speed, together, sizing.request_bytes(costs, context, 1))
    best = prompt / roofline.prefill_rate(load, speed) + out / decode
    return Ceiling(speed.bandwidth, speed.flops, best, best / seconds)


def finish(report: dict[str, Any], limit: Ceiling, path: str | None) -> None:
    """Print the limit beside the figures, and write both to a file when asked."""
    print(
        f"Roofline: {limit.seconds:.4g} seconds at {limit.bandwidth / 1e9:.1f} GB/s and {limit.flops / 1e9:,.0f} GFLOP/s; "
        f"{limit.share:.0%} of it reached"
    )
    if path is not None:
        Path(path).write_text(json.dumps(report | {"roofline": asdict(limit)}, indent=2))

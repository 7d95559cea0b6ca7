"""quire plan MODEL: what a model will need and how fast it can be here, from its config and file headers alone.

The same rules decide as when an engine starts, so what is printed is what would be allocated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from quire import env, roofline
from quire.cli.flags import FlagParser
from quire.cli.options import add_engine_flags, add_model_argument, engine_options

if TYPE_CHECKING:
    from quire.resolve import EngineConfig

USUAL_CONTEXT = 2048
BATCH = 32


@dataclass(frozen=True, slots=True)
class PageGroup:
    """One group of layers that share page tables."""

    kind: str
    layers: int
    positions_per_page: int
    page_bytes: int
    pages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is printed. Bytes, tokens, and tokens per second at best."""

    model: str
    architecture: str
    path: str
    tier: str
    device: str
    dtype: str
    parameters: int
    weights_bytes: int
    activations_bytes: int
    pages_bytes: int
    memory_bytes: int
    free_bytes: int
    groups: tuple[PageGroup, ...]
    longest_context: int
    model_context: int
    concurrent_at_2k: int
    max_num_seqs: int
    bandwidth: float
    flops: float
    decode_alone: float
    decode_batch: float
    prefill: float
    binding_limit: str
    notes: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser(
        "quire plan", "Say what a model will need and how fast it can be, without loading it.", "[MODEL]"
    )
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_flags(parser)
    found = parser.parse(argv)
    env.set_up_logging("warning")
    options = engine_options(found)
    if options.model.max_model_len is None:
        # A plan says how far the memory reaches; an engine would refuse to start.
        options = replace(options, model=replace(options.model, max_model_len=-1))
    # Imported here: torch and transformers take seconds, and mistakes in flags should answer at once.
    from quire.resolve import resolve

    plan = make_plan(resolve(options, download=False))
    print(json.dumps(asdict(plan), indent=2) if found.json else as_text(plan))
    return 0


def make_plan(config: EngineConfig) -> Plan:
    """The plan of an engine that would start from `config`; measures this machine for a moment."""
    from quire import resolve, sizing
    from quire.kernels.table import load_ops

    cache_bytes, draft = load_ops(config.device).cache_bytes, None if config.draft is None else config.draft.layout
    costs = sizing.group_costs(config.layout, config.block_size, config.cache_dtype, cache_bytes, draft)
    speed = roofline.measure(config)
    load = roofline.load_of(config)
    at_2k = min(USUAL_CONTEXT, config.max_model_len)
    fits = sizing.concurrent_requests(config.groups, costs, at_2k)
    concurrent = min(fits, config.max_num_seqs)
    context_bytes = sizing.request_bytes(costs, at_2k, 1)
    model_context = resolve.model_length(config.files).value
    return Plan(
        model=config.files.name,
        architecture=config.files.architecture,
        path=config.model_impl,
        tier=config.layout.tier,
        device=config.device,
        dtype=str(config.dtype).removeprefix("torch."),
        parameters=resolve.count_parameters(config.files),
        weights_bytes=config.memory.weights,
        activations_bytes=config.memory.activations,
        pages_bytes=sizing.groups_bytes(config.groups, costs),
        memory_bytes=config.memory.total,
        free_bytes=config.memory.free,
        groups=page_groups(config, [cost.page_bytes for cost in costs]),
        longest_context=config.max_model_len,
        model_context=model_context,
        concurrent_at_2k=concurrent,
        max_num_seqs=config.max_num_seqs,
        bandwidth=speed.bandwidth,
        flops=speed.flops,
        decode_alone=roofline.decode_rate(load, speed, 1, context_bytes),
        decode_batch=roofline.decode_rate(load, speed, max(1, min(BATCH, concurrent)), context_bytes),
        prefill=roofline.prefill_rate(load, speed),
        binding_limit=binding_limit(config.max_model_len, model_context, fits, config.max_num_seqs, load, speed),
        notes=config.layout.notes,
    )


def page_groups(config: EngineConfig, page_bytes: list[int]) -> tuple[PageGroup, ...]:
    """What is said of each group of layers."""
    found = []
    for index, (group, size) in enumerate(zip(config.groups, page_bytes, strict=True)):
        layers = sum(layer.group == index for layer in config.layout.layers)
        found.append(PageGroup(group.kind, layers, group.page_size, size, group.num_pages))
    return tuple(found)


def binding_limit(
    longest: int, model_context: int, fits: int, max_num_seqs: int, load: roofline.Load, speed: roofline.Speed
) -> str:
    """One sentence: what keeps this model from more context, more requests, and more speed."""
    context = "the model's own context" if longest >= model_context else "memory limits the context"
    requests = "max_num_seqs limits the requests" if fits >= max_num_seqs else "memory limits the requests"
    reading = load.read_bytes / speed.bandwidth
    computing = 2 * load.active_weights / speed.flops
    turn = max(1, round(reading / computing))
    return (
        f"{context}; {requests}; one request is limited by memory bandwidth, and from about {turn} at once "
        "arithmetic limits"
    )


def as_text(plan: Plan) -> str:
    """The plan for people."""
    longest = f"{plan.longest_context:,} tokens"
    if plan.longest_context < plan.model_context:
        longest += f" of the model's {plan.model_context:,}: the pages hold no more"
    rows = [
        ("model", f"{plan.model}: {plan.architecture}, {plan.path} path, tier {plan.tier}, on {plan.device}"),
        ("weights", f"{amount(plan.weights_bytes)} in {plan.dtype}, {plan.parameters:,} parameters"),
        ("free memory", f"{amount(plan.free_bytes)} of {amount(plan.memory_bytes)}"),
        ("to be taken", f"activations {amount(plan.activations_bytes)}, pages {amount(plan.pages_bytes)}"),
    ]
    for group in plan.groups:
        held = "one request's state" if group.kind == "state" else f"{group.positions_per_page} positions"
        text = f"{group.pages:,} of {amount(group.page_bytes)}: {held} in {group.layers} layers"
        rows.append((f"{group.kind} pages", text))
    batch = min(BATCH, max(1, plan.concurrent_at_2k))
    rows += [
        ("longest context", longest),
        ("at 2k tokens", f"{plan.concurrent_at_2k:,} requests at once"),
        ("measured here", f"{plan.bandwidth / 1e9:.1f} GB/s, {plan.flops / 1e9:,.0f} GFLOP/s"),
        (
            "speed, at best",
            f"{rate(plan.decode_alone)} tokens/s for one request, {rate(plan.decode_batch)} for {batch}",
        ),
        ("prompts, at best", f"{rate(plan.prefill)} tokens/s"),
        ("limits", plan.binding_limit),
        *(("note", note) for note in plan.notes),
    ]
    return "\n".join(f"{name:<17} {text}" for name, text in rows)


def amount(count: int) -> str:
    """Bytes for people."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:,.2f} GiB"


def rate(value: float) -> str:
    """A speed with two or three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"

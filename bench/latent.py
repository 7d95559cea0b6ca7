"""Latents kept in the pages beside keys and values written out: the same model both ways, its steps in alternation.

    python bench/latent.py [--layers 3] [--contexts 4096 16384] [--prompt 512]

Random weights with the attention of DeepSeek-V2-Lite (16 heads, latents of 512, 64 rotated). Contexts are zeros: speed does
not depend on numbers. Printed are the bytes that a position takes, and medians of decode steps and of parts of a prompt.
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

from quire.config import ModelOptions
from quire.kernels.table import load_ops
from quire.models.assemble import build_transformers
from quire.models.files.hub import find_model
from quire.models.probing.probe import examine, find_class
from quire.models.programs.recorded import Plan, with_program
from quire.models.replacements import latent, rewrite
from quire.models.twin.trial import PagedLoop

PAGE = 16
SHAPE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "moe_intermediate_size": 1408,
    "vocab_size": 8192,
    "max_position_embeddings": 32768,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}


def build(folder: Path, kept: bool, pages: int) -> PagedLoop:
    """A loop over the model, its steps a program."""
    ops, device = load_ops("cpu"), torch.device("cpu")
    files = find_model(ModelOptions(model=str(folder), load_format="dummy"))
    rewrite.propose_latent = latent.propose_latent if kept else lambda *_: {}
    report = examine(find_class(files), files.config, torch.bfloat16)
    model = build_transformers(files, report, 0, torch.bfloat16, device, ops)
    assert all(layer.shared == kept for layer in model.layout.layers)
    loop = PagedLoop(model, ops, PAGE, pages, torch.bfloat16)
    for cache in loop.caches:
        cache.data.zero_()
    loop.model = with_program(model, Plan([PAGE], pages, loop.caches), ops)
    return loop


def alternate(loops: list[PagedLoop], context: int, count: int, times: int) -> list[float]:
    """Median milliseconds of steps of `count` positions behind `context`, of each loop."""
    taken: list[list[float]] = [[] for _ in loops]
    for _ in range(times + 1):
        for loop, own in zip(loops, taken, strict=True):
            sequence = loop.start(0, [5 + place % 800 for place in range(context + count)])
            sequence.pages = [list(range(1, 2 + (context + count) // PAGE))]
            sequence.computed = context
            began = time.perf_counter()
            loop.step([(sequence, count)])
            own.append(1e3 * (time.perf_counter() - began))
    return [statistics.median(own[1:]) for own in taken]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--prompt", type=int, default=512)
    options = parser.parse_args()
    shape = {**SHAPE, "num_hidden_layers": options.layers, "first_k_dense_replace": options.layers}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(shape))
        pages = (max(options.contexts) + options.prompt) // PAGE + 40
        loops = [build(folder, kept, pages) for kept in (True, False)]
    sizes = [sum(cache.data[0].nbytes for cache in loop.caches) // PAGE for loop in loops]
    print(f"bytes a position: {sizes[0]:,} kept, {sizes[1]:,} written out ({sizes[1] / sizes[0]:.1f} times)")
    for context in options.contexts:
        kept, out = alternate(loops, context, 1, 20)
        print(f"a token behind {context}: {kept:.2f} and {out:.2f} ms ({out / kept:.2f} times as fast)")
    for context in (0, options.contexts[0] - options.prompt):
        kept, out = alternate(loops, context, options.prompt, 2)
        print(f"{options.prompt} tokens behind {context}: {kept:.0f} and {out:.0f} ms ({kept / out:.2f} of the time)")


if __name__ == "__main__":
    main()

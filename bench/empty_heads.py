"""EAGLE and Medusa heads of the right shape for a model, all of zeros: they cost what trained ones cost, and guess nothing.

With them a benchmark measures what a step with guesses takes, and so how many tokens it must bring to pay.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from shapes import SHAPES

MEDUSA_HEADS = 3


def write_heads(method: str, shape: str, folder: Path) -> Path:
    """Write heads for `method`, eagle or medusa, and a model of this shape; their folder."""
    target = folder / f"{method}-{shape}"
    target.mkdir(parents=True, exist_ok=True)
    config, tensors = (_eagle if method == "eagle" else _medusa)(shape)
    (target / "config.json").write_text(json.dumps(config))
    whole = {name: torch.zeros(sizes, dtype=torch.bfloat16) for name, sizes in tensors.items()}
    save_file(whole, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _eagle(shape: str) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """A Llama's layer and what joins embedding and state: config, and sizes by names."""
    found = SHAPES[shape]
    size, inner, width = found["hidden_size"], found["intermediate_size"], found["head_dim"]
    queries, keys = width * found["num_attention_heads"], width * found["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (queries, size),
        "self_attn.k_proj": (keys, size),
        "self_attn.v_proj": (keys, size),
        "self_attn.o_proj": (size, queries),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
        "post_attention_layernorm": (size,),
    }
    tensors = {f"layers.0.{name}.weight": sizes for name, sizes in layer.items()}
    config = {**found, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
    return config, {"fc.weight": (size, 2 * size), **tensors}


def _medusa(shape: str) -> tuple[dict[str, object], dict[str, tuple[int, ...]]]:
    """Heads of one block each: config, and sizes by names."""
    size, words = SHAPES[shape]["hidden_size"], SHAPES[shape]["vocab_size"]
    tensors: dict[str, tuple[int, ...]] = {}
    for head in range(MEDUSA_HEADS):
        tensors |= {f"{head}.0.linear.weight": (size, size), f"{head}.0.linear.bias": (size,)}
        tensors[f"{head}.1.weight"] = (words, size)
    return {"medusa_num_heads": MEDUSA_HEADS, "medusa_num_layers": 1}, tensors

"""Models with random weights on disk: a config.json for engines that can do without weights, a safetensors file for starts.

The numbers repeat after a few million, which no engine notices.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from bench.shapes import SHAPES

BLOCK = 1 << 22  # random numbers that are different


def model_folder(models: Path, shape: str, quantization: dict[str, Any] | None, stored: bool) -> Path:
    """The folder of a shape, made when it is not there; with weights when `stored`, they are read once to be in memory."""
    words = [shape, quantization["quant_method"] if quantization else "", "stored" if stored else ""]
    folder = models / "-".join(word for word in words if word)
    folder.mkdir(parents=True, exist_ok=True)
    config = SHAPES[shape] | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if stored:
        weights = folder / "model.safetensors"
        if not weights.exists():
            write_weights(weights, tensors_of(shape))
        read_through(weights)
    return folder


def tensors_of(shape: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint of the Llama or Qwen3 kind with tied output weights."""
    config = SHAPES[shape]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", hidden // heads)
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * head, hidden),
            "self_attn.k_proj": (kv_heads * head, hidden),
            "self_attn.v_proj": (kv_heads * head, hidden),
            "self_attn.o_proj": (hidden, heads * head),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        if config["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (head,), "self_attn.k_norm": (head,)}
        found |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return found


def write_weights(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file in bfloat16: matrices around zero, vectors (the norms) all one."""
    # Imported here: nothing else of the comparison needs it, and its tests run without.
    import numpy as np

    header, offset = {}, 0
    for name, size in tensors.items():
        count = 2 * int(np.prod(size))
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    numbers = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(0.02)
    block = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    fresh = path.with_suffix(f".{os.getpid()}")
    with fresh.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for size in tensors.values():
            count = 2 * int(np.prod(size))
            source = b"\x80\x3f" * size[0] if len(size) == 1 else block
            for start in range(0, count, len(source)):
                file.write(source[: count - start])
    fresh.rename(path)


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass

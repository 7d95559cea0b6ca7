"""Writes a GGUF file of a shape with random weights in bfloat16. Runs in llama.cpp's environment.

python write_gguf.py CONFIG.json TARGET.gguf
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

BLOCK = 1 << 22  # random numbers that are different


def describe(writer: GGUFWriter, config: dict[str, Any], head: int) -> None:
    """The keys that llama.cpp reads the shape from."""
    writer.add_name("random")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])


def add_vocabulary(writer: GGUFWriter, size: int) -> None:
    """As many tokens as the shape has, none of which means anything; the first ones are what a tokenizer must have."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % value for value in range(256))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    tokens += [b"t%d" % index for index in range(len(tokens), size)]
    kinds += [TokenType.NORMAL] * (size - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def matrices(config: dict[str, Any], head: int) -> dict[str, tuple[int, int]]:
    """Name -> (outputs, inputs). The output matrix is the embedding."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    found = {"token_embd": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = {
            "attn_q": (heads * head, hidden),
            "attn_k": (kv_heads * head, hidden),
            "attn_v": (kv_heads * head, hidden),
            "attn_output": (hidden, heads * head),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        found |= {f"blk.{index}.{name}": size for name, size in layer.items()}
    return found


def vectors(config: dict[str, Any], head: int) -> dict[str, int]:
    """Name -> size of each norm."""
    found = {"output_norm": config["hidden_size"]}
    for index in range(config["num_hidden_layers"]):
        found |= {f"blk.{index}.{name}": config["hidden_size"] for name in ("attn_norm", "ffn_norm")}
        if config["model_type"] == "qwen3":
            found |= {f"blk.{index}.{name}": head for name in ("attn_q_norm", "attn_k_norm")}
    return found


def main() -> None:
    """Write the file under another name first, so that a half-written one is never taken for a whole one."""
    config = json.loads(Path(sys.argv[1]).read_text())
    target = Path(sys.argv[2])
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    fresh = target.with_suffix(f".{os.getpid()}")
    writer = GGUFWriter(fresh, config["model_type"])
    describe(writer, config, head)
    add_vocabulary(writer, config["vocab_size"])
    sizes = matrices(config, head)
    numbers = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(0.02)
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    largest = max(rows * columns for rows, columns in sizes.values())
    supply = np.resize(halves, largest).view(np.uint8)  # all tensors show parts of it
    for name, (rows, columns) in sizes.items():
        data = supply[: 2 * rows * columns].reshape(rows, 2 * columns)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=GGMLQuantizationType.BF16)
    for name, size in vectors(config, head).items():
        writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fresh.rename(target)


if __name__ == "__main__":
    main()

"""Models of uneven sizes through the whole engine: prompts of many lengths in one batch, cut into chunks, over many pages.

What is compared is each token's log-probability with that of the library's model over the same text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams

LENGTHS = (1, 17, 40, 131)
NEW = 20
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
ODD = {
    "vocab_size": 331,
    "hidden_size": 35,
    "intermediate_size": 51,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "no size a multiple of 16": ("llama", {**ODD, "head_dim": 20}),
    "seven heads on one": ("llama", {**ODD, "num_attention_heads": 7, "head_dim": 8, "num_hidden_layers": 1}),
    "heads of 80, biases, llama3 rope": (
        "llama",
        {"head_dim": 80, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    ),
    "heads of 192": ("llama", {"head_dim": 192, "num_key_value_heads": 4}),
    "heads of 256, three on one": (
        "qwen3",
        {"head_dim": 256, "num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 33},
    ),
    "a window smaller than a page": ("mistral", {**ODD, "head_dim": 24, "sliding_window": 5}),
    "layers of both kinds": (
        "qwen2",
        {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "three of seven experts": (
        "qwen3_moe",
        {
            **ODD,
            "hidden_size": 40,
            "head_dim": 24,
            "moe_intermediate_size": 20,
            "num_experts": 7,
            "num_experts_per_tok": 3,
        },
    ),
    "a rope for each kind of layer": (
        "gemma3_text",
        {"num_hidden_layers": 7, "head_dim": 40, "sliding_window": 11, "rope_parameters": BY_KIND},
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_every_token_is_as_likely_as_the_library_says(case: str, tmp_path: Path) -> None:
    family, changes = CASES[case]
    folder = write_tiny(tmp_path / "a name with spaces", family, tokenizer=False, **changes)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]
    llm = LLM(
        str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    llm.close()
    library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for prompt, answer in zip(prompts, answers, strict=True):
        ids, told = list(answer.outputs[0].token_ids), answer.outputs[0].logprobs
        assert len(ids) == NEW and told is not None
        logits = library(torch.tensor([prompt + ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        likely = logits.log_softmax(-1)
        mine = torch.tensor([entry[token].logprob for token, entry in zip(ids, told, strict=True)])
        torch.testing.assert_close(mine, likely.gather(1, torch.tensor(ids)[:, None])[:, 0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(mine, likely.max(-1).values, rtol=1e-3, atol=1e-3)

"""Writes tiny random models as a user would find them: config, safetensors, generation config, tokenizer.

Every test suite may import this. Shapes are small and uneven on purpose; weights are seeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 320

TEXT = [
    "Once upon a time a small fox lived near the river and counted the stars.",
    "The quick brown fox jumps over the lazy dog, then sleeps till morning.",
    "How many apples has Anna? One, two, three, four, five; nobody counted the rest.",
]

DENSE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**DENSE, "rms_norm_eps": 1e-5},
    "mistral": {**DENSE, "head_dim": 8, "sliding_window": 24},
    "qwen2": {**DENSE, "tie_word_embeddings": True},
    "qwen3": {**DENSE, "head_dim": 16},
    "qwen3_moe": {
        **DENSE,
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "mixtral": {**DENSE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {**DENSE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**DENSE, "head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {**DENSE, "original_max_position_embeddings": 512},
    "gpt2": {
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        **DENSE,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        **EXPERTS,
    },
    "youtu": {
        **DENSE,
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "pad_token_id": None,  # the library would write zeros over that row after loading
    },
    "qwen3_next": {
        **DENSE,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


def tiny_config(family: str, **changes: Any) -> Any:
    """The tiny config object of a family (a transformers model_type), with fields changed."""
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **{**FAMILIES[family], **changes})


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A float32 causal LM of that config with seeded weights spread enough for its tokens to differ."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=torch.float32).eval()
    tied = model.config.get_text_config().tie_word_embeddings
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # A large tied embedding would make every model repeat its last token.
                parameter.normal_(0.0, 0.3 if parameter.shape[0] != VOCAB else 0.05 if tied else 1.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def write_tiny(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Write a tiny model to `folder` (made if missing) and return it. `max_shard_size` of "40KB" gives an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family, seed, **changes).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of VOCAB entries, trained on TEXT, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=False))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<unk>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=512,
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(folder)

"""Sizes of the tiny twin as data: what each size field of a config becomes, and the few configs that need more.

A field that is absent here keeps its value. An override is for configs whose fields depend on each other in a way that
shrinking one by one breaks; it never changes what kind of layer a model has.
"""

from __future__ import annotations

from typing import Any


def _all(names: str, value: int) -> dict[str, int]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, int] = {
    **_all("vocab_size vocab_size_per_layer_input", 99),
    **_all("hidden_size n_embd d_model dim model_dim embedding_size embed_dim embedding_dim emb_dim", 32),
    **_all("word_embed_proj_dim attention_hidden_size lru_width", 32),
    **_all("num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks", 3),
    **_all("num_decoder_layers num_encoder_layers", 3),
    **_all("num_attention_heads n_head n_heads num_heads swa_num_attention_heads", 4),
    **_all("decoder_attention_heads encoder_attention_heads num_decoder_attention_heads", 4),
    **_all("num_encoder_attention_heads", 4),
    **_all("head_dim attention_head_size kv_channels swa_head_dim swa_v_head_dim d_kv d_head", 8),
    **_all("global_head_dim", 16),
    **_all("intermediate_size ffn_dim n_inner d_ff decoder_ffn_dim encoder_ffn_dim dff ffn_hidden_size", 48),
    **_all("intermediate_size_mlp dense_intermediate_size block_ffn_dim", 48),
    **_all("moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size", 16),
    **_all("shared_intermediate_size moe_shared_expert_intermediate_size expert_intermediate_size", 16),
    **_all("moe_latent_size moe_ffn_hidden_size", 16),
    **_all("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts", 4),
    **_all("num_experts_per_tok moe_top_k top_k_experts num_experts_per_token moe_topk moe_k", 2),
    **_all("topk_group n_shared_experts moe_num_shared_experts num_shared_experts", 1),
    **_all("n_group num_expert_group", 2),
    **_all("kv_lora_rank q_lora_rank qk_head_dim", 16),
    **_all("qk_nope_head_dim qk_rope_head_dim v_head_dim", 8),
    **_all("index_n_heads", 8),
    **_all("index_head_dim", 16),
    # What changes with the length of a text must change within those that are tried.
    **_all("index_topk keep_window_size block_size floor_scale log_scaling_n_floor", 8),
    **_all("index_block_size", 4),
    **_all("index_topk_blocks", 2),
    **_all("max_position_embeddings n_positions n_ctx max_target_positions max_sequence_length max_seq_len", 512),
    **_all("original_max_position_embeddings", 256),
    **_all("sliding_window attention_window_size local_attention window_size attention_chunk_size", 8),
    **_all("sliding_window_size", 8),
    **_all("first_k_dense_replace moe_layer_start_index num_dense_layers n_dense_layers", 1),
    **_all("moe_layer_end_index", 2),
    **_all("hidden_size_per_layer_input", 8),
    **_all("laurel_rank", 4),
    **_all("num_kv_shared_layers", 1),
    **_all("altup_num_inputs", 2),
    **_all("mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_headdim mamba_d_state", 8),
    **_all("state_size ssm_state_size", 8),
    **_all("n_mamba_heads mamba_expand", 2),
    **_all("mamba_d_ssm", 64),
    **_all("mamba_chunk_size mamba_dt_rank time_step_rank chunk_size", 4),
    **_all("mamba_n_groups n_groups mamba_ngroups", 2),
    **_all("linear_num_value_heads linear_num_heads", 4),
    **_all("linear_num_key_heads", 2),
    **_all("linear_key_head_dim linear_value_head_dim linear_head_dim dim_head", 8),
    **_all("dim_ff", 48),
    **_all("position_bias_num_buckets", 32),
    **_all("prompt_length", 4),
    **_all("rotary_dim", 4),
    **_all("type_vocab_size", 2),
}

# A zero in these says that the thing is absent, and must stay zero.
ZERO_MEANS_NONE = {
    "first_k_dense_replace",
    "hidden_size_per_layer_input",
    "moe_num_shared_experts",
    "n_dense_layers",
    "n_group",
    "n_shared_experts",
    "num_dense_layers",
    "num_kv_shared_layers",
    "num_shared_experts",
    "topk_group",
}

# A one in these says that nothing is divided, and must stay one.
ONE_MEANS_NONE = {"mamba_n_groups", "mamba_ngroups", "n_group", "n_groups", "num_expert_group"}

_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {
        "text_config": {"swa_head_dim": 16, "head_dim": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"swa_head_dim": 16, "head_dim": 16},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16, "H_cycles": 2, "L_cycles": 3},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {
        "head_dim": 8,
        "num_experts": 4,
        "moe_topk": 2,
        "moe_intermediate_size": 16,
        "num_shared_expert": 1,
    },
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "lfm2": {"num_hidden_layers": 3, "full_attn_idxs": [1], "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "minimax_m3_vl_text": {"index_n_heads": 2},  # as many as key heads
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "openai-gpt": {"afn": "gelu"},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "indexer_head_dim": 8,
    },
    "xlm": {"emb_dim": 32, "n_heads": 4},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _MROPE}},
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE}},
}

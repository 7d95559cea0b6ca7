"""config.json of the native families, read without the Transformers library: importing its config classes takes seconds.

Either every field is known and of the type that the library would accept, and then the values are those of its config
class, defaults included; or the answer is None, and the library's own class reads the file and says what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("bfloat16", "float16", "float32")
# What the library knows and quire's arithmetic does not depend on.
WITHOUT_EFFECT = frozenset(
    [
        "_name_or_path", "architectures", "attention_dropout", "initializer_range", "max_window_layers", "model_type",
        "output_router_logits", "pretraining_tp", "router_aux_loss_coef", "transformers_version", "unsloth_fixed",
        "unsloth_version", "use_cache",
    ]
)  # fmt: skip
# Without effect at this value; any other is the library's to judge.
WITHOUT_EFFECT_AS = {
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_llama_config": True,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "rope_interleaved": False,
    "use_mrope": False,
}
LAYER_TYPES = ("full_attention", "sliding_attention")

_SIZES: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
_QWEN: dict[str, Any] = {
    **_SIZES,
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
    "head_dim": None,
}
# The fields of each model_type, with what counts where the file has none.
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {
        **_SIZES,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        **_SIZES,
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128, "attention_bias": False},
    "qwen3_moe": {
        **{key: value for key, value in _QWEN.items() if key not in ("layer_types", "max_window_layers")},
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
        "mlp_only_layers": None,
    },
}
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
MAY_BE_NULL = {
    "llama": ("num_key_value_heads", "head_dim"),
    "mistral": ("head_dim", "sliding_window"),
    "qwen2": ("num_key_value_heads", "sliding_window", "layer_types"),
    "qwen3": ("num_key_value_heads", "sliding_window", "layer_types"),
    "qwen3_moe": ("sliding_window", "mlp_only_layers"),
}
# Each kind of rope: the fields that it must have, and those that it may have beside rope_type and rope_theta.
ROPE_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset(["factor"]), frozenset()),
    "dynamic": (frozenset(["factor"]), frozenset()),
    "yarn": (
        frozenset(["factor"]),
        frozenset(
            [
                "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
                "mscale_all_dim", "truncate",
            ]
        ),
    ),
    "longrope": (
        frozenset(["short_factor", "long_factor"]),
        frozenset(["original_max_position_embeddings", "attention_factor", "factor"]),
    ),
    "llama3": (
        frozenset(["factor", "low_freq_factor", "high_freq_factor"]),
        frozenset(["original_max_position_embeddings"]),
    ),
}  # fmt: skip
STRETCHED = ("llama3", "yarn", "longrope")  # kinds that were made for a longer context than the model was trained on


@dataclass(slots=True)
class NativeConfig:
    """What quire reads of a config. It answers like the library's config object where both are read.

    None stands for what a family does not have.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_parameters: dict[str, Any]
    dtype: str | None
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | None
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    decoder_sparse_step: int | None = None
    moe_intermediate_size: int | None = None
    num_experts_per_tok: int | None = None
    num_experts: int | None = None
    norm_topk_prob: bool | None = None
    mlp_only_layers: list[int] | None = None
    architectures: list[str] | None = None
    name_or_path: str = ""

    def get_text_config(self) -> NativeConfig:
        """Itself: the native families have no other part."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)


def read_native(raw: Mapping[str, Any]) -> NativeConfig | None:
    """The config of a native family, its rope already in today's spelling; None where the library must read it."""
    named = raw.get("architectures")
    if not isinstance(named, list) or len(named) != 1:
        return None
    family = MODEL_TYPES.get(str(named[0]))
    if family is None or raw.get("model_type") != family:
        return None
    fields = _fields(family, raw)
    if fields is None or not _fits_together(fields):
        return None
    rope = _rope(raw, fields["max_position_embeddings"])
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    tokens = {key: raw.get(key, FAMILY_FIELDS[family].get(key)) for key in _TOKENS}
    if rope is None or dtype not in (None, *DTYPES) or not all(_is_token(*item) for item in tokens.items()):
        return None
    return NativeConfig(family, architectures=named, rope_parameters=rope, dtype=dtype, **tokens, **fields)


_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROPES = ("rope_scaling", "rope_parameters", "rope_theta")
_READ_APART = frozenset((*_TOKENS, *_ROPES, "dtype", "torch_dtype"))
_KINDS: dict[str, type] = {"layer_types": list, "mlp_only_layers": list}  # of fields whose default does not tell


def _fields(family: str, raw: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields with their defaults, and what follows from others worked out. None for what is not certain."""
    known = FAMILY_FIELDS[family]
    for key, value in raw.items():
        if key in WITHOUT_EFFECT_AS:
            if type(value) is not type(WITHOUT_EFFECT_AS[key]) or value != WITHOUT_EFFECT_AS[key]:
                return None
        elif key not in known and key not in WITHOUT_EFFECT and key not in _READ_APART:
            return None
    found = {key: raw.get(key, default) for key, default in known.items() if key not in _TOKENS}
    for key, value in found.items():
        kind = _KINDS.get(key) or (int if known[key] is None else type(known[key]))
        if type(value) is not kind and not (value is None and (key in MAY_BE_NULL[family] or key not in raw)):
            return None
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    if found["num_attention_heads"] > 0 and found["head_dim"] is None:
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    if not found.pop("use_sliding_window", True):
        found["sliding_window"] = None
    if "layer_types" in found:
        first = found.pop("max_window_layers")
        windows = [found["sliding_window"] is not None and i >= first for i in range(found["num_hidden_layers"])]
        if found["layer_types"] is None:
            found["layer_types"] = [LAYER_TYPES[window] for window in windows]
    if found.get("mlp_only_layers", ()) is None:
        found["mlp_only_layers"] = []
    return found


def _fits_together(fields: Mapping[str, Any]) -> bool:
    """Whether sizes are possible. What is wrong with others is the library's to say."""
    sizes = [value for key, value in fields.items() if type(value) is int and key != "sliding_window"]
    layer_types = fields.get("layer_types")
    return (
        min(sizes) > 0
        and fields["hidden_size"] % fields["num_attention_heads"] == 0
        and fields["head_dim"] % 2 == 0
        and (layer_types is None or len(layer_types) == fields["num_hidden_layers"])
        and all(kind in LAYER_TYPES for kind in layer_types or ())
        and all(type(layer) is int for layer in fields.get("mlp_only_layers") or ())
    )


def _rope(raw: Mapping[str, Any], positions: int) -> dict[str, Any] | None:
    """The rope's parameters with its type and base among them."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        return None
    rope = {"rope_theta": raw.get("rope_theta", 10_000.0), "rope_type": "default", **given}
    kind = rope["rope_type"]
    if kind in STRETCHED:
        rope.setdefault("original_max_position_embeddings", positions)
    if kind not in ROPE_FIELDS or not all(_is_rope_value(key, value) for key, value in rope.items()):
        return None
    needed, allowed = ROPE_FIELDS[kind]
    own = rope.keys() - {"rope_type", "rope_theta"}
    return rope if needed <= own and own <= needed | allowed else None


def _is_rope_value(key: str, value: Any) -> bool:
    if key == "rope_type":
        return True
    if key == "truncate":
        return type(value) is bool
    numbers = value if key in ("short_factor", "long_factor") and isinstance(value, list) else [value]
    return all(type(number) in (int, float) and number > 0 for number in numbers)


def _is_token(key: str, value: Any) -> bool:
    if key == "eos_token_id" and isinstance(value, list):
        return all(type(one) is int for one in value)
    return value is None or type(value) is int

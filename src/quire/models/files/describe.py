"""What a model's JSON files say: config with overrides, architecture, remote code, quantization, generation defaults.

The one place that decides whether code that comes with a model may run. Reads files of a folder, nothing else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.config import ModelOptions
from quire.errors import ConfigError, ModelError, ModelNotFoundError, UnsupportedModelError
from quire.models.files.native_config import read_native
from quire.placeholders import placeholder
from quire.quant.checkpoints import Scheme, check_wish, read_scheme
from quire.quant.format import check_method

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
ROPE_NAMES = {"su": "longrope", "mrope": "default"}  # older names of the same thing
# The least and the most that a field may hold; zeros are what models without attention write.
SIZES = {
    "hidden_size": (1, 2**24),
    "num_hidden_layers": (1, 10_000),
    "vocab_size": (1, 2**31),
    "intermediate_size": (0, 2**31),
    "num_attention_heads": (0, 2**20),
    "num_key_value_heads": (0, 2**20),
    "head_dim": (0, 2**20),
}
SAMPLING_KEYS = (
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_new_tokens",
)


@dataclass(frozen=True, slots=True)
class Description:
    """A model as its files describe it."""

    config: Any  # a NativeConfig, or transformers' config object
    raw_config: dict[str, Any]
    architecture: str
    remote_code: bool  # the model runs code of its own, and the user allowed it
    scheme: Scheme | None  # how its linears are stored, where they are quantized


def describe(folder: Path, name: str, options: ModelOptions) -> Description:
    """Read config.json of `folder`. Raises ModelNotFoundError, UnsupportedModelError or ConfigError."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelNotFoundError(_no_config(folder, name))
    raw = _overlaid(read_json(path), options.hf_overrides)
    check_fields(raw, name)
    scheme = check_quantization(folder, name, raw, options)
    remote = runs_remote_code(raw, name, options)
    config: Any = read_native(_modern(raw)) or library_config(folder, name, raw, remote)
    config.name_or_path = str(folder)
    return Description(config, raw, str(config.architectures[0]), remote, scheme)


def library_config(folder: Path, name: str, raw: Mapping[str, Any], remote: bool) -> Any:
    """transformers' config object of a config.json, read with overrides. Raises UnsupportedModelError or ModelError."""
    modern = _modern(raw)
    if not remote and "model_type" not in modern:
        modern["model_type"] = _model_type_of(modern, name)
    config = _config_object(folder, name, modern, remote)
    config.architectures = [_architecture(modern, config, name)]
    config.name_or_path = str(folder)
    return config


def _modern(raw: Mapping[str, Any]) -> dict[str, Any]:
    return modernized({key: value for key, value in raw.items() if key not in QUANTIZATION_KEYS})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if instead := placeholder(path):
            raise ModelError(f"{path} is {instead}.") from error
        raise ModelError(f"{path} cannot be read as JSON: {error}. Download or copy it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds a {type(found).__name__}, not a JSON object, so it describes no model.")
    return found


def check_fields(raw: Mapping[str, Any], name: str) -> None:
    """Raise ModelError for numbers that no model has: those from which everything else is computed."""
    architectures = raw.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise _impossible(name, "architectures", architectures, "a list of names")
    text = raw.get("text_config")
    for config in (raw, text if isinstance(text, Mapping) else {}):
        for key, (least, most) in SIZES.items():
            value = config.get(key)
            if isinstance(value, int) and not least <= value <= most:
                raise _impossible(name, key, value, f"from {least} to {most}")
        rope = config.get("rope_parameters") or config.get("rope_scaling")
        for key, value in rope.items() if isinstance(rope, Mapping) else ():
            if key in ("factor", "rope_theta") and not (isinstance(value, int | float) and value > 0):
                raise _impossible(name, f"a rope's {key}", value, "a number above 0")


def _impossible(name: str, field: str, found: object, wanted: str) -> ModelError:
    return ModelError(
        f"config.json of {name!r} has {field} {str(found)[:80]!r}; it must be {wanted}. Compare it with the original "
        "config, and check hf_overrides."
    )


def runs_remote_code(raw: Mapping[str, Any], name: str, options: ModelOptions) -> bool:
    """Whether the model needs code that comes with it. The only place where that is allowed or refused."""
    if not raw.get("auto_map") or _known_to_transformers(raw):
        return False
    if not options.trust_remote_code:
        raise UnsupportedModelError(
            f"The model {name!r} (model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')}) is not "
            "part of the installed transformers library; it brings Python code of its own, which can do anything on "
            "this machine. Read that code, and if you trust it start quire with --trust-remote-code "
            "(trust_remote_code=True in Python)."
        )
    return True


def _known_to_transformers(raw: Mapping[str, Any]) -> bool:
    # transformers is imported inside functions: it takes a second, and a wrong path should not wait for it.
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = raw.get("architectures") or []
    return raw.get("model_type") in CONFIG_MAPPING and (not named or any(hasattr(transformers, one) for one in named))


def check_quantization(folder: Path, name: str, raw: Mapping[str, Any], options: ModelOptions) -> Scheme | None:
    """How the weights are stored if they are quantized. Raises UnsupportedModelError or ConfigError for what cannot be."""
    text = raw.get("text_config")
    nested = text.get("quantization_config") if isinstance(text, Mapping) else None
    found = raw.get("quantization_config") or nested or raw.get("compression_config")
    extra = folder / "hf_quant_config.json"
    if found is None and extra.is_file():
        found = read_json(extra).get("quantization", {})
    if found is None:
        scheme = None
    else:
        scheme = read_scheme(name, found if isinstance(found, Mapping) else {})
    check_wish(name, scheme, options.quantization)
    if scheme is None and options.quantization is not None:
        check_method(options.quantization)
    return scheme


def modernized(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config with older spellings of its rope fields brought to today's, in every sub-config."""
    config = {key: modernized(value) if _is_config(key, value) else value for key, value in raw.items()}
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return config
    rope = dict(scaling)
    kind = rope.pop("type", None)
    if "rope_type" not in rope and kind is not None:
        rope["rope_type"] = kind
    rope["rope_type"] = ROPE_NAMES.get(str(rope.get("rope_type")), rope.get("rope_type") or "default")
    original = config.get("original_max_position_embeddings")
    if rope["rope_type"] == "longrope" and original is not None:
        rope.setdefault("original_max_position_embeddings", original)
    config["rope_scaling"] = rope
    return config


def _is_config(key: str, value: Any) -> bool:
    return key.endswith("_config") and isinstance(value, Mapping)


def _overlaid(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, objects member by member."""
    result = dict(base)
    for key, value in over.items():
        known = result.get(key)
        result[key] = _overlaid(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _config_object(folder: Path, name: str, raw: Mapping[str, Any], remote: bool) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if remote:
        # The class comes with the model; what the user laid over the file is laid over its defaults here.
        try:
            own = type(AutoConfig.from_pretrained(folder, trust_remote_code=True))
        except Exception as error:  # the model's own code raises what it likes
            told = " ".join(str(error).split())[:300] or repr(error)
            raise ModelError(
                f"The code that {name!r} brings for its config cannot be used: {told}. Download the repository's *.py "
                "files, too, and what they import; or use a model that transformers knows."
            ) from error
    else:
        kind = raw["model_type"]
        if kind not in CONFIG_MAPPING:
            raise UnsupportedModelError(_unknown_type(name, str(kind), list(CONFIG_MAPPING.keys())))
        own = CONFIG_MAPPING[kind]
    try:
        # The library writes an infinite limit as a tagged object.
        return own.from_dict(own._decode_special_floats(dict(raw)))
    except Exception as error:  # the library's own checks raise many kinds
        told = " ".join(str(error).split())[:300] or repr(error)
        raise ModelError(
            f"config.json of {name!r} is refused by transformers' {own.__name__}: {told}. "
            "A field is missing or impossible; compare it with the original config, and check hf_overrides."
        ) from error


def _unknown_type(name: str, kind: str, known: list[str]) -> str:
    import transformers

    near = difflib.get_close_matches(kind, known, n=1)
    hint = f" The nearest one it knows is {near[0]!r}." if near else ""
    return (
        f"The model {name!r} is of type {kind!r}, which the installed transformers {transformers.__version__} does not "
        f"know, and it brings no code of its own.{hint} A newer transformers may know it: pip install -U transformers."
    )


def _model_type_of(raw: Mapping[str, Any], name: str) -> str:
    """The type of a config that names only its architecture."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    wanted = raw.get("architectures") or []
    for kind, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if architecture in wanted:
            return str(kind)
    raise UnsupportedModelError(
        f"config.json of {name!r} has no model_type, and its architectures ({wanted}) do not tell it. Add one with "
        '--hf-overrides \'{"model_type": "llama"}\' or the type it really is.'
    )


def _architecture(raw: Mapping[str, Any], config: Any, name: str) -> str:
    """The class to run: the first that the config names, else the usual causal language model of its type."""
    named = raw.get("architectures") or []
    if named:
        return str(named[0])
    # Not imported for a config that names its class: it takes a second and a half.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    default = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if default is None:
        raise UnsupportedModelError(
            f"config.json of {name!r} names no architectures, and transformers has no causal language model for the "
            f"type {config.model_type!r}. quire generates text; choose a model that does, or name the class with "
            '--hf-overrides \'{"architectures": ["..."]}\'.'
        )
    return str(default)


def tokenizer_limit(folder: Path) -> int | None:
    """model_max_length of tokenizer_config.json; None when there is none, or a placeholder for "unlimited"."""
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("model_max_length") if path.is_file() else None
    return int(found) if isinstance(found, int | float) and 0 < found < 1 << 40 else None


def _no_config(folder: Path, name: str) -> str:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") if names else "nothing"
    if "adapter_config.json" in names:
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        what = f"It is an adapter of the model {base!r}: give that model, with the adapter beside it."
    elif any(one.endswith(".gguf") for one in names):
        what = "GGUF files are not supported: use the model's original repository in safetensors."
    elif "params.json" in names:
        what = "It is in Mistral's own format: use the repository that has config.json and model*.safetensors."
    else:
        inner = [one for one in names if (folder / one / "config.json").is_file()]
        what = (
            f"Did you mean {folder / inner[0]}?" if inner else "Give a folder with config.json and the weights in it."
        )
    return f"{name!r} has no config.json, so it is no model that quire can read. {folder} holds {shown}. {what}"


# ---------------------------------------------------------------- generation defaults


def read_generation_config(folder: Path, options: ModelOptions) -> dict[str, Any]:
    """generation_config.json of the model, or of the folder that the user named; empty when there is none."""
    source = folder
    if options.generation_config not in ("auto", "vllm"):
        source = Path(options.generation_config).expanduser()
        if not (source / "generation_config.json").is_file():
            raise ConfigError(
                f"generation_config is {options.generation_config!r}, but there is no generation_config.json in that "
                "folder. Use auto (the model's own), vllm (neutral defaults), or a folder that has the file."
            )
    path = source / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def sampling_defaults(
    generation_config: Mapping[str, Any], config: Any, options: ModelOptions
) -> dict[str, float | int]:
    """The model's sampling defaults, under the names of SAMPLING_KEYS; the user's overrides win.

    With generation_config "vllm" only the overrides count. Without a generation_config.json the model's config may
    hold them.
    """
    found: Mapping[str, Any] = generation_config
    if options.generation_config == "vllm":
        found = {}
    elif not generation_config:
        found = config.get_text_config().to_dict()
    merged = {**found, **options.override_generation_config}
    return {key: merged[key] for key in SAMPLING_KEYS if merged.get(key) is not None}


def stop_token_ids(generation_config: Mapping[str, Any], config: Any) -> tuple[int, ...]:
    """Every end-of-sequence id that the model's files name. They stop a request whatever its own parameters say."""
    found = generation_config.get("eos_token_id")
    if found is None:
        found = getattr(config.get_text_config(), "eos_token_id", None)
    if found is None:
        return ()
    ids = found if isinstance(found, list | tuple) else (found,)
    if not all(isinstance(one, int | float) for one in ids):
        raise ModelError(
            f"eos_token_id is {str(found)[:80]!r} in the model's generation_config.json or config.json; it must be a "
            "token id or a list of them. Correct it, or use --generation-config vllm to leave the former out."
        )
    return tuple(dict.fromkeys(int(one) for one in ids if one >= 0))  # -1 stands for none in some files

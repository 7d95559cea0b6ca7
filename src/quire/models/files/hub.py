"""Finding a model: nothing (the bundled one), a local folder, or a hub id. The result is ModelFiles.

Lists weight files and reads JSON; weights themselves are opened by checkpoint.py.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quire.config import ModelOptions
from quire.errors import CheckpointError, ModelNotFoundError
from quire.models.files.describe import (
    describe,
    library_config,
    read_generation_config,
    sampling_defaults,
    stop_token_ids,
    tokenizer_limit,
)
from quire.models.files.headers import WeightHeader, read_index
from quire.models.files.hub_client import fetch, fetch_headers, nearest_folder, repository_files
from quire.models.files.native_config import NativeConfig
from quire.quant.checkpoints import Scheme
from quire.quant.format import KEEP_HEAD

WeightFormat = Literal["safetensors", "pt", "dummy"]
OnShare = Callable[[float], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*")
# Beside the weights of the model itself, repositories keep other people's formats and leftovers of training.
OTHER_WEIGHTS = re.compile(
    r"(consolidated.*|adapter_model.*|optimizer.*|scheduler.*|training_args|rng_state.*|.*_lora)\.(safetensors|bin|pt)"
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on this machine: its files, and its config with the user's overrides applied."""

    name: str  # what the user asked for
    folder: Path  # where config.json lies
    config: Any  # of the whole model: a NativeConfig, or transformers' config object
    raw_config: dict[str, Any]  # config.json as written, with overrides
    generation_config: dict[str, Any]  # generation_config.json as written; empty when there is none
    sampling_defaults: dict[str, float | int]  # what a request gets that does not say
    stop_token_ids: tuple[int, ...]  # every end-of-sequence id the files name
    architecture: str  # the class to run, such as "LlamaForCausalLM"
    weights: tuple[Path, ...]  # files to read; empty for dummy weights
    index: Path | None  # *.index.json that says which file counts for which name
    weight_format: WeightFormat
    tokenizer: str  # folder or hub id to load the tokenizer from
    tokenizer_revision: str | None
    tokenizer_limit: int | None  # the longest input that the tokenizer's own config allows
    trust_remote_code: bool  # the user's decision
    remote_code: bool  # the model runs code of its own
    headers: dict[str, WeightHeader] | None = None  # of weights that were left on the hub
    read_ahead: bool = True  # most of the weights' bytes will be read
    on_share: OnShare | None = None  # hears what share of the weights has been taken
    rounding: str | None = None  # how the user wants the weights to be quantized while they are loaded
    scheme: Scheme | None = None  # how they are quantized already

    @property
    def method(self) -> str | None:
        """What linears mostly are once loaded, by the name of a method that rounds; None where they are not quantized."""
        if self.scheme is None:
            return self.rounding
        return ("int8" if self.scheme.layout == "int-quantized" else "int4") + KEEP_HEAD

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

    @property
    def library_config(self) -> Any:
        """transformers' config object of the whole model, for transformers' own code. Importing it may take seconds."""
        if not isinstance(self.config, NativeConfig):
            return self.config
        return library_config(self.folder, self.name, self.raw_config, self.remote_code)


@dataclass(frozen=True, slots=True)
class _Weights:
    format: WeightFormat
    files: tuple[str, ...]
    index: str | None = None


def find_model(options: ModelOptions, download: bool = True) -> ModelFiles:
    """Find the model that the options name, download what is missing, and read its config.

    Without `download`, safetensors of the hub that are not here stay there, and `headers` says what is in them.

    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError or ConfigError, each saying what was found, what
    was tried and what to do.
    """
    name = options.model or "bundled"
    folder = _folder(options)
    # The config is read before any weight is fetched: most mistakes show here.
    described = describe(folder, name, options)
    weights = _choose(folder, options)
    headers = _obtain(folder, weights, options, download)
    generation_config = read_generation_config(folder, options)
    scheme = None if weights.format == "dummy" else described.scheme
    return ModelFiles(
        name=name,
        folder=folder,
        config=described.config,
        raw_config=described.raw_config,
        generation_config=generation_config,
        sampling_defaults=sampling_defaults(generation_config, described.config, options),
        stop_token_ids=stop_token_ids(generation_config, described.config),
        architecture=described.architecture,
        weights=tuple(folder / file for file in weights.files),
        index=folder / weights.index if weights.index is not None else None,
        weight_format=weights.format,
        tokenizer=options.tokenizer or str(folder),
        tokenizer_revision=options.tokenizer_revision,
        tokenizer_limit=tokenizer_limit(folder),
        trust_remote_code=options.trust_remote_code,
        remote_code=described.remote_code,
        headers=headers,
        rounding=None if scheme is not None else options.quantization,
        scheme=scheme,
    )


def _folder(options: ModelOptions) -> Path:
    """The local folder of the model; for a hub id, the one its small files were put into."""
    if options.model is None:
        return _bundled()
    path = Path(options.model).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        what = "GGUF files are not supported yet." if path.suffix == ".gguf" else "A model is a folder."
        raise ModelNotFoundError(
            f"The model {options.model!r} is a file. {what} Give the folder that holds config.json and the weights"
            + (f": {path.parent}" if (path.parent / "config.json").is_file() else "")
            + "."
        )
    if _looks_local(options.model) or not HUB_ID.fullmatch(options.model):
        raise ModelNotFoundError(
            f"The model {options.model!r} does not exist: there is no such folder, and it is no hub id either "
            f"(like 'organization/name').{nearest_folder(path)}"
        )
    return fetch(options, list(SMALL_FILES) + (["*.py"] if options.trust_remote_code else []))


def _bundled() -> Path:
    folder = Path(str(importlib.resources.files("quire").joinpath("bundled", "model")))
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"No model was named, and this installation lacks the bundled one ({folder} has no config.json). "
            "Install quire again, or name a model: a local folder or a hub id."
        )
    return folder


def _looks_local(model: str) -> bool:
    return model.startswith(("/", "./", "../", "~", ".\\")) or model.count("/") > 1 or "\\" in model


# ---------------------------------------------------------------- weight files


def choose_weights(names: list[str], load_format: str, where: str) -> _Weights:
    """Which of a folder's files hold the model: safetensors before .bin before .pt, no file of another format."""
    if load_format == "dummy":
        return _Weights("dummy", ())
    kinds: dict[str, WeightFormat] = {"safetensors": "safetensors", "bin": "pt", "pt": "pt"}
    allowed = {"auto": ("safetensors", "bin", "pt"), "safetensors": ("safetensors",), "pt": ("bin", "pt")}[load_format]
    for suffix in allowed:
        found = sorted(one for one in names if one.endswith("." + suffix) and not OTHER_WEIGHTS.fullmatch(one))
        for stem in ("model", "pytorch_model"):
            index = f"{stem}.{suffix}.index.json"
            if index in names:
                return _Weights(kinds[suffix], (), index)
            if f"{stem}.{suffix}" in found:
                # A repository may hold variants (model.fp16.safetensors) beside the plain file.
                return _Weights(kinds[suffix], (f"{stem}.{suffix}",))
        if found:
            return _Weights(kinds[suffix], tuple(found))
    others = [one for one in names if one.endswith((".safetensors", ".bin", ".pt", ".gguf", ".h5", ".msgpack"))]
    held = f"It holds {', '.join(others[:4])}, which is not usable here." if others else "It holds no weight files."
    if any(one.endswith(".gguf") for one in others):
        held += " In place of GGUF use the model's original repository, with --quantization int4 or int8 for its size."
    elif "adapter_config.json" in names:
        held += " An adapter is no model: name the one that it was trained on."
    raise CheckpointError(
        f"No weights were found in {where} for load_format {load_format!r} (looked for "
        f"{', '.join('*.' + suffix for suffix in allowed)}). {held} Complete the download, or use --load-format dummy "
        "to run with random weights."
    )


def _with_index(weights: _Weights, folder: Path) -> _Weights:
    """The same with the index's files listed."""
    if weights.index is None:
        return weights
    files = tuple(sorted(set(read_index(folder / weights.index).values())))
    return _Weights(weights.format, files, weights.index)


def _is_remote(options: ModelOptions) -> bool:
    return options.model is not None and not Path(options.model).expanduser().is_dir()


def _choose(folder: Path, options: ModelOptions) -> _Weights:
    """The weight files of the folder, or of the hub's repository whose small files are in it."""
    names = repository_files(options, folder) if _is_remote(options) else [path.name for path in folder.iterdir()]
    return _with_index(choose_weights(names, options.load_format, str(folder)), folder)


def _obtain(folder: Path, weights: _Weights, options: ModelOptions, download: bool) -> dict[str, WeightHeader] | None:
    """See that all weight files are in the folder; or, without `download`, return the headers of those on the hub."""
    missing = [file for file in weights.files if not (folder / file).is_file()]
    if _is_remote(options) and missing:
        if not download and weights.format == "safetensors":
            return fetch_headers(options, folder, weights.files)
        fetch(options, list(weights.files))
        missing = [file for file in weights.files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(weights.files)} weight files are missing in {folder}: {', '.join(missing[:3])}. "
            f"{weights.index or 'The repository'} lists them. Complete the download or the copy."
        )
    return None

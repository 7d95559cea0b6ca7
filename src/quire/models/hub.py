"""Finding a model: nothing (the bundled one), a local folder, or a hub id. The result is ModelFiles.

Lists weight files and reads JSON; weights themselves are opened by checkpoint.py.
"""

from __future__ import annotations

import difflib
import importlib.resources
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from quire.config import ModelOptions
from quire.errors import CheckpointError, ModelNotFoundError
from quire.models.describe import describe, read_generation_config, sampling_defaults, stop_token_ids, tokenizer_limit
from quire.models.headers import read_index

logger = logging.getLogger(__name__)

WeightFormat = Literal["safetensors", "pt", "dummy"]
Result = TypeVar("Result")

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "tokenizer*")
# Beside the weights of the model itself, repositories keep other people's formats and leftovers of training.
OTHER_WEIGHTS = re.compile(
    r"(consolidated.*|adapter_model.*|optimizer.*|scheduler.*|training_args|rng_state.*|.*_lora)\.(safetensors|bin|pt)"
)
TRIES = 3


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on this machine: its files, and its config with the user's overrides applied."""

    name: str  # what the user asked for
    folder: Path  # where config.json lies
    config: Any  # transformers' config object of the whole model
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

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()


@dataclass(frozen=True, slots=True)
class _Weights:
    format: WeightFormat
    files: tuple[str, ...]
    index: str | None = None


def find_model(options: ModelOptions) -> ModelFiles:
    """Find the model that the options name, download what is missing, and read its config.

    Raises ModelNotFoundError, UnsupportedModelError, CheckpointError or ConfigError, each saying what was found, what
    was tried and what to do.
    """
    name = options.model or "bundled"
    folder = _folder(options)
    # The config is read before any weight is fetched: most mistakes show here.
    described = describe(folder, name, options)
    weights = _fetch_weights(folder, options)
    generation_config = read_generation_config(folder, options)
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
            f"(like 'organization/name').{_nearest(path)}"
        )
    return _from_hub(options, list(SMALL_FILES) + (["*.py"] if options.trust_remote_code else []))


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


def _nearest(path: Path) -> str:
    """A hint about what exists near a path that does not."""
    absolute = path.absolute()
    for parent in absolute.parents:
        if not parent.is_dir():
            continue
        missing = absolute.relative_to(parent).parts[0]
        try:
            siblings = sorted(child.name for child in parent.iterdir() if child.is_dir())
        except PermissionError:
            return f" {parent} cannot be read."
        near = difflib.get_close_matches(missing, siblings, n=1)
        if near:
            return f" The nearest existing folder is {parent / near[0]}."
        if path.is_absolute() or len(path.parts) > 2:
            return f" The path exists as far as {parent}, which has no {missing!r} in it."
        return ""
    return ""


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


def _fetch_weights(folder: Path, options: ModelOptions) -> _Weights:
    """List the weight files; for a hub model, download them first."""
    remote = options.model is not None and not Path(options.model).expanduser().is_dir()
    names = _repository_files(options, folder) if remote else [path.name for path in folder.iterdir()]
    weights = _with_index(choose_weights(names, options.load_format, str(folder)), folder)
    if remote and weights.files:
        _from_hub(options, list(weights.files))
    missing = [file for file in weights.files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(weights.files)} weight files are missing in {folder}: {', '.join(missing[:3])}. "
            f"{weights.index or 'The repository'} lists them. Complete the download or the copy."
        )
    return weights


# ---------------------------------------------------------------- the hub


def _from_hub(options: ModelOptions, patterns: list[str]) -> Path:
    """Download the repository's files that match; the folder of its snapshot in the hub's cache."""
    # Imported here: local models need neither the hub's client nor the half second that it takes.
    from huggingface_hub import snapshot_download

    def download() -> str:
        return snapshot_download(
            str(options.model),
            revision=options.revision,
            cache_dir=options.download_dir,
            token=options.hf_token,
            allow_patterns=patterns,
            ignore_patterns=["original/*", "*/*"],
        )

    return Path(_explained(options, download))


def _repository_files(options: ModelOptions, folder: Path) -> list[str]:
    """Names of the repository's files; when the hub cannot be asked, those in its cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    cached = [path.name for path in folder.iterdir()]
    if constants.HF_HUB_OFFLINE:
        return cached
    try:
        return HfApi(token=options.hf_token).list_repo_files(str(options.model), revision=options.revision)
    except (OSError, OfflineModeIsEnabled) as error:
        logger.warning("The hub does not answer (%s); only files in its cache are used.", type(error).__name__)
        return cached


def _explained(options: ModelOptions, download: Callable[[], Result]) -> Result:
    """Run a download: transient failures again, the rest as one paragraph."""
    import httpx
    from huggingface_hub import constants, errors

    for attempt in range(1, TRIES + 1):
        try:
            return download()
        except errors.GatedRepoError as error:
            raise ModelNotFoundError(
                f"The model {options.model!r} is gated on the hub. Accept its terms on its page, then give a token of "
                "that account: --hf-token, or the environment variable HF_TOKEN."
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise ModelNotFoundError(_not_on_hub(options)) from error
        except errors.RevisionNotFoundError as error:
            raise ModelNotFoundError(
                f"The model {options.model!r} has no revision {options.revision!r} on the hub. Name a branch, a tag or a "
                "full commit that exists, or leave --revision out."
            ) from error
        except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, httpx.TransportError) as error:
            offline = constants.HF_HUB_OFFLINE
            if attempt == TRIES or offline:
                tried = "HF_HUB_OFFLINE is set" if offline else f"the hub could not be reached ({TRIES} attempts)"
                raise ModelNotFoundError(
                    f"The model {options.model!r} is not a local folder and not complete in the hub's cache, and "
                    f"{tried}.{_nearest(Path(str(options.model)))} Check the connection, download it elsewhere, or give "
                    "the path of a folder."
                ) from error
        except errors.HFValidationError as error:
            raise ModelNotFoundError(
                f"The model {options.model!r} is neither a folder nor a hub id: {error}"
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if attempt == TRIES or 400 <= status < 500 and status != 429:
                raise ModelNotFoundError(
                    f"The hub refused {options.model!r} with HTTP status {status} ({attempt} attempts). Try again later, "
                    "or download the model elsewhere and give its folder."
                ) from error
        time.sleep(attempt)
    raise AssertionError("the last attempt returns or raises")


def _not_on_hub(options: ModelOptions) -> str:
    access = "the token given has no access to it" if options.hf_token else "it is private and no token was given"
    return (
        f"The model {options.model!r} was not found: there is no such folder here, and the hub knows no such repository "
        f"(or {access}).{_nearest(Path(str(options.model)))} Check the spelling, or set HF_TOKEN."
    )

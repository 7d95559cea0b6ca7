"""Tokenizers that the Transformers library must read: without a tokenizer.json, with code of their own, or unusual ones.

Importing this module does not import that library; reading does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quire.errors import CheckpointError, ModelNotFoundError
from quire.placeholders import placeholder
from quire.text.codec import Codec, Described, LockedCodec, RustCodec

# A library class whose own versions of these are in use cannot be bypassed by calling the Rust tokenizer underneath.
_OVERRIDABLE = ("__call__", "encode", "_encode_plus", "decode", "_decode", "clean_up_tokenization")


def read_with_library(path: str | Path, trust_remote_code: bool, revision: str | None, token: str | None) -> Described:
    """The tokenizer in a folder, or of a hub id. Raises ModelNotFoundError or CheckpointError."""
    from transformers import AutoTokenizer  # here, because it imports torch and takes seconds

    is_folder = Path(path).is_dir()
    if is_folder:
        refuse_placeholders(_read_files(Path(path)))
    try:
        return of_library(
            AutoTokenizer.from_pretrained(
                str(path),
                trust_remote_code=trust_remote_code,
                revision=revision,
                token=token,
                local_files_only=is_folder,
            )
        )
    except OSError as error:
        raise ModelNotFoundError(_missing(path)) from error
    except Exception as error:  # damaged files raise whatever their parser raises, down to a bare Exception from Rust
        if is_folder and not _has_tokenizer(Path(path)):
            raise ModelNotFoundError(_missing(path)) from error
        raise CheckpointError(
            f"The tokenizer of {str(path)!r} cannot be read: {type(error).__name__}: {str(error)[:300]}. Tried its "
            "files with transformers.AutoTokenizer. Download the files again, name another tokenizer with the option "
            "tokenizer, or, if they hold their own code that you trust, set trust_remote_code."
        ) from error


def refuse_placeholders(paths: Iterable[Path]) -> None:
    """Raise CheckpointError for a file that is not what its name says."""
    for path in paths:
        if instead := placeholder(path):
            raise CheckpointError(f"{path} is {instead}.")


def _read_files(folder: Path) -> list[Path]:
    """The files that a tokenizer is read from; those that tokenizer.json stands for only where there is none."""
    patterns = ["tokenizer*.json", "special_tokens_map.json", "added_tokens.json"]
    if not (folder / "tokenizer.json").is_file():
        patterns += ["vocab*", "merges*", "*.model", "*.tiktoken"]
    return [path for pattern in patterns for path in sorted(folder.glob(pattern))]


def of_library(library: Any) -> Described:
    """A tokenizer object of the library, with the Rust tokenizer under it called directly where that gives the same."""
    return Described(
        codec=_codec(library),
        special_tokens={
            name: str(one) for name, one in library.special_tokens_map.items() if not isinstance(one, list)
        },
        extra_special_tokens=tuple(library.all_special_tokens),
        chat_template=library.chat_template,
        library=library,
    )


def is_own(kind: type, name: str) -> bool:
    """Whether a method is not the one that the library has for all tokenizers, or missing."""
    method = getattr(kind, name, None)
    return method is None or not method.__module__.startswith("transformers.tokenization_utils")


def _codec(library: Any) -> Codec:
    backend = getattr(library, "backend_tokenizer", None)
    if backend is None or any(is_own(type(library), name) for name in _OVERRIDABLE):
        return LockedCodec(library)
    forced = getattr(library, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    cleans_up = bool(library.clean_up_tokenization_spaces) and (forced or type(backend.model).__name__ != "BPE")
    return RustCodec(backend, cleans_up, bool(getattr(library, "split_special_tokens", False)))


def _missing(path: str | Path) -> str:
    return (
        f"There is no tokenizer at {str(path)!r}: no tokenizer.json, tokenizer.model or tokenizer_config.json was found "
        "as a local folder, in the hub's cache or on the hub. Give the folder or hub id of one with the option "
        "tokenizer, or run on token ids alone with skip_tokenizer_init."
    )


def _has_tokenizer(folder: Path) -> bool:
    """True when a folder holds any file by which a tokenizer is known."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")) or any(folder.glob("*.tiktoken"))

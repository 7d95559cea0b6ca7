"""The hub: fetching a repository's files, or only the headers of its weights, and explaining each refusal.

Knows repositories and files, nothing of models.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from quire.config import ModelOptions
from quire.errors import CheckpointError, ModelNotFoundError
from quire.models.files.headers import DTYPES, WeightHeader, merge_headers

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

TRIES = 3


def nearest_folder(path: Path) -> str:
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


def fetch(options: ModelOptions, patterns: list[str]) -> Path:
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


def repository_files(options: ModelOptions, folder: Path) -> list[str]:
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


def fetch_headers(options: ModelOptions, folder: Path, files: tuple[str, ...]) -> dict[str, WeightHeader]:
    """The headers of a repository's safetensors files, a few kilobytes of each, without the weights."""
    tables = (_explained(options, partial(_fetch_table, options, folder / file)) for file in files)
    return merge_headers(tables, None)


def _fetch_table(options: ModelOptions, path: Path) -> dict[str, WeightHeader]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        found = HfApi(token=options.hf_token).parse_safetensors_file_metadata(
            str(options.model), path.name, revision=options.revision
        )
        return {
            name: WeightHeader(name, DTYPES[info.dtype], tuple(info.shape), end - begin, begin, path)
            for name, info in found.tensors.items()
            for begin, end in (info.data_offsets,)
        }
    except (SafetensorsParsingError, KeyError) as error:
        raise CheckpointError(
            f"The header of {path.name} in the hub's repository {options.model!r} cannot be read: {error}. The file is "
            "broken, or of a newer kind than quire knows."
        ) from error


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
                    f"{tried}.{nearest_folder(Path(str(options.model)))} Check the connection, download it elsewhere, or "
                    "give the path of a folder."
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
        f"(or {access}).{nearest_folder(Path(str(options.model)))} Check the spelling, or set HF_TOKEN."
    )

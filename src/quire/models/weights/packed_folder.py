"""Where packed weights are kept, and which file a load with the same options used last: so that the next one can read it
before anything else is known. No torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from quire import env
from quire.config import ModelOptions
from quire.models.files.remembered import recall, remember


def packed_folder() -> Path:
    """Not created here."""
    return env.cache_folder() / "packed"


def last_file(options: ModelOptions) -> Path | None:
    """The file that such a load will probably map; None where nothing is known or it is gone."""
    name = recall(_note(options))
    path = None if name is None else packed_folder() / Path(name).name
    return path if path is not None and path.is_file() else None


def note_file(options: ModelOptions, path: Path) -> None:
    """Such a load maps this file, or writes it."""
    if recall(_note(options)) != path.name:
        remember(_note(options), path.name)


def _note(options: ModelOptions) -> Path:
    digest = hashlib.sha256(f"{Path.cwd()} {options}".encode()).hexdigest()
    return packed_folder() / f"{digest[:32]}.last"

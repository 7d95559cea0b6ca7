"""Small things that are remembered on disk between starts: texts that nobody but this user may have written, and what
such a memory depends on: this package's own source, and weight files as they were.

A file is written in one move, so that no reader ever sees half of it. Knows nothing of what is remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger(__name__)

HEAD_BYTES = 1 << 16  # of a weight file, that tell it from another of the same size and time


def recall(path: Path) -> str | None:
    """The text that `remember` wrote there; None where there is none, or none that may be trusted."""
    try:
        with path.open("rb") as file:
            check_owner(file)
            return file.read().decode()
    except (OSError, ValueError):
        return None


def remember(path: Path, text: str) -> None:
    """Write a text in one move. A disk that cannot be written to is no error, and nothing is left of the attempt."""
    part = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            file.write(text)
        part.replace(path)
    except OSError as error:
        logger.info("%s is not remembered: %s", path.name, error)
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()


def check_owner(file: BinaryIO) -> None:
    """Raise ValueError unless the file is this user's and nobody else may write to it."""
    stat = os.fstat(file.fileno())
    if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
        raise ValueError("the file belongs to another user, or others may write to it")


def weight_identity(path: Path) -> list[str | int]:
    """What tells a weight file from another, or from itself before it was changed."""
    real = path.resolve()
    stat = real.stat()
    return [str(real), stat.st_size, stat.st_mtime_ns, _head(real, stat.st_ino, stat.st_size, stat.st_ctime_ns)]


@lru_cache(maxsize=1024)
def _head(path: Path, inode: int, size: int, changed: int) -> str:
    """A hash of the file's first bytes. Read once per start and file: whoever changes a file changes one of these numbers,
    and the time of a change (ctime) cannot be set."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(HEAD_BYTES)).hexdigest()


@cache
def own_source() -> str:
    """A hash of the files that decide how a model is computed, so that nothing remembered outlives the code it is about."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[2]
    for folder in ("models", "layers", "kernels", "quant"):
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()

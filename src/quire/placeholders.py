"""What lies where a file of a model should: a placeholder of Git LFS, or a web page. Knows no format of its own."""

from __future__ import annotations

from pathlib import Path

KINDS = {
    b"version https://git-lfs": "a placeholder of Git LFS, which stands for the file. Run 'git lfs pull' in its folder, or "
    "download it again",
    b"<!doctype html": "a web page, not the file. Download it again, with access to the repository",
    b"<html": "a web page, not the file. Download it again, with access to the repository",
}
HEAD_BYTES = 64


def placeholder(path: Path) -> str | None:
    """What the file is instead of what its name says, and what to do; None where it may be what its name says."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES).lstrip().lower()
    except OSError:
        return None
    return next((kind for begin, kind in KINDS.items() if head.startswith(begin)), None)

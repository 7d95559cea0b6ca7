"""How much an engine takes on disk: packages and bytes, for quire as its pyproject.toml asks for them.

The environment that runs the benchmark may hold more (tools, tests); only what quire itself needs is counted.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from bench.cpu.place import ROOT


@dataclass(frozen=True, slots=True)
class Size:
    """Installed packages, and all their files."""

    packages: int
    bytes: int


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def whole_environment(folder: Path) -> Size:
    """An environment that holds one engine and nothing else."""
    packages = {path.name for path in folder.glob("lib/python*/site-packages/*.dist-info")}
    return Size(len(packages), folder_bytes(folder / "lib"))


def programs(folder: Path) -> Size:
    """Built programs and their libraries."""
    return Size(0, folder_bytes(folder))


def quire() -> Size:
    """quire's own files and the packages that it needs without extras, as they are installed here."""
    # Imported here: it comes with the packages that are being counted.
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting = [Requirement(text) for text in project["dependencies"]]
    found: dict[str, int] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        wanted = waiting.pop()
        key = (wanted.name.lower().replace("_", "-"), frozenset(wanted.extras))
        if key in seen or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        seen.add(key)
        try:
            package = metadata.distribution(wanted.name)
        except metadata.PackageNotFoundError:
            continue  # not needed on this system
        found[key[0]] = sum(file.size or 0 for file in package.files or ())
        for text in package.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                needed.marker = None
                waiting.append(needed)
    source = sum(
        path.stat().st_size for path in (ROOT / "src" / "quire").rglob("*") if path.is_file() and path.suffix != ".pyc"
    )
    return Size(len(found) + 1, sum(found.values()) + source)

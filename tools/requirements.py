"""Print the packages that pyproject.toml asks for: the base ones, or those of the extras named as arguments.

Lets the Makefile install them without building quire first. Knows nothing of versions or of where packages come from.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(extras: list[str]) -> list[str]:
    """Requirement strings of the extras, or of the package itself when none is named."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    if not extras:
        return project["dependencies"]
    return [line for extra in extras for line in project["optional-dependencies"][extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

"""Lets the tests of this folder use the tiny models of tests/models, and a server that nothing was chosen for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from served import Running

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One for each file; files that need another one have their own fixture of this name."""
    from served import served  # only here: it takes seconds to import

    with served() as running:
        yield running

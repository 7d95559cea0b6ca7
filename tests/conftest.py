"""What all tests share: one thread for reproducible and polite runs, and no access to the network."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and the imports of many tests do that


@pytest.fixture(autouse=True)
def quire_logger() -> Iterator[None]:
    """The command line takes quire's log for itself; the next test must be able to listen again."""
    logger = logging.getLogger("quire")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])

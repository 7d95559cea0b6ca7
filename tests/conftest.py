"""What all tests share: one thread for reproducible and polite runs, no network, and nothing that an earlier run left."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["NO_PROXY"] = "*"  # every server that is asked is on this machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and the imports of many tests do that
for name in ("QUIRE_API_KEY", "VLLM_API_KEY", "QUIRE_LOG_LEVEL", "QUIRE_LOG_FORMAT"):
    os.environ.pop(name, None)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """What quire remembers of models is remembered for this run alone."""
    with tempfile.TemporaryDirectory(prefix="quire-tests-", ignore_cleanup_errors=True) as folder:
        os.environ["QUIRE_CACHE"] = folder
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws does not depend on the tests before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(20)


@pytest.fixture(autouse=True)
def quire_logger() -> Iterator[None]:
    """The command line takes quire's log for itself; the next test must be able to listen again."""
    logger = logging.getLogger("quire")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers, logger.propagate = before[0], before[2]
    logger.setLevel(before[1])

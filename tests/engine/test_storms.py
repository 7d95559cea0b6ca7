"""Hundreds of clients that leave at random moments: nothing of them stays. Ten thousand: `make soak`."""

from __future__ import annotations

import logging

import pytest
from storms import storm

pytestmark = pytest.mark.slow


def test_nothing_stays_of_clients_that_leave(capsys: pytest.CaptureFixture[str]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        left = storm(300)
    finally:
        logging.disable(logging.NOTSET)
    with capsys.disabled():
        print("\n" + left.line())
    assert left.tasks <= 0 and left.descriptors <= 0 and left.settled < 30

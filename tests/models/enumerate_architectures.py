"""Runs the parity check over many architectures, each in a process of its own, so that a hang or crash is one result."""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import transformers
from parity import Outcome, architectures, check_architecture, describe_error

TIMEOUT = 300.0  # seconds for one architecture; most need one


def enumerate_architectures(
    model_types: Iterable[str], workers: int = 2, report: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Check each model type, `workers` at a time; the outcomes in the order given. `report` hears each as it comes.

    Processes are forked, so that the library is imported once; call it where no other threads run.
    """
    waiting = list(model_types)
    order = {model_type: i for i, model_type in enumerate(waiting)}
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    running: dict[Connection, tuple[str, Any, float]] = {}
    outcomes: list[Outcome] = []
    while waiting or running:
        while waiting and len(running) < workers:
            model_type = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(model_type, sender), daemon=True)
            process.start()
            sender.close()
            running[receiver] = (model_type, process, time.monotonic())
        ready = wait(list(running), timeout=1.0)
        for receiver in list(running):
            model_type, process, began = running[receiver]
            outcome = _finished(receiver, receiver in ready, model_type, process, time.monotonic() - began)
            if outcome is not None:
                del running[receiver]
                outcome.seconds = round(time.monotonic() - began, 2)
                outcomes.append(outcome)
                if report is not None:
                    report(outcome)
    return sorted(outcomes, key=lambda outcome: order[outcome.model_type])


def _finished(receiver: Connection, ready: bool, model_type: str, process: Any, seconds: float) -> Outcome | None:
    """The outcome of a process that has answered, died or run out of time; None while it works."""
    if ready:
        try:
            outcome = receiver.recv()
        except EOFError:
            process.join()
            outcome = _failed(model_type, f"the process died with exit code {process.exitcode}")
    elif seconds > TIMEOUT:
        outcome = _failed(model_type, f"no answer within {TIMEOUT:.0f} s")
    else:
        return None
    process.kill()
    process.join()
    receiver.close()
    return outcome


def _failed(model_type: str, error: str) -> Outcome:
    return Outcome(model_type, architectures().get(model_type, "?"), error=error)


def _work(model_type: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        outcome = check_architecture(model_type)
    except BaseException as error:  # every failure of one architecture is a result
        outcome = _failed(model_type, describe_error(error))
    sender.send(outcome)
    sender.close()

"""Every causal LM of the installed Transformers: what once gave the tokens of the library's own generate still does.

The expected tiers are data, written by tools/enumerate_models.py, which runs the same code. A better tier is welcome; a
worse one, or other tokens, is a failure.
"""

from __future__ import annotations

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import transformers
from enumerate_architectures import enumerate_architectures
from parity import architectures

from quire.kernels.threads import usable_cpus

ORDER = ("A", "A+mixer", "B", "C")
EXPECTED = json.loads((Path(__file__).parent / "expected_tiers.json").read_text())


def test_no_architecture_is_lost():
    wanted = {name: tier for name, tier in EXPECTED.items() if name in architectures()}
    # In a new process, which no test has left threads in: it forks.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        found = alone.submit(enumerate_architectures, list(wanted), max(2, usable_cpus())).result()
    outcomes = {outcome.model_type: outcome for outcome in found}
    lost = [f"{name}: {outcomes[name].error}" for name in wanted if outcomes[name].error]
    lost += [
        f"{name}: tier {outcomes[name].tier}, was {tier}"
        for name, tier in wanted.items()
        if not outcomes[name].error and ORDER.index(outcomes[name].tier) > ORDER.index(tier)
    ]
    assert not lost, "\n".join(lost)
    print(f"transformers {transformers.__version__}: {len(wanted)} of {len(architectures())} equal")


def test_enough_architectures_are_expected():
    """The table itself must not shrink unnoticed."""
    packed = [name for name, tier in EXPECTED.items() if tier in ("A", "A+mixer")]
    assert len(packed) >= 132
    assert len(EXPECTED) >= 165
    for name in ("llama", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_next", "mamba2", "llama4"):
        assert name in packed


def test_a_failure_is_an_outcome():
    """An architecture that cannot even be made is reported, not raised."""
    (outcome,) = enumerate_architectures(["reformer"])
    assert outcome.tier == "none"
    assert outcome.error

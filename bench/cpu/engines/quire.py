"""quire as one of the engines: the runner in this very environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.cpu.checkpoint import model_folder
from bench.cpu.engines.session import Engine, LineSession, Session, StartSession
from bench.cpu.place import ROOT, Place
from bench.cpu.workloads import CACHE_BYTES, Workload
from bench.shapes import SHAPES

RUNNER = Path(__file__).parents[1] / "runner" / "run.py"


def missing(place: Place) -> str | None:
    """It runs wherever this runs."""
    return None


def open_session(place: Place, workload: Workload, variant: str) -> Session:
    """A runner for the group of `workload`."""
    stored = workload.kind in ("start", "restart")
    settings: dict[str, object] = {
        "engine": "quire",
        "task": "perplexity" if workload.kind == "perplexity" else "generate",
        "quantization": None if variant == "bf16" else variant,
        "threads": place.threads,
    }
    if workload.kind != "perplexity":
        settings |= {
            "model": str(model_folder(place.models, workload.shape, None, stored)),
            "load_format": "auto" if stored else "dummy",
            "cache_bytes": CACHE_BYTES,
            "packed_cache": "on" if workload.kind == "restart" else "auto",
            "vocab_size": SHAPES[workload.shape]["vocab_size"],
        }
    command = [sys.executable, str(RUNNER), json.dumps(settings)]
    environment = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    log = place.logs / f"quire-{workload.shape}-{variant}.log"
    if stored:
        cache = place.peers / "bench" / "quire-cache"
        return StartSession(command, environment | {"QUIRE_CACHE": str(cache)}, log, place, cache)
    return LineSession(command, environment, log, place)


ENGINE = Engine("quire", missing, open_session)

"""The probe: how a model is to be served, decided on its tiny twin and remembered on disk.

`probe` is the whole answer for the Transformers path. A report is remembered under a hash of the config, the library
versions and this package's own source.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quire.env import cache_folder
from quire.errors import UnsupportedModelError
from quire.kernels.table import load_ops
from quire.models.files.hub import ModelFiles
from quire.models.files.remembered import own_source, recall, remember
from quire.models.probing.decide import (
    Decider,
    Decision,
    counted_layers,
    model_report,
    outermost,
    packed_report,
    sequential_report,
)
from quire.models.probing.full_size import observe_full, try_observe
from quire.models.probing.prove import prove
from quire.models.replacements.latent import with_latents
from quire.models.transformers.interface import SPEC
from quire.models.transformers.report import FORMAT, ProbeReport
from quire.models.twin.shrink import build, shrink

logger = logging.getLogger(__name__)


def probe(files: ModelFiles, dtype: torch.dtype | None = None) -> ProbeReport:
    """The report for these files: remembered, or made now. Raises UnsupportedModelError when nothing runs the model."""
    model_class = find_class(files)
    whole = files.library_config
    dtype = dtype or getattr(whole.get_text_config(), "dtype", None) or torch.float32
    config = model_config(model_class, whole)
    path = cache_folder() / "probes" / f"{report_key(model_class, config, dtype)}.json"
    report = _remembered(path)
    if report is None:
        began = time.perf_counter()
        report = examine(model_class, config, dtype)
        logger.info("probed %s in %.1f s: tier %s", files.architecture, time.perf_counter() - began, report.layout.tier)
        remember(path, report.to_json())
    for note in report.layout.notes:
        logger.log(logging.WARNING if report.layout.tier in ("B", "C") else logging.INFO, "%s: %s", files.name, note)
    return report


def examine(model_class: type, config: Any, dtype: torch.dtype) -> ProbeReport:
    """Decide on the twin, then take sizes from the full-size model without weights."""
    ops = load_ops("cpu")  # the twin is tiny: it is examined where every machine can
    try:
        twin_config = shrink(config)
        decider = Decider(model_class, twin_config, ops)
    except Exception as error:  # a config class may refuse any combination of sizes
        raise UnsupportedModelError(
            f"No tiny twin of {model_class.__name__} could be made to try it on ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). The Transformers path needs one; a native class can be registered "
            "with ModelRegistry.register_model."
        ) from error
    decision = decider.decide()
    if decision.report.mode != "recompute":  # there each answer is its own definition, and nothing is slower
        decision = replace(decision, report=replace(decision.report, rewrite=prove(decider, decision, ops)))
    try:
        return enlarge(model_class, config, dtype, decision)
    except Exception as error:  # code that cannot run without numbers
        logger.warning("%s: its layers cannot be read off a model without weights: %s", model_class.__name__, error)
        slower = decider.decide_sequential_model(f"sizes unknown: {type(error).__name__} {error}")
        return enlarge(model_class, config, dtype, slower)


def enlarge(model_class: type, config: Any, dtype: torch.dtype, decision: Decision) -> ProbeReport:
    """The twin's report with the real model's modules and sizes in place of the twin's."""
    twin, seen_twin = decision.report, decision.seen
    tier = twin.layout.tier
    model = build(model_class, copy.deepcopy(config), dtype, "meta")
    notes = list(twin.layout.notes)
    if tier in ("A", "A+mixer"):
        seen = observe_full(model, SPEC, seen_twin)
        report = packed_report(model, seen, stepwise=any(mixer.stepwise for mixer in twin.mixers))
        report = replace(report, batch_argument=twin.batch_argument, arguments=twin.arguments)
    elif tier == "B":
        seen = observe_full(model, "eager", seen_twin)
        report = replace(sequential_report(model, seen, outermost(seen.cache_users), notes), arguments=twin.arguments)
    else:
        layers = counted_layers(try_observe(model, seen_twin), model)
        report = model_report(model, layers, twin.mode, twin.layout.chunked_prefill, notes)
        report = replace(report, attention=twin.attention)
    return with_latents(replace(report, rewrite=twin.rewrite), model)


def find_class(files: ModelFiles) -> type:
    """The model class that the files name. Code of the checkpoint runs only when the user trusts it."""
    auto_map = files.raw_config.get("auto_map") or {}
    reference = auto_map.get("AutoModelForCausalLM")
    if reference and files.trust_remote_code:
        return get_class_from_dynamic_module(reference, str(files.folder))
    found = getattr(transformers, files.architecture, None)
    if found is None:
        raise UnsupportedModelError(
            f"{files.architecture!r} is not a class of the installed transformers {transformers.__version__}. Upgrade "
            "transformers, or allow the checkpoint's own code with --trust-remote-code if it brings some."
        )
    return found


def model_config(model_class: type, config: Any) -> Any:
    """The part of the config that this class is built from: the whole, or its language model."""
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in config.sub_configs)
    return next((part for part in parts if isinstance(part, wanted)), config)


# ---------------------------------------------------------------- memory on disk


def report_key(model_class: type, config: Any, dtype: torch.dtype) -> str:
    """A hash of everything that a report depends on."""
    digest = hashlib.sha256()
    parts = [FORMAT, transformers.__version__, torch.__version__, model_class.__qualname__, dtype]
    for part in (*parts, config.to_json_string(use_diff=False), own_source(), _source(model_class)):
        digest.update(str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:32]


def _source(model_class: type) -> str:
    path = inspect.getsourcefile(model_class)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _remembered(path: Path) -> ProbeReport | None:
    """A report from disk; one that cannot be read counts as none."""
    text = recall(path)
    try:
        return None if text is None else ProbeReport.from_json(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None

"""build_transformers: a model of the Transformers path, from a probe's report to ready.

The order is fixed: build without memory, replace modules, stream the weights in, attach the step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch

from quire.kernels.table import Ops
from quire.models.files.hub import ModelFiles
from quire.models.probing.decide import serve
from quire.models.probing.probe import find_class, model_config
from quire.models.replacements.rewrite import rewrite
from quire.models.served import ServedModel
from quire.models.transformers.conversion import load_transformers, model_targets
from quire.models.transformers.report import ProbeReport
from quire.models.twin.shrink import build

logger = logging.getLogger(__name__)


def build_transformers(
    files: ModelFiles, report: ProbeReport, seed: int, dtype: torch.dtype, device: torch.device, ops: Ops,
    prepare: Callable[[Any], None] | None = None,
) -> ServedModel:  # fmt: skip
    """The Transformers path, from a report; `prepare` may change the model while it has no memory yet."""
    model_class = find_class(files)
    config = copy.deepcopy(model_config(model_class, files.library_config))
    model = build(model_class, config, dtype, "meta")
    if prepare is not None:
        prepare(model)
    targets = model_targets(model, dtype, device)
    targets.update(rewrite(model, report.rewrite, ops, targets, device))
    loaded = load_transformers(model, targets, files, device, seed)
    logger.info("%d tensors, %.2f GB in %.2f s", loaded.tensors, loaded.nbytes / 1e9, loaded.seconds)
    return serve(model, report, ops)

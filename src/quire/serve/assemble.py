"""start_service: a Service over an engine that is being started. Knows no socket and no route."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import quire
from quire.config import EngineOptions, ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.metrics import Metrics
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service, fingerprint
from quire.serve.tracing import open_tracing

OpenEngine = Callable[[Progress], AsyncEngine]  # waits until the engine is ready; its observer is the Progress


def start_service(engine_options: EngineOptions, options: ServeOptions, open_engine: OpenEngine) -> Service:
    """Open the engine and put around it what serves it. Raises ConfigError, ModelError and CapacityError."""
    progress = Progress()
    served = engine_options.model.served_model_name or (engine_options.model.model or "bundled",)
    tracing = None if options.otlp_traces_endpoint is None else open_tracing(options.otlp_traces_endpoint, served[0])
    engine = open_engine(progress)
    settings = engine.engine.settings
    names = settings.model_names or (engine_options.model.model or "bundled",)
    metrics = None
    if not engine_options.observe.disable_log_stats:
        metrics = progress.then = Metrics(names[0], settings.max_model_len)
        metrics.set_config({**asdict(engine_options.cache), "num_gpu_blocks": engine.engine.stats().pages})
    card = ModelCard(
        names=names,
        max_model_len=settings.max_model_len,
        root=_root(engine_options),
        defaults=settings.default_params,
        fingerprint=fingerprint(quire.__version__, engine_options),
        most_tokens=engine_options.model.override_generation_config.get("max_new_tokens"),
    )
    if engine.tokenizer is not None:
        engine.tokenizer.longest_token  # noqa: B018  # reads the vocabulary once, not in the first request
    return Service(
        engine,
        card,
        options,
        None if metrics is None else metrics.registry,
        progress=progress,
        log_arrivals=engine_options.observe.enable_log_requests,
        tracing=tracing,
        takes_priority=engine_options.schedule.scheduling_policy != "fcfs",
        counted=[] if metrics is None else [metrics],
    )


def _root(options: EngineOptions) -> str:
    """What /v1/models tells of the model's origin: a hub id, or a folder's name without its path."""
    model = options.model.model
    if model is None:
        return "bundled"
    return Path(model).name if Path(model).exists() else model

"""Options + what the model's files say + the machine -> EngineConfig. One small function per rule.

Each rule returns a value and the reason for it; all of them are logged, so that nobody has to guess why a number is
what it is. Only config files and weight headers are read here: `quire plan` shows the same EngineConfig that an engine
starts from.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from quire import sizing
from quire.config import EngineOptions
from quire.core.plan import GroupSpec
from quire.errors import CapacityError, ConfigError
from quire.kernels.table import load_ops
from quire.layers.spec import ModelLayout
from quire.models.headers import weight_headers
from quire.models.hub import ModelFiles, find_model
from quire.models.probe import layout_of
from quire.models.registry import select_impl
from quire.worker.device import Device

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

DTYPES = {
    "half": torch.float16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float": torch.float32,
    "float32": torch.float32,
}
LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_target_positions",
    "n_ctx",
)
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Choice(Generic[Value]):
    """What a rule decided, and why."""

    value: Value
    reason: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The device that an engine will run on, as it is now. Memory in bytes."""

    device: str  # "cpu" or "cuda"
    total_memory: int
    free_memory: int
    threads: int


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Where the device's memory goes, in bytes."""

    total: int
    free: int
    weights: int
    activations: int
    pages: int  # what page groups may take


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know, decided. Parts of it are handed out; nobody below engine/ takes the whole."""

    options: EngineOptions
    files: ModelFiles
    layout: ModelLayout  # from the config alone; the loaded model's own layout wins where they differ
    model_impl: str  # "native" or "transformers"
    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    threads: int
    max_model_len: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_in_flight: int  # plans submitted and not yet applied: 2 when the next step is planned while one runs
    chunked_prefill: bool
    prefix_caching: bool
    memory: MemoryBudget
    groups: tuple[GroupSpec, ...]
    served_model_names: tuple[str, ...]  # the first one is reported
    decisions: tuple[tuple[str, str, str], ...]  # (rule, value, reason), for the log


def resolve(options: EngineOptions, machine: Machine | None = None) -> EngineConfig:
    """Decide everything that the user left open, and refuse what cannot work.

    Raises ConfigError for options that cannot go together, ModelError for a model that cannot be read, CapacityError
    when it does not fit into the memory. `machine` is measured when not given.
    """
    check_sections(options)
    files = find_model(options.model)
    log = DecisionLog()
    if machine is None:
        machine = measure_machine(log.take("device", choose_device(options.parallel.device)), options.parallel.threads)
    impl = select_impl(files, options.model.model_impl)
    layout = layout_of(files)
    dtype = log.take("dtype", choose_dtype(options.model.dtype, checkpoint_dtype(files), machine.device))
    cache_dtype = log.take("kv_cache_dtype", choose_cache_dtype(options.cache.kv_cache_dtype, dtype))
    block_size = log.take("block_size", choose_block_size(options.cache.block_size, machine.device))
    limit = log.take("longest context", model_length(files))
    max_num_seqs = log.take("max_num_seqs", choose_max_num_seqs(options.schedule.max_num_seqs, layout))
    chunked = log.take("chunked_prefill", choose_chunked(options.schedule.enable_chunked_prefill, layout))
    step = log.take(
        "max_num_batched_tokens",
        choose_step_tokens(
            options.schedule.max_num_batched_tokens, machine.device, max_num_seqs, wanted_length(options, limit), chunked
        ),
    )
    memory = log.take("memory", choose_memory(options, machine, files, dtype, step, max_num_seqs))
    costs = sizing.group_costs(layout, block_size, cache_dtype, load_ops(machine.device).cache_bytes)
    length = log.take("max_model_len", choose_max_model_len(options.model.max_model_len, limit, costs, memory, step))
    groups = log.take("pages", choose_groups(options, costs, memory, length, max_num_seqs, step))
    return EngineConfig(
        options=options,
        files=files,
        layout=layout,
        model_impl=impl,
        device=machine.device,
        dtype=dtype,
        cache_dtype=cache_dtype,
        threads=machine.threads,
        max_model_len=length,
        block_size=block_size,
        max_num_batched_tokens=step,
        max_num_seqs=max_num_seqs,
        max_in_flight=log.take("max_in_flight", choose_in_flight(options.schedule.async_scheduling, machine.device)),
        chunked_prefill=chunked,
        prefix_caching=log.take("prefix_caching", choose_prefix_caching(options.cache.enable_prefix_caching, layout)),
        memory=memory,
        groups=groups,
        served_model_names=options.model.served_model_name or (files.name,),
        decisions=log.finish(),
    )

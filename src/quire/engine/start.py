"""Starting an engine in this process: resolve the options, load the model, take the pages, tie the parts together.

Each phase is logged with its time. Everything heavy (torch, the model) comes in with this module.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from quire import sizing
from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.params import SamplingParams
from quire.core.plan import GroupSpec
from quire.core.scheduler import Scheduler
from quire.engine.core import EngineCore
from quire.engine.engine import Engine, EngineSettings
from quire.engine.executor import Executor, LocalExecutor, load_worker
from quire.engine.observe import Observer
from quire.errors import ConfigError, ValidationError
from quire.grammar import Grammars, Vocabulary
from quire.kernels.table import load_ops
from quire.layers.spec import ModelLayout
from quire.resolve import EngineConfig, resolve
from quire.text.chat import read_template
from quire.text.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


# Told each phase's name: when it begins, with None, and with its seconds. A long one may begin again under other words.
OnPhase = Callable[[str, float | None], None]
TELL_SECONDS, LOG_SECONDS = 0.5, 10.0  # the share of a load that is done is told and logged so often


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to be stepped, and what an Engine must know of it."""

    executor: Executor
    scheduler: SchedulerOptions
    settings: EngineSettings
    tokenizer: Tokenizer | None = None
    grammars: Grammars | None = None

    def core(self) -> EngineCore:
        """The loop over the executor."""
        return EngineCore(Scheduler(self.scheduler), self.executor, self.scheduler.max_in_flight)


def start_engine(options: EngineOptions, observer: Observer | None = None, on_phase: OnPhase | None = None) -> Engine:
    """An Engine over one worker in this process. Raises ConfigError, ModelError or CapacityError."""
    loaded = load(options, on_phase)
    return Engine(loaded.core(), loaded.tokenizer, loaded.settings, observer, grammars=loaded.grammars)


def load(
    options: EngineOptions,
    on_phase: OnPhase | None = None,
    on_config: Callable[[EngineConfig], None] | None = None,
) -> Loaded:
    """Resolve and load. `on_config` is told what was resolved before anything is loaded. Raises as start_engine."""
    with phase("resolving options", on_phase):
        config = resolve(options)
    if on_config is not None:
        on_config(config)
    with phase("loading the tokenizer", on_phase):
        tokenizer = open_tokenizer(config)
    with phase("loading the model", on_phase):
        executor = LocalExecutor(load_worker(config), threaded=config.max_in_flight > 1)
        layout: ModelLayout = executor.call("load", ShareTold(on_phase))
    with phase("taking memory for pages", on_phase):
        groups = page_groups(config, layout)
        grammars = open_grammars(config, layout, tokenizer)
        executor.call("configure", groups, grammars)
    settings = engine_settings(config, layout, tokenizer)
    return Loaded(executor, scheduler_options(config, layout, groups), settings, tokenizer, grammars)


@contextmanager
def phase(name: str, on_phase: OnPhase | None = None) -> Iterator[None]:
    """Log how long a phase of start-up took, and tell whoever wants to know."""
    began = time.perf_counter()
    if on_phase is not None:
        on_phase(name, None)
    yield
    seconds = time.perf_counter() - began
    logger.info("%s took %.2f s", name, seconds)
    if on_phase is not None:
        on_phase(name, seconds)


class ShareTold:
    """Tells now and then what share of the weights is loaded: whoever follows the phases, and the log."""

    def __init__(self, on_phase: OnPhase | None) -> None:
        self._on_phase = on_phase
        self._told = self._logged = time.perf_counter()

    def __call__(self, share: float) -> None:
        """So much of 1 is loaded."""
        now = time.perf_counter()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            logger.info("%.0f %% of the weights are loaded", share * 100)
        if self._on_phase is not None and now - self._told >= TELL_SECONDS:
            self._told = now
            self._on_phase(f"loading the model: {share:.0%} of the weights", None)


def open_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The model's tokenizer, or None when the user wants none."""
    options = config.options.model
    if options.skip_tokenizer_init:
        return None
    return load_tokenizer(
        config.files.tokenizer,
        config.files.trust_remote_code,
        config.files.tokenizer_revision,
        options.hf_token,
        read_template(options.chat_template),
    )


def open_grammars(config: EngineConfig, layout: ModelLayout, tokenizer: Tokenizer | None) -> Grammars | None:
    """What compiles structured outputs, or None without a tokenizer or without a token that ends an output."""
    ends = end_tokens(config, tokenizer)
    if tokenizer is None or not ends:
        return None
    vocabulary = Vocabulary(tokenizer, layout.vocab_size, ends)
    return Grammars(lambda: vocabulary)


def end_tokens(config: EngineConfig, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """The tokens that end an output: the tokenizer's own first, then those of the generation config."""
    own = None if tokenizer is None else tokenizer.eos_token_id
    return tuple(dict.fromkeys([*([] if own is None else [own]), *config.files.stop_token_ids]))


def page_groups(config: EngineConfig, layout: ModelLayout) -> tuple[GroupSpec, ...]:
    """The groups of pages: as resolved, unless the loaded model needs other ones than its config promised."""
    if layout.layers == config.layout.layers:
        return config.groups
    draft = None if config.draft is None else config.draft.layout
    costs = sizing.group_costs(
        layout, config.block_size, config.cache_dtype, load_ops(config.device).cache_bytes, draft
    )
    logger.info("the loaded model's layers differ from what its config promised; pages are divided again")
    return sizing.page_groups(
        costs, config.memory.pages, config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens
    )


def scheduler_options(config: EngineConfig, layout: ModelLayout, groups: tuple[GroupSpec, ...]) -> SchedulerOptions:
    """What the scheduler must know."""
    schedule = config.options.schedule
    return SchedulerOptions(
        groups=groups,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
        policy=schedule.scheduling_policy,
        enable_prefix_caching=config.prefix_caching and layout.prefix_caching,
        chunked_prefill=config.chunked_prefill and layout.chunked_prefill,
        long_prefill_token_threshold=schedule.long_prefill_token_threshold,
        max_in_flight=config.max_in_flight,
    )


def engine_settings(config: EngineConfig, layout: ModelLayout, tokenizer: Tokenizer | None) -> EngineSettings:
    """What the Engine must know."""
    options = config.options
    return EngineSettings(
        max_model_len=config.max_model_len,
        vocab_size=layout.vocab_size,
        eos_token_ids=end_tokens(config, tokenizer),
        max_logprobs=options.model.max_logprobs,
        logprobs_mode=options.model.logprobs_mode,
        seed=options.model.seed,
        default_params=default_params(config.files.sampling_defaults),
        max_num_queued_reqs=options.schedule.max_num_queued_reqs,
        max_num_queued_tokens=options.schedule.max_num_queued_tokens,
        with_metrics=not options.observe.disable_log_stats,
        fair=options.schedule.scheduling_policy == "fair",
        model_names=config.served_model_names,
    )


def default_params(defaults: Mapping[str, float | int]) -> SamplingParams:
    """Sampling parameters for requests that bring none, from the names of generation_config.json."""
    renamed: dict[str, Any] = {
        "max_tokens" if name == "max_new_tokens" else name: value for name, value in defaults.items()
    }
    try:
        return SamplingParams(**renamed)
    except ValidationError as error:
        raise ConfigError(
            f"The model's generation config has an impossible default: {error}. Correct it with "
            f"override_generation_config, or set generation_config to 'vllm' to ignore its sampling defaults."
        ) from error

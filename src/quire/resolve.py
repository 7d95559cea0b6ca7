"""Options + what the model's files say + the machine -> EngineConfig. One small function per rule.

Each rule returns a value and the reason for it; all of them are logged, so that nobody has to guess why a number is
what it is. Only config files and weight headers are read here: `quire plan` shows the same EngineConfig that an engine
starts from.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from quire import sizing
from quire.config import EngineOptions, Speculation
from quire.core.plan import GroupSpec
from quire.errors import CapacityError, ConfigError
from quire.kernels.table import load_ops
from quire.layers.spec import ModelLayout
from quire.models import footprint
from quire.models.build import layout_of
from quire.models.files.hub import ModelFiles, find_model
from quire.models.registry import select_impl
from quire.models.speculation.draft import DraftModel, find_guesser
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
NOT_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "glm4")
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
    speculation: Speculation | None  # how tokens are guessed, if they are
    draft: DraftModel | None  # the small model that guesses
    memory: MemoryBudget
    groups: tuple[GroupSpec, ...]
    served_model_names: tuple[str, ...]  # the first one is reported
    decisions: tuple[tuple[str, str, str], ...]  # (rule, value, reason), for the log


def resolve(options: EngineOptions, machine: Machine | None = None, download: bool = True) -> EngineConfig:
    """Decide everything that the user left open, and refuse what cannot work.

    Raises ConfigError for options that cannot go together, ModelError for a model that cannot be read, CapacityError
    when memory lacks. `machine` is measured when not given. Without `download`, weights on the hub are not fetched.
    """
    files = find_model(options.model, download)
    log = DecisionLog()
    if machine is None:
        machine = measure_machine(log.take("device", choose_device(options.parallel.device)), options.parallel.threads)
    impl = select_impl(files, options.model.model_impl)
    dtype = log.take("dtype", choose_dtype(options.model.dtype, checkpoint_dtype(files), machine.device))
    check_dtype(files, dtype)
    layout = layout_of(files, impl, dtype)
    cache_dtype = log.take("kv_cache_dtype", choose_cache_dtype(options.cache.kv_cache_dtype, dtype, machine.device))
    block_size = log.take("block_size", choose_block_size(options.cache.block_size, machine.device))
    limit = model_length(files)
    log.take("longest context", limit)
    max_num_seqs = log.take("max_num_seqs", choose_max_num_seqs(options.schedule.max_num_seqs, layout))
    chunked = log.take("chunked_prefill", choose_chunked(options.schedule.enable_chunked_prefill, layout))
    speculation = log.take("speculation", choose_speculation(options.speculate.chosen(), layout, chunked))
    draft = find_guesser(speculation, files, layout, options.model, dtype, download)
    wanted, most = wanted_length(options.model.max_model_len, limit.value), options.schedule.max_num_batched_tokens
    step = log.take("max_num_batched_tokens", choose_step_tokens(most, machine.device, max_num_seqs, wanted, chunked))
    scores = most_scores(max_num_seqs, speculation)
    memory = log.take("memory", choose_memory(options, machine, files, layout, dtype, step, scores, draft))
    cache_bytes = load_ops(machine.device).cache_bytes
    of_draft = None if draft is None else draft.layout
    costs = sizing.group_costs(layout, block_size, cache_dtype, cache_bytes, of_draft)
    length = log.take("max_model_len", choose_max_model_len(options.model.max_model_len, limit, costs, memory, step))
    groups = log.take(
        "pages", choose_groups(options.cache.num_gpu_blocks_override, costs, memory, length, max_num_seqs, step)
    )
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
        prefix_caching=log.take(
            "prefix_caching", choose_prefix_caching(options.cache.enable_prefix_caching, layout, chunked)
        ),
        speculation=speculation,
        draft=draft,
        memory=memory,
        groups=groups,
        served_model_names=options.model.served_model_name or (files.name,),
        decisions=log.finish(),
    )


class DecisionLog:
    """Collects (rule, value, reason), and writes them to the log when all are there."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, str, str]] = []

    def take(self, rule: str, choice: Choice[Value]) -> Value:
        """Note a rule's choice and return its value."""
        self._entries.append((rule, _shown(choice.value), choice.reason))
        return choice.value

    def finish(self) -> tuple[tuple[str, str, str], ...]:
        """Log every decision and return them."""
        for rule, value, reason in self._entries:
            logger.info("%s = %s: %s", rule, value, reason)
        return tuple(self._entries)


def _shown(value: object) -> str:
    if isinstance(value, MemoryBudget):
        return f"{value.pages / GIB:.2f} GiB for pages"
    if isinstance(value, tuple):
        return " + ".join(f"{group.num_pages} {group.kind}" for group in value) or "none"
    if isinstance(value, Speculation):
        return f"{value.method}, {value.num_speculative_tokens} tokens"
    return str(value).removeprefix("torch.")


def choose_device(wanted: str) -> Choice[str]:
    """cpu or cuda."""
    if wanted == "cpu":
        return Choice("cpu", "as asked")
    if torch.cuda.is_available():
        return Choice("cuda", "as asked" if wanted == "cuda" else "a GPU is there")
    if wanted == "cuda":
        raise ConfigError(
            f"device is cuda, but PyTorch {torch.__version__} finds no GPU here. Use --device cpu, or install a PyTorch "
            "built for this GPU."
        )
    return Choice("cpu", "no GPU here")


def measure_machine(device: str, threads: int | None) -> Machine:
    """The device's memory right now, and the threads this process may use."""
    found = Device(device)
    memory = found.memory()
    return Machine(device, memory.total, memory.free, threads or found.threads())


def checkpoint_dtype(files: ModelFiles) -> torch.dtype | None:
    """The data type that the config names; None when it names none."""
    config = files.text_config.to_dict()
    named = config.get("dtype") or files.raw_config.get("dtype") or files.raw_config.get("torch_dtype")
    if isinstance(named, torch.dtype):
        return named
    if isinstance(named, str) and named.removeprefix("torch.") in DTYPES:
        return DTYPES[named.removeprefix("torch.")]
    return None


def choose_dtype(wanted: str, stored: torch.dtype | None, device: str) -> Choice[torch.dtype]:
    """The data type of weights and activations."""
    if wanted != "auto":
        return Choice(DTYPES[wanted], "as asked")
    if stored is torch.float16 and device == "cpu":
        return Choice(torch.bfloat16, "the checkpoint's float16 has no fast arithmetic on a CPU")
    if stored is torch.float32:
        return Choice(torch.bfloat16, "the checkpoint's float32 halved; --dtype float32 keeps it")
    if stored is None:
        return Choice(torch.bfloat16, "the checkpoint does not say")
    return Choice(stored, "as in the checkpoint")


def check_dtype(files: ModelFiles, dtype: torch.dtype) -> None:
    """Refuse float16 for models whose activations exceed its range."""
    if dtype is torch.float16 and files.text_config.model_type in NOT_IN_FLOAT16:
        raise ConfigError(
            f"dtype is float16, but activations of {files.text_config.model_type} models leave its range and become "
            "infinite. Use --dtype bfloat16 or float32."
        )


def check_quantized_device(method: str | None, device: str) -> None:
    """Refuse quantized weights where no kernel multiplies them. That the method exists was seen when config.json was."""
    if method is not None and device != "cpu":
        raise ConfigError(
            f"quantization is {method}, and the device {device}; quire multiplies quantized weights on the CPU only. "
            "Leave it out, or use --device cpu."
        )


def choose_cache_dtype(wanted: str, dtype: torch.dtype, device: str) -> Choice[torch.dtype]:
    """The data type of keys and values."""
    if wanted == "auto":
        return Choice(dtype, "as the weights")
    if wanted == "int8":
        if device != "cpu":
            raise ConfigError(
                f"kv_cache_dtype is int8, and the device {device}; quire keeps keys and values in 8 bits on the CPU only. "
                "Leave it out, or use --device cpu."
            )
        return Choice(torch.int8, "as asked, with a scale for each token and head")
    return Choice(DTYPES[wanted], "as asked")


def choose_block_size(wanted: int | None, device: str) -> Choice[int]:
    """Positions per page."""
    if wanted is None:
        return Choice(16, "small pages share more of a prefix")
    if wanted % 16:
        raise ConfigError(
            f"block_size is {wanted}; the kernels read pages in rows of 16, so it must be a multiple of 16."
        )
    return Choice(wanted, "as asked")


def model_length(files: ModelFiles) -> Choice[int]:
    """The longest context that the model's config allows. No key at all counts as 2048."""
    config = files.text_config.to_dict()
    lengths = {key: config[key] for key in LENGTH_KEYS if isinstance(config.get(key), int) and config[key] > 0}
    if not lengths:
        return Choice(2048, f"the config has none of {', '.join(LENGTH_KEYS[:4])}")
    key, length = min(lengths.items(), key=lambda item: item[1])
    if files.tokenizer_limit is not None and files.tokenizer_limit < length:
        key, length = "tokenizer's model_max_length", files.tokenizer_limit
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind in ("linear", "dynamic") and isinstance(factor, int | float) and factor > 1:
        return Choice(int(length * factor), f"the config's {key} of {length}, times {factor} by its {kind} rope")
    original = rope.get("original_max_position_embeddings")
    if kind == "yarn" and factor and original:
        return Choice(max(length, int(original * factor)), f"{original} positions, times {factor} by its yarn rope")
    return Choice(length, f"the config's {key}")


def wanted_length(asked: int | None, limit: int) -> int:
    """The context that the user asks for, before the memory has been looked at."""
    return limit if asked is None or asked == -1 else asked


def choose_max_num_seqs(wanted: int | None, layout: ModelLayout) -> Choice[int]:
    """Requests running at once, at most."""
    if not layout.batched:
        return Choice(1, "this model runs one request at a time")
    if wanted is not None:
        return Choice(wanted, "as asked")
    return Choice(256, "the default")


def choose_chunked(wanted: bool, layout: ModelLayout) -> Choice[bool]:
    """Whether a prompt may be computed over several steps."""
    if wanted and not layout.chunked_prefill:
        return Choice(False, "this model needs the whole prompt in one step")
    return Choice(wanted, "as asked" if not wanted else "the default")


def choose_speculation(wanted: Speculation | None, layout: ModelLayout, chunked: bool) -> Choice[Speculation | None]:
    """Whether and how tokens are guessed."""
    if wanted is not None and not layout.takes_back:
        return Choice(None, "a wrong guess cannot be taken out of a recurrent state, nor of a cache of the library")
    if wanted is not None and not (chunked and layout.chunked_prefill):
        return Choice(None, "verifying guesses takes steps that begin in the middle of a text, as chunked prefill does")
    return Choice(wanted, "not asked for" if wanted is None else "as asked")


def most_scores(max_num_seqs: int, speculation: Speculation | None) -> int:
    """Positions of a step that are scored over the vocabulary, at most."""
    return max_num_seqs * (1 if speculation is None else 1 + speculation.num_speculative_tokens)


def choose_step_tokens(wanted: int | None, device: str, max_num_seqs: int, length: int, chunked: bool) -> Choice[int]:
    """Positions computed in one step, at most."""
    least = max_num_seqs if chunked else max(max_num_seqs, length)
    if wanted is None:
        usual = 8192 if device == "cuda" else 1024
        if usual < least:
            return Choice(least, "room for every running request" if chunked else "a whole prompt must fit in a step")
        return Choice(usual, "fills the GPU" if device == "cuda" else "keeps a step short for those who wait")
    if not chunked and wanted < length:
        raise ConfigError(
            f"max_num_batched_tokens is {wanted}, less than max_model_len ({length}), and prompts cannot be computed in "
            "parts. Raise the first, lower the second, or allow --enable-chunked-prefill."
        )
    return Choice(wanted, "as asked")


def count_parameters(files: ModelFiles) -> int:
    """Parameters of the model; see models/footprint.py."""
    return footprint.count_parameters(files, checkpoint_dtype(files) or torch.float32)


def activation_bytes(files: ModelFiles, layout: ModelLayout, dtype: torch.dtype, step: int, max_num_seqs: int) -> int:
    """Bytes that a step computes in at most, beside pages: the widest layer over all positions, and float32 logits."""
    config = files.text_config.to_dict()
    inner = [value for key, value in config.items() if "intermediate" in key and isinstance(value, int)]
    heads = max((layer.heads * (layer.key_dim + layer.value_dim) for layer in layout.layers), default=0)
    widest = 10 * layout.hidden_size + 4 * max(heads, max(inner, default=4 * layout.hidden_size))
    return step * widest * dtype.itemsize + 3 * max_num_seqs * layout.vocab_size * torch.float32.itemsize


def choose_memory(
    options: EngineOptions, machine: Machine, files: ModelFiles, layout: ModelLayout, dtype: torch.dtype, step: int,
    max_num_seqs: int, draft: DraftModel | None = None,
) -> Choice[MemoryBudget]:  # fmt: skip
    """How many bytes the pages may take, after weights and activations."""
    check_quantized_device(files.method, machine.device)
    stored = checkpoint_dtype(files) or torch.float32
    weights = footprint.weight_bytes(files, layout, dtype, stored, files.method)
    if draft is not None and draft.files is not files:
        of_draft = checkpoint_dtype(draft.files) or torch.float32
        weights += footprint.weight_bytes(draft.files, draft.layout, dtype, of_draft)
    activations = activation_bytes(files, layout, dtype, step, max_num_seqs)
    asked = options.cache.kv_cache_memory_bytes
    share = options.cache.gpu_memory_utilization
    if asked is not None:
        pages, reason = asked, "as asked"
    elif machine.device == "cuda":
        share = 0.92 if share is None else share
        allowed = min(int(machine.total_memory * share), machine.free_memory)
        pages, reason = allowed - weights - activations, f"{share} of the GPU, or what is free of it"
    else:
        # What is left when the weights are there, not a share of everything: other programs live here, too.
        share = 0.5 if share is None else share
        pages = int((machine.free_memory - weights - activations) * share)
        reason = f"{share} of the free memory that weights and activations leave"
    reason += (
        f"; {machine.free_memory / GIB:.2f} of {machine.total_memory / GIB:.2f} GiB free, weights {weights / GIB:.2f}, "
        f"activations {activations / GIB:.2f}"
    )
    if weights + activations + (asked or 0) > machine.free_memory or pages <= 0:
        raise CapacityError(
            f"{files.name} needs {(weights + activations) / GIB:.2f} GiB for weights and activations"
            f"{'' if asked is None else f' and {asked / GIB:.2f} GiB for the pages that were asked for'}, "
            f"and {machine.free_memory / GIB:.2f} GiB of this {machine.device}'s {machine.total_memory / GIB:.2f} GiB are "
            "free. Take a smaller model or data type, lower --max-num-batched-tokens, or free some memory."
        )
    return Choice(MemoryBudget(machine.total_memory, machine.free_memory, weights, activations, pages), reason)


def choose_max_model_len(
    wanted: int | None, limit: Choice[int], costs: tuple[sizing.GroupCost, ...], memory: MemoryBudget, step: int
) -> Choice[int]:
    """The longest prompt plus output, such that one request of this length fits in the pages."""
    if wanted is not None and wanted > limit.value:
        raise ConfigError(
            f"max_model_len is {wanted}, but the model's own longest context is {limit.value} ({limit.reason}). Ask for "
            f"at most {limit.value}, or change the model's rope or length with --hf-overrides if you know it can do more."
        )
    most = sizing.longest_context(costs, memory.pages, limit.value, step)
    if wanted == -1:
        if most < 1:
            raise CapacityError(_too_little(costs, memory, 1, most, step))
        return Choice(most, "fitted to the memory" if most < limit.value else limit.reason)
    length = limit.value if wanted is None else wanted
    if length > most:
        raise CapacityError(_too_little(costs, memory, length, most, step))
    return Choice(length, limit.reason if wanted is None else "as asked")


def _too_little(costs: tuple[sizing.GroupCost, ...], memory: MemoryBudget, length: int, most: int, step: int) -> str:
    need = sizing.request_bytes(costs, length, step)
    advice = f"Ask for --max-model-len {most} or auto" if most else "Take a smaller model"
    return (
        f"One request of {length} positions needs {need / GIB:.2f} GiB of pages, and {memory.pages / GIB:.2f} GiB are "
        f"there: {memory.free / GIB:.2f} GiB were free, weights take {memory.weights / GIB:.2f} and activations "
        f"{memory.activations / GIB:.2f}. {advice}, or raise --gpu-memory-utilization or --kv-cache-memory-bytes."
    )


def choose_groups(
    override: int | None, costs: tuple[sizing.GroupCost, ...], memory: MemoryBudget, length: int, max_num_seqs: int,
    step: int,
) -> Choice[tuple[GroupSpec, ...]]:  # fmt: skip
    """The page groups with their numbers of pages."""
    groups = sizing.page_groups(costs, memory.pages, length, max_num_seqs, step)
    if override is None:
        total = sizing.groups_bytes(groups, costs)
        return Choice(groups, f"{total / GIB:.2f} GiB, enough for {max_num_seqs} requests at most")
    return Choice(tuple(replace(group, num_pages=override) for group in groups), "as asked")


def choose_in_flight(wanted: bool | None, device: str) -> Choice[int]:
    """How many plans may be submitted and not yet applied."""
    if wanted is not None:
        return Choice(2 if wanted else 1, "as asked")
    if device == "cuda":
        return Choice(2, "the next step is planned while the GPU runs one")
    return Choice(1, "planning takes less time than it would take from the kernels' cores")


def choose_prefix_caching(wanted: bool, layout: ModelLayout, chunked: bool) -> Choice[bool]:
    """Whether pages of prompts that begin alike are reused."""
    if wanted and not chunked:
        return Choice(False, "a prompt that is computed in one step cannot begin in the middle")
    if wanted and not layout.prefix_caching:
        return Choice(False, "this model's state cannot be taken up in the middle of a prompt")
    return Choice(wanted, "the default" if wanted else "as asked")

"""Options that users know from other engines and that quire does without: what becomes of them, one table for all doors.

The command line and LLM ask the same two questions: does it change nothing here, and if it would, what shall one do
instead. An option that quire gets one day is taken off the table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

_ONE_DEVICE = "this version runs on one device. Leave it out."
_ONE_BACKEND = "one engine keeps all forms; a request's structured_outputs has the settings. Leave it out."
_TEXT_ONLY = "models here read text only. Leave it out."
_NO_LORA = "LoRA weights are not loaded; merge them into the model first."
_NO_OFFLOAD = "weights and pages stay in the device's memory. Leave it out."
_GENERATES = "this version of quire generates text. Leave it out."


@dataclass(frozen=True, slots=True)
class Foreign:
    """One option. `harmless`: the values that ask for nothing that quire does not do anyhow; None: every value.

    In `instead` an option of quire stands in braces. `switch`: as a flag it takes no value.
    """

    instead: str = ""
    harmless: tuple[object, ...] | None = ()
    switch: bool = False


_ANY = Foreign(harmless=None)
_ANY_SWITCH = Foreign(harmless=None, switch=True)

FOREIGN: dict[str, Foreign] = {
    # How steps are compiled and captured, how devices talk, how a loading model looks: nothing of it is here to be chosen.
    **dict.fromkeys(
        (
            "compilation_config",
            "cuda_graph_sizes",
            "cudagraph_capture_sizes",
            "guided_decoding_backend",
            "max_cudagraph_capture_size",
            "max_parallel_loading_workers",
            "max_seq_len_to_capture",
            "num_scheduler_steps",
            "performance_mode",
            "preemption_mode",
            "prefix_caching_hash_algo",
            "safetensors_load_strategy",
            "swap_space",
        ),
        _ANY,
    ),
    **dict.fromkeys(
        (
            "disable_cascade_attn",
            "disable_custom_all_reduce",
            "disable_frontend_multiprocessing",
            "disable_log_requests",
            "enable_reasoning",
            "enable_server_load_tracking",
            "enforce_eager",
            "use_tqdm_on_load",
            "use_v2_block_manager",
        ),
        _ANY_SWITCH,
    ),
    "task": Foreign(_GENERATES, ("auto", "generate")),
    "runner": Foreign(_GENERATES, ("auto", "generate")),
    "convert": Foreign(_GENERATES, ("auto", "none")),
    "pooler_config": Foreign(_GENERATES, (None,)),
    "tokenizer_mode": Foreign("a tokenizer is read as its files say. Leave it out.", ("auto", "hf", "fast")),
    "config_format": Foreign("a model has a config.json. Leave it out.", ("auto", "hf")),
    "attention_backend": Foreign("the kernels follow from {device}. Leave it out.", (None,)),
    "attention_config": Foreign("the kernels follow from {device}. Leave it out.", (None, {})),
    "quantization_config": Foreign("use {quantization}.", (None,)),
    "structured_outputs_config": Foreign(_ONE_BACKEND, (None, {})),
    "chat_template_content_format": Foreign("the chat template shows what it reads. Leave it out.", ("auto",)),
    "cpu_offload_gb": Foreign(_NO_OFFLOAD, (0,)),
    "kv_offloading_size": Foreign(_NO_OFFLOAD, (None,)),
    "enable_sleep_mode": Foreign("close() frees a model. Leave it out.", (False,), switch=True),
    "enable_lora": Foreign(_NO_LORA, (False,), switch=True),
    "lora_modules": Foreign(_NO_LORA, (None,)),
    "max_loras": _ANY,  # these count beside enable_lora alone
    "max_lora_rank": _ANY,
    "limit_mm_per_prompt": Foreign(_TEXT_ONLY, (None, {})),
    "mm_processor_kwargs": Foreign(_TEXT_ONLY, (None, {})),
    "allowed_local_media_path": Foreign(_TEXT_ONLY, (None, "")),
    "allowed_media_domains": Foreign(_TEXT_ONLY, (None, [])),
    "distributed_executor_backend": Foreign(_ONE_DEVICE, (None, "mp", "uni")),
    "enable_expert_parallel": Foreign(_ONE_DEVICE, (False,), switch=True),
    "worker_use_ray": Foreign(_ONE_DEVICE, (False,), switch=True),
    "kv_transfer_config": Foreign("one engine computes a request from start to end. Leave it out.", (None,)),
    "rope_scaling": Foreign("it is a part of {hf_overrides}.", (None, {})),
    "rope_theta": Foreign("it is a part of {hf_overrides}.", (None,)),
    "model_path": Foreign("the model is the first argument."),
    "speculative_model": Foreign("use {spec_model}.", (None,)),
    "num_speculative_tokens": Foreign("use {spec_tokens}.", (None,)),
    "chunked_prefill_size": Foreign("use {max_num_batched_tokens}."),
    "context_length": Foreign("use {max_model_len}."),
    "ctx_size": Foreign("use {max_model_len}."),
    "max_running_requests": Foreign("use {max_num_seqs}."),
    "mem_fraction_static": Foreign("use {gpu_memory_utilization}."),
    "random_seed": Foreign("use {seed}."),
    "tensor_parallel": Foreign("use {tensor_parallel_size}."),
    "tokenizer_path": Foreign("use {tokenizer}."),
    "tp_size": Foreign("use {tensor_parallel_size}."),
}


def changes_nothing(name: str, value: object) -> bool:
    """Whether an option of the table, by its name with underscores, has a value that asks for nothing more than is done.

    A value of the command line is the text of one.
    """
    harmless = FOREIGN[name].harmless
    return harmless is None or _text(value) in map(_text, harmless)


def instead_of(name: str, written: Callable[[str], str]) -> str:
    """What to do in place of an option of the table; `written`: how the reader writes the name of one of quire's own."""
    return re.sub(r"\{(\w+)\}", lambda found: written(found[1]), FOREIGN[name].instead)


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).lower()

"""What a user may choose, as frozen sections. The command line's flags and LLM's keyword arguments are made from these.

Every field is an option with the name users know; its metadata holds the help text. A section checks only itself;
rules across sections, and everything that depends on the model or the machine, belong to resolve.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

from quire.errors import ConfigError, nearest

MOST_THREADS = 1024
SPECULATION_METHODS = ("ngram", "suffix", "draft_model", "medusa", "eagle", "mtp")


def option(
    default: Any = None, *, help: str, factory: Any = None, aliases: tuple[str, ...] = (), least: float | None = None
) -> Any:
    """A config field with its help text; `aliases` are further flag names, such as "-tp". `least`: of a number."""
    metadata = {"help": help, "aliases": aliases, "least": least}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def refuse_nonsense(section: Any) -> None:
    """Raise ConfigError for a number of a section that is below its `least`, or none at all."""
    for item in fields(section):
        value = getattr(section, item.name)
        least = item.metadata["least"]
        if isinstance(value, float) and not math.isfinite(value) and value != item.default:
            raise ConfigError(f"{item.name} is {value}; it must be a number.")
        if least is not None and value is not None and value < least:
            choice = ", or left out" if item.default is None else ""
            raise ConfigError(f"{item.name} is {value}; it must be at least {least}{choice}.")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model, and how to read it."""

    model: str | None = option(None, help="local folder or hub id; nothing means the bundled model")
    tokenizer: str | None = option(None, help="folder or hub id of the tokenizer, when not the model's own")
    skip_tokenizer_init: bool = option(False, help="run on token ids only, without a tokenizer")
    trust_remote_code: bool = option(False, help="allow code that comes with the model to run")
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = option(
        "auto", help="data type of weights and activations; auto takes the checkpoint's"
    )
    seed: int = option(0, help="seed for requests that bring none, and for dummy weights")
    revision: str | None = option(None, help="branch, tag or commit of the model on the hub")
    tokenizer_revision: str | None = option(None, help="the same for the tokenizer")
    hf_token: str | None = option(None, help="token for the hub; the environment variable HF_TOKEN works too")
    hf_overrides: dict[str, Any] = option(factory=dict, help="JSON object laid over the model's config.json")
    max_model_len: int | None = option(
        None, help="longest prompt plus output in tokens; -1 or auto fits it to the memory"
    )
    quantization: str | None = option(None, help="how to quantize the weights while loading", aliases=("-q",))
    packed_cache: Literal["auto", "on", "off"] = option(
        "auto",
        help="keep packed weights on disk for the next start; auto does where weights are quantized while loading",
    )
    packed_cache_gb: float = option(
        50.0, help="most gigabytes that packed weights of all models may take on disk", least=0
    )
    model_impl: Literal["auto", "native", "transformers", "vllm"] = option(
        "auto", help="native class, or the Transformers code with its modules replaced; vllm means native"
    )
    load_format: Literal["auto", "safetensors", "pt", "dummy"] = option(
        "auto", help="auto prefers safetensors; dummy makes random weights"
    )
    download_dir: str | None = option(None, help="where to keep downloads, when not in the hub's own cache")
    generation_config: str = option(
        "auto", help="auto reads the model's generation_config.json; vllm ignores its sampling defaults; or a folder"
    )
    override_generation_config: dict[str, Any] = option(factory=dict, help="JSON object laid over those defaults")
    served_model_name: tuple[str, ...] = option((), help="names that clients may use; the first one is reported")
    chat_template: str | None = option(None, help="path of a chat template, or the template itself")
    max_logprobs: int = option(
        20, help="most log-probabilities a request may ask for; -1 allows the vocabulary", least=-1
    )
    logprobs_mode: Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"] = option(
        "raw_logprobs", help="what is reported: before or after penalties, temperature and filters"
    )
    logits_processors: tuple[str, ...] = option(
        (), help="module:name of functions that change scores for requests that ask; see docs/sampling.md"
    )

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)
        length = self.max_model_len
        if length is not None and length != -1 and length < 1:
            raise ConfigError(
                f"max_model_len is {length}; it must be at least 1, or -1 or auto to fit it to the memory."
            )
        if "" in self.served_model_name:
            raise ConfigError("served_model_name is empty. Give a name that clients can ask for, or leave it out.")


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """The page pool."""

    block_size: int | None = option(None, help="positions per page; chosen for the device when not given", least=1)
    gpu_memory_utilization: float | None = option(
        None, help="share of the memory that quire may use, 0 to 1; 0.92 on a GPU, on a CPU 0.5 of what is free"
    )
    kv_cache_memory_bytes: int | None = option(None, help="bytes for the pages; wins over the share", least=1)
    num_gpu_blocks_override: int | None = option(None, help="number of pages, for tests", least=1)
    kv_cache_dtype: Literal["auto", "bfloat16", "float32", "int8"] = option(
        "auto", help="data type of keys and values; int8 rounds each with a scale of its own and halves the memory"
    )
    enable_prefix_caching: bool = option(True, help="reuse the pages of prompts that begin alike")

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise ConfigError(f"gpu_memory_utilization is {share}; it is a share of the memory: above 0, at most 1.")


@dataclass(frozen=True, slots=True)
class ScheduleOptions:
    """How steps are filled."""

    max_num_batched_tokens: int | None = option(None, help="positions computed in one step, at most", least=1)
    max_num_seqs: int | None = option(None, help="requests running at once, at most", least=1)
    scheduling_policy: Literal["fair", "fcfs", "priority"] = option(
        "fair",
        help="fair between API keys, then by priority and arrival; by arrival alone; or by priority, then arrival",
    )
    enable_chunked_prefill: bool = option(True, help="let a long prompt be computed over several steps")
    long_prefill_token_threshold: int = option(
        0, help="most positions of one prompt in a step; 0 sets no limit", least=0
    )
    async_scheduling: bool | None = option(None, help="plan the next step while one runs; chosen by device")
    max_num_queued_reqs: int | None = option(None, help="refuse requests when so many wait", least=1)
    max_num_queued_tokens: int | None = option(None, help="refuse requests when so many prompt tokens wait", least=1)

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


@dataclass(frozen=True, slots=True)
class ParallelOptions:
    """How many devices, and how the model is laid over them."""

    device: Literal["auto", "cpu", "cuda"] = option("auto", help="where to run; auto takes a GPU when there is one")
    tensor_parallel_size: int = option(1, help="devices that share each layer", aliases=("-tp",))
    pipeline_parallel_size: int = option(1, help="devices that share the layers in turn", aliases=("-pp",))
    data_parallel_size: int = option(1, help="copies of the model", aliases=("-dp",))
    threads: int | None = option(None, help="CPU threads; the cores this process may use when not given", least=1)

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing, and for more devices than one."""
        refuse_nonsense(self)
        if self.threads is not None and self.threads > MOST_THREADS:
            raise ConfigError(f"threads is {self.threads}; it must be at most {MOST_THREADS}.")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if getattr(self, name) != 1:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}; this version of quire runs on one device. Leave it at 1."
                )


@dataclass(frozen=True, slots=True)
class Speculation:
    """How tokens are guessed, decided. `method` says which of the other fields count."""

    method: str  # one of SPECULATION_METHODS
    model: str | None = None  # all but ngram and suffix: what guesses
    num_speculative_tokens: int = 4  # guesses for a step, at most
    prompt_lookup_min: int = 2  # ngram and suffix: how many tokens must have come before, at least
    prompt_lookup_max: int = 5  # ngram: and how many are looked for, at most
    suffix_decoding_max_tree_depth: int = 64  # suffix: the same
    suffix_decoding_max_spec_factor: float = 1.0  # suffix: guesses for each token that has come before
    adaptive: bool = True  # leave off where it does not pay


@dataclass(frozen=True, slots=True)
class SpeculateOptions:
    """Guessing several tokens and verifying them in one step; the output is the same with and without."""

    speculative_config: dict[str, Any] = option(
        factory=dict,
        help="JSON object: method, model, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max, "
        "suffix_decoding_max_tree_depth, suffix_decoding_max_spec_factor, adaptive",
        aliases=("-sc",),
    )
    spec_method: str | None = option(
        None,
        help="how to guess: ngram and suffix look up what followed the same tokens before, draft_model asks a small model, "
        "medusa, eagle and mtp go on from the model's own states",
    )
    spec_model: str | None = option(None, help="folder or hub id of the small model; the bundled model has one")
    spec_tokens: int | None = option(None, help="tokens to guess for a step, at most; 4 when not given, 8 for suffix")

    def chosen(self) -> Speculation | None:
        """What is wanted, None for no guessing. Raises ConfigError for what does not exist or makes no sense."""
        values = dict(self.speculative_config)
        given = {"method": self.spec_method, "model": self.spec_model, "num_speculative_tokens": self.spec_tokens}
        values |= {name: value for name, value in given.items() if value is not None}
        if not values:
            return None
        if values.get("model") is not None:
            values.setdefault("method", "draft_model")
        method = values.get("method")
        if method not in SPECULATION_METHODS:
            known = ", ".join(SPECULATION_METHODS)
            asked = "names no method" if method is None else f"asks for the method {method!r}"
            raise ConfigError(f"speculative_config {asked}; quire has {known}.")
        if method == "suffix":
            values.setdefault("num_speculative_tokens", 8)
        if "prompt_lookup_max" in values and "prompt_lookup_min" not in values:
            values["prompt_lookup_min"] = min(2, values["prompt_lookup_max"])
        if "prompt_lookup_min" in values and "prompt_lookup_max" not in values:
            values["prompt_lookup_max"] = max(5, values["prompt_lookup_min"])
        types = get_type_hints(Speculation)
        for name, value in values.items():
            if name not in types:
                raise ConfigError(f"speculative_config: {unknown_option(name, types)}")
            values[name] = fitted(f"speculative_config's {name}", value, types[name])
            if types[name] is int and value < 1:
                raise ConfigError(f"speculative_config's {name} is {value}; it must be at least 1.")
        found = Speculation(**values)
        if found.prompt_lookup_min > found.prompt_lookup_max:
            raise ConfigError(
                f"speculative_config's prompt_lookup_min ({found.prompt_lookup_min}) is more than its "
                f"prompt_lookup_max ({found.prompt_lookup_max})."
            )
        return found


@dataclass(frozen=True, slots=True)
class ObserveOptions:
    """What is logged and counted."""

    disable_log_stats: bool = option(False, help="do not log throughput, do not count metrics")
    enable_log_requests: bool = option(False, help="log each request when it arrives, not only at its end")


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The HTTP server."""

    host: str = option("127.0.0.1", help="address to listen on")
    port: int = option(8000, help="port to listen on; 0 takes a free one", least=0)
    uds: str | None = option(None, help="path of a Unix socket to listen on instead")
    api_server_count: int = option(
        1, help="API processes in front of the engine; more than 1 for many streams", least=1
    )
    api_key: tuple[str, ...] = option((), help="keys that clients must show; the variable QUIRE_API_KEY works too")
    api_key_file: str | None = option(None, help="file of further keys, one a line")
    allow_insecure: bool = option(False, help="allow a public address without an API key")
    share_prefix_cache: bool = option(False, help="let clients with different keys find each other's cached prompts")
    trust_request_chat_template: bool = option(False, help="accept chat templates from clients")
    default_chat_template_kwargs: dict[str, Any] = option(
        factory=dict, help="JSON object: variables for the chat template that requests leave out"
    )
    template_timeout: float = option(5.0, help="seconds that a chat template may take for one request")
    max_request_bytes: int = option(16 * 2**20, help="largest body of a request", least=1)
    h11_max_incomplete_event_size: int = option(
        64 * 2**10, help="most bytes of a request's line and headers", least=1024
    )
    h11_max_header_count: int = option(256, help="most headers of a request", least=1)
    allowed_origins: tuple[str, ...] = option((), help="web pages that may call this server from a browser; * for all")
    allowed_methods: tuple[str, ...] = option(("*",), help="HTTP methods that these pages may use")
    allowed_headers: tuple[str, ...] = option(("*",), help="headers that these pages may send")
    allow_credentials: bool = option(False, help="let these pages send cookies and client certificates")
    ssl_keyfile: str | None = option(None, help="private key for https")
    ssl_certfile: str | None = option(None, help="certificate for https")
    ssl_ca_certs: str | None = option(None, help="certificates of those who sign clients' certificates")
    ssl_cert_reqs: int = option(0, help="client certificates: 0 not asked for, 1 checked when sent, 2 needed")
    root_path: str = option("", help="path prefix added by a proxy in front")
    response_role: str = option("assistant", help="role of the generated chat messages")
    tool_call_parser: str | None = option(None, help="how the model writes tool calls; else its chat template shows it")
    reasoning_parser: str | None = option(None, help="how the model writes thoughts; else its chat template shows it")
    enable_auto_tool_choice: bool = option(False, help="accepted; tools may always be chosen by the model")
    return_tokens_as_token_ids: bool = option(False, help="show tokens as token_id:N in log-probabilities")
    enable_force_include_usage: bool = option(False, help="send usage in every stream")
    enable_prompt_tokens_details: bool = option(False, help="report cached prompt tokens in usage")
    stream_interval: int = option(
        1, help="tokens that are sent together in a stream; the first one goes at once", least=1
    )
    sse_keep_alive_interval: float = option(
        0.0, help="seconds of silence after which a stream sends a comment; 0: never", least=0
    )
    max_log_len: int = option(0, help="characters of each prompt that --enable-log-requests logs", least=0)
    enable_request_account: bool = option(False, help="tell in usage.quire where the time of each request went")
    metrics_prefix: str = option(
        "quire", help="a second prefix for the names of metrics; vllm suits dashboards made for vLLM"
    )
    otlp_traces_endpoint: str | None = option(
        None, help="OpenTelemetry collector that gets a span for each request; needs quire[otel]"
    )
    log_format: Literal["text", "json"] = option("text", help="how the log is written")
    max_stored_responses: int = option(
        1000, help="answers of /v1/responses that are kept in memory; 0 for none", least=0
    )
    stall_timeout: float = option(
        120.0, help="seconds without a step, with work to do, from which on health is denied", least=0
    )
    uvicorn_log_level: Literal["critical", "error", "warning", "info", "debug", "trace"] = option(
        "warning", help="how much the web server logs"
    )
    engine_timeout: float = option(
        60.0, help="seconds without a word from the engine process after which it is started anew; 0: never", least=0
    )
    engine_spare: bool = option(True, help="keep a second process ready, with its imports done, to take over at once")
    shutdown_timeout: float = option(30.0, help="seconds that running requests get to finish after SIGTERM", least=0)

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)
        if not self.template_timeout > 0:
            raise ConfigError(f"template_timeout is {self.template_timeout}; it must be above 0.")
        collector = self.otlp_traces_endpoint
        if collector is not None and not urlsplit(collector).netloc:
            raise ConfigError(f"otlp_traces_endpoint is {collector!r}; write an address such as http://collector:4317.")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """All sections of one engine, as the user chose them. resolve.py turns this into an EngineConfig."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cache: CacheOptions = field(default_factory=CacheOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    speculate: SpeculateOptions = field(default_factory=SpeculateOptions)
    observe: ObserveOptions = field(default_factory=ObserveOptions)

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> EngineOptions:
        """Sort flat keyword arguments into their sections; None is as good as nothing, for it is no value of any option.

        An unknown name raises ConfigError with the nearest one.
        """
        sections: dict[str, dict[str, Any]] = {section.name: {} for section in fields(cls)}
        owner = {item.name: section for section, item in engine_fields()}
        types = get_type_hints(cls)
        for name, value in values.items():
            if name not in owner:
                raise ConfigError(unknown_option(name, owner))
            if value is not None:
                sections[owner[name]][name] = fitted(name, value, get_type_hints(types[owner[name]])[name])
        return cls(**{section: types[section](**found) for section, found in sections.items()})


def engine_fields() -> list[tuple[str, Any]]:
    """Every engine option as (section name, dataclass field)."""
    types = get_type_hints(EngineOptions)
    return [(section.name, item) for section in fields(EngineOptions) for item in fields(types[section.name])]


def fitted(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of option `name`: a list becomes a tuple, "auto" a length of -1. Raises ConfigError."""
    optional = type(None) in get_args(kind)
    if value is None and optional:
        return None
    kinds = [inner for inner in get_args(kind) if inner is not type(None)] if optional else [kind]
    plain = kinds[0]
    if get_origin(plain) is Literal:
        value = str(value).removeprefix("torch.")  # torch.float32 is as good as its name
        if value not in get_args(plain):
            raise ConfigError(f"{name} is {value!r}; it can be {', '.join(map(str, get_args(plain)))}.")
        return value
    if get_origin(plain) is tuple:
        return (value,) if isinstance(value, str) else tuple(value)
    if get_origin(plain) is dict:
        plain = dict
    if name == "max_model_len" and value == "auto":
        return -1
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, plain) or (plain is int and isinstance(value, bool)):
        # A path is a fine way to name a model, and the only other thing that text options take.
        if plain is str and isinstance(value, os.PathLike):
            return os.fspath(value)
        raise ConfigError(f"{name} is {value!r}, of type {type(value).__name__}; it must be of type {plain.__name__}.")
    return value


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The message for an option nobody knows, with the nearest known one."""
    return f"Unknown option {name!r}.{nearest(name, known)}"

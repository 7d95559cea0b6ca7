"""What is measured: one workload per row of the table of aims, with the aim as data, and a smaller version of each.

Knows numbers and names only; how an engine runs a workload is the business of engines/.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.shapes import SHAPES

LLAMA, QWEN, TINY = "llama-3.2-1b", "qwen3-0.6b", "tiny-7m"
ENGINES = ("quire", "vllm", "llama.cpp")

# What is measured of a run, in which unit, and whether more of it is better.
KINDS = {
    "decode": ("tok/s", True),  # one request: output tokens after the first one
    "prefill": ("prompt tok/s", True),
    "generate": ("output tok/s", True),  # prompts and outputs, all requests at once
    "shared": ("s", False),  # the same, the prompts begin alike
    "start": ("s", False),  # from the start of the process to the first token
    "restart": ("s", False),  # the same once more, with what the first start has left on disk
    "memory": ("GB", False),  # most of the engine's processes together
    "disk": ("GB", False),  # packages that the engine needs
    "perplexity": ("", False),  # of the bundled model
}


@dataclass(frozen=True, slots=True)
class Aim:
    """What quire must reach. All parts that are given must hold.

    `ratio` is against the best of `peers`, for times and sizes the other way round: at most ratio x the peer's.
    """

    ratio: float | None = None
    peers: tuple[str, ...] = ENGINES[1:]
    bandwidth: float | None = None  # share of the measured read bandwidth
    most: float | None = None  # absolute limit, in the workload's unit
    packages: int | None = None  # fewer than that


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table: what is asked of every engine, and what quire must reach."""

    name: str
    model: str  # as the table calls it
    kind: str
    shape: str
    precision: str  # bf16, int8 or int4
    aim: Aim
    requests: int = 1
    input_len: int = 0  # prompt tokens of each request, those that all share not counted
    output_len: int = 0
    shared_len: int = 0
    engines: tuple[str, ...] = ENGINES
    repeats: int = 1  # inside one process; the median counts

    @property
    def title(self) -> str:
        """The name of the row, with the sizes that are really used."""
        one = f"{self.input_len} in, {self.output_len} out"
        what = {
            "decode": f"one request ({one})",
            "prefill": f"{self.requests} x {self.input_len} prompt tokens",
            "generate": f"{self.requests} x ({one})",
            "shared": f"{self.requests} x ({self.shared_len} shared + {one})",
            "start": "start to first token",
            "restart": "second start",
            "memory": "peak memory",
            "disk": "packages on disk",
            "perplexity": "perplexity",
        }
        return what["disk"] if self.kind == "disk" else f"{self.model} {self.precision}: {what[self.kind]}"

    @property
    def unit(self) -> str:
        return KINDS[self.kind][0]

    @property
    def more_is_better(self) -> bool:
        return KINDS[self.kind][1]

    @property
    def group(self) -> tuple[str, str, str]:
        """Workloads of one group run in one process of an engine: loading takes longer than most of them."""
        alone = self.name if self.kind in ("start", "restart", "disk", "perplexity") else ""
        return self.shape, self.precision, alone


def decode(precision: str, aim: Aim) -> Workload:
    """One request on the 1B shape."""
    return Workload(f"1b-{precision}-decode", "1B", "decode", LLAMA, precision, aim, 1, 128, 64, repeats=3)


def prefill(precision: str, aim: Aim) -> Workload:
    """Eight long prompts on the 1B shape."""
    return Workload(f"1b-{precision}-prefill", "1B", "prefill", LLAMA, precision, aim, 8, 1024, 1)


def generate(precision: str, aim: Aim) -> Workload:
    """Thirty-two requests at once on the 1B shape."""
    return Workload(f"1b-{precision}-batch", "1B", "generate", LLAMA, precision, aim, 32, 256, 128)


def perplexity(precision: str) -> Workload:
    """What rounding does to the bundled model."""
    return Workload(f"perplexity-{precision}", "bundled", "perplexity", "bundled", precision, Aim(), engines=("quire",))


VLLM = ("vllm",)
PYTHON_ENGINES = ("quire", "vllm")
WORKLOADS: tuple[Workload, ...] = (
    decode("bf16", Aim(ratio=1.0, bandwidth=0.95)),
    decode("int8", Aim(ratio=1.5)),
    decode("int4", Aim(ratio=1.4)),
    prefill("bf16", Aim(ratio=1.1, peers=VLLM)),
    prefill("int8", Aim(ratio=1.7, peers=VLLM)),
    generate("bf16", Aim(ratio=1.3, peers=VLLM)),
    generate("int8", Aim(ratio=1.6, peers=VLLM)),
    generate("int4", Aim(ratio=3.0)),
    Workload("0.6b-bf16-batch", "0.6B", "generate", QWEN, "bf16", Aim(ratio=1.4), 64, 256, 128),
    # Hardly any arithmetic: what is left is the host.
    Workload(
        *("tiny-batch", "7M", "generate", TINY, "bf16", Aim(ratio=2.0, peers=VLLM), 256, 64, 128),
        engines=PYTHON_ENGINES,
        repeats=3,
    ),
    Workload(
        *("0.6b-shared", "0.6B", "shared", QWEN, "bf16", Aim(ratio=0.6, peers=VLLM), 32, 64, 32, 1024),
        engines=PYTHON_ENGINES,
    ),
    Workload("1b-start", "1B", "start", LLAMA, "bf16", Aim(most=3.0), 1, 8, 1),
    Workload("1b-restart", "1B", "restart", LLAMA, "bf16", Aim(most=2.0), 1, 8, 1, engines=("quire",)),
    Workload("1b-memory", "1B", "memory", LLAMA, "bf16", Aim(), 8, 256, 32),
    Workload("environment", "", "disk", LLAMA, "bf16", Aim(ratio=0.5, peers=VLLM, packages=60)),
    perplexity("bf16"),
    perplexity("int8"),
    perplexity("int4"),
)

CACHE_BYTES = 4 << 30  # of keys and values, for every engine that takes a number
SPARE_BYTES = int(0.7e9)  # what an engine may need beside weights and cache

# How an engine stores the weights of each precision; the first one of quire is the one that is judged. What the peers
# call them differs.
VARIANTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("quire", "bf16"): ("bf16",),
    ("quire", "int8"): ("int8",),
    ("quire", "int4"): ("int4", "int4-g32"),
    ("vllm", "bf16"): ("bf16",),
    ("vllm", "int8"): ("W8A8",),
    ("vllm", "int4"): ("GPTQ",),
    ("llama.cpp", "bf16"): ("BF16",),
    ("llama.cpp", "int8"): ("Q8_0",),
    ("llama.cpp", "int4"): ("Q4_0", "Q4_K_M"),
}
# Perplexity of the bundled model may grow by that share of bfloat16's.
PERPLEXITY = {"int8": 0.01, "int4-g32": 0.04, "int4": 0.06}


def smaller(workload: Workload) -> Workload:
    """The same work in a fraction of the time, for a first look and for slow machines. Proportions are kept."""
    if workload.kind == "decode":
        return replace(workload, input_len=32, output_len=24, repeats=2)
    if workload.kind == "prefill":
        return replace(workload, requests=2, input_len=512)
    if workload.kind in ("generate", "shared"):
        names = ("requests", "input_len", "output_len", "shared_len")
        return replace(workload, **{name: getattr(workload, name) // 2 for name in names})
    if workload.kind == "memory":
        return replace(workload, requests=2, output_len=8)
    return workload


def chosen(names: Iterable[str] | None, quick: bool) -> list[Workload]:
    """The workloads with these names (a part of a name will do), all when None. Raises ValueError for an unknown one."""
    found = list(WORKLOADS)
    if names is not None:
        wanted = list(names)
        for name in wanted:
            if not any(name in workload.name for workload in WORKLOADS):
                known = ", ".join(workload.name for workload in WORKLOADS)
                raise ValueError(f"No workload has {name!r} in its name. There are: {known}.")
        found = [workload for workload in WORKLOADS if any(name in workload.name for name in wanted)]
    return [smaller(workload) for workload in found] if quick else found


def weight_count(shape: str) -> tuple[int, int]:
    """How many weights the layers' matrices hold, and how many the output matrix."""
    config = SHAPES[shape]
    hidden, heads, kv_heads = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    head = config.get("head_dim", hidden // heads)
    attention = hidden * head * (2 * heads + 2 * kv_heads)
    layer = attention + 3 * hidden * config["intermediate_size"]
    return layer * config["num_hidden_layers"], hidden * config["vocab_size"]


def cache_bytes_per_token(shape: str) -> int:
    """Keys and values of one position in two-byte numbers."""
    config = SHAPES[shape]
    head = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head

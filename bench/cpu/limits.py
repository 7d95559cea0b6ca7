"""What a workload asks of the machine at least: bytes read and operations done, and the time that they need at best.

Plain arithmetic on shapes; the speeds of the machine come from ceilings.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.cpu.ceilings import Ceilings
from bench.cpu.workloads import Workload, cache_bytes_per_token, weight_count
from bench.shapes import SHAPES

STEP_TOKENS = 2048  # prompt tokens that share one reading of the weights

# Bits of a weight of the layers, and of the output matrix, with their scales.
BITS = {
    "bf16": (16, 16),
    "f32": (32, 32),
    "int8": (8.0, 8.0),
    "int4": (4.13, 8.0),
    "int4-g32": (4.5, 8.0),
    "W8A8": (8.0, 16),
    "GPTQ": (4.16, 16),
    "BF16": (16, 16),
    "Q8_0": (8.5, 8.5),
    "Q4_0": (4.5, 6.56),
    "Q4_K_M": (4.83, 6.56),
}
# The unit that an ideal engine would multiply with.
UNITS = {"bf16": "bf16", "int8": "int8", "int4": "int8"}


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes that must be read, and multiplications and additions."""

    bytes: float
    operations: float

    def seconds(self, ceilings: Ceilings, precision: str) -> float:
        """The least time: reading and computing can overlap."""
        return max(self.bytes / ceilings.read, self.operations / ceilings.rate(UNITS[precision]))

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.operations + other.operations)


def phases(workload: Workload, variant: str) -> list[Work]:
    """The prompt phase and the decode phase of one run; only those that the workload's figure speaks of."""
    layers, head = weight_count(workload.shape)
    layer_bits, head_bits = BITS[variant]
    weights = layers * layer_bits / 8
    output = head * head_bits / 8
    entry = cache_bytes_per_token(workload.shape)
    config = SHAPES[workload.shape]
    width = config["num_attention_heads"] * config.get(
        "head_dim", config["hidden_size"] // config["num_attention_heads"]
    )
    pair = 4 * width * config["num_hidden_layers"]  # one query position with one key position

    tokens = workload.shared_len + workload.requests * workload.input_len
    pairs = workload.requests * workload.input_len * (workload.input_len / 2 + workload.shared_len)
    pairs += workload.shared_len**2 / 2
    readings = -(-tokens // STEP_TOKENS)
    prompt = Work(
        readings * weights + output + entry * tokens,
        2 * layers * tokens + 2 * head * workload.requests + pair * pairs,
    )
    steps = workload.output_len if workload.kind == "decode" else workload.output_len - 1
    context = workload.shared_len + workload.input_len + workload.output_len / 2
    rows = steps * workload.requests
    decode = Work(
        steps * (weights + output) + rows * context * entry,
        2 * (layers + head) * rows + pair * rows * context,
    )
    return {"decode": [decode], "prefill": [prompt]}.get(workload.kind, [prompt, decode])


def work_of(workload: Workload, variant: str) -> Work | None:
    """All that a run must read and compute, None for workloads that are not about speed."""
    if workload.kind not in ("decode", "prefill", "generate", "shared"):
        return None
    return sum(phases(workload, variant), Work(0, 0))


def seconds_of(workload: Workload, value: float) -> float:
    """The time of the run that gave the figure `value`."""
    if workload.kind == "decode":
        return workload.output_len / value
    if workload.kind == "prefill":
        return workload.requests * workload.input_len / value
    if workload.kind == "generate":
        return workload.requests * workload.output_len / value
    return value


def best_seconds(workload: Workload, variant: str, ceilings: Ceilings) -> float | None:
    """The time at full bandwidth and full speed of arithmetic; None where that says nothing."""
    if work_of(workload, variant) is None:
        return None
    return sum(phase.seconds(ceilings, workload.precision) for phase in phases(workload, variant))

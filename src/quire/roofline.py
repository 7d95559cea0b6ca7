"""What this machine can do, measured in a fraction of a second, and what that allows a model at best.

A decode step reads all weights once, whatever the batch; a position costs two operations per weight.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quire.core.picture import Ceiling

if TYPE_CHECKING:
    from quire.resolve import EngineConfig

READ_BYTES = 128 << 20  # far beyond any cache
SIDE = 1024
REPEATS = 4
ROUNDS = 200_000
EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured limits: bytes read per second, and operations per second in the arithmetic of a model."""

    bandwidth: float
    flops: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a model asks of a machine: bytes of weights read by each step, weights multiplied per position."""

    read_bytes: int
    active_weights: int


def ceiling_of(config: EngineConfig) -> Ceiling:
    """What this machine allows the model of an engine; measures for a moment."""
    speed, load = measure(config), load_of(config)
    return Ceiling(speed.bandwidth, speed.flops, load.read_bytes, load.active_weights)


def measure(config: EngineConfig) -> Speed:
    """The limits of the device that an engine runs on."""
    if config.device == "cuda":
        return measure_cuda()
    return measure_cpu(config.threads, "int8" if config.files.method else str(config.dtype).removeprefix("torch."))


def load_of(config: EngineConfig) -> Load:
    """What a step reads and multiplies: all weights but the embedding table, and only the experts that are chosen."""
    # Imported here: PyTorch comes with them, and the command line's flags do without.
    from quire.models.files.headers import weight_headers
    from quire.models.footprint import bytes_per_weight, head_bytes
    from quire.resolve import count_parameters

    files, layout = config.files, config.layout

    if files.weight_format == "safetensors":
        sizes = {name: math.prod(header.shape) for name, header in weight_headers(files).items()}
    else:
        sizes = {"": count_parameters(files)}
    head = 0 if any(name.endswith("lm_head.weight") for name in sizes) else layout.vocab_size * layout.hidden_size
    text = files.text_config.to_dict()
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 1
    share = (text.get("num_experts_per_tok") or experts) / experts
    active = head
    for name, size in sizes.items():
        if name.endswith(EMBEDDING_NAMES) or not name:
            size -= layout.vocab_size * layout.hidden_size
        active += int(size * share) if ".experts." in name else size
    method = config.files.method
    read = (active - head) * bytes_per_weight(method, config.dtype) + head * head_bytes(method, config.dtype)
    return Load(int(read), active)


def measure_cpu(threads: int, arithmetic: str = "float32") -> Speed:
    """Read bandwidth and speed of products of `threads` cores: the better of what NumPy and the native library reach.

    `arithmetic` is float32, bfloat16 or int8, where a machine may have faster products; quantized weights are multiplied
    as int8. A ceiling is never below what was seen, and other programs disturb one measurement or the other.
    """
    # Imported here: PyTorch comes with them, and the arithmetic below does without.
    import torch

    from quire.kernels.cpu import native

    level = native.choose_level()
    plain = measure_numpy(threads)
    if level is None:
        return plain
    library = native.Library(level)
    library.set_threads(threads)
    dtype = {"bfloat16": torch.bfloat16, "int8": torch.int8}.get(arithmetic, torch.float32)
    bandwidth, flops = library.read_bandwidth(READ_BYTES >> 20), library.multiply_rate(ROUNDS, dtype)
    return Speed(max(bandwidth, plain.bandwidth), max(flops, plain.flops))


def measure_numpy(threads: int) -> Speed:
    """The same with nothing but NumPy; the best of a few tries."""
    with ThreadPoolExecutor(threads) as team:
        data = np.ones(READ_BYTES // 4, np.float32)
        parts = np.array_split(data, threads)
        seconds = _best(lambda: list(team.map(_read, parts)))
        bandwidth = data.nbytes / seconds
    left = np.ones((SIDE, SIDE), np.float32)
    return Speed(bandwidth, 2 * SIDE**3 / _best(lambda: left @ left))


def measure_cuda() -> Speed:
    """The same of a GPU, by PyTorch, in bfloat16."""
    # Imported here: only a machine with a GPU comes this way, and PyTorch takes a second.
    import torch

    data = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    left = torch.ones((4 * SIDE, 4 * SIDE), dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(data)

    def timed(work: Callable[[], object]) -> float:
        def finished() -> None:
            work()
            torch.cuda.synchronize()

        finished()
        return _best(finished)

    # A copy reads and writes each byte.
    return Speed(2 * data.nbytes / timed(lambda: target.copy_(data)), 2 * (4 * SIDE) ** 3 / timed(lambda: left @ left))


def _read(part: np.ndarray) -> float:
    return float(np.dot(part, part))


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few tries."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def decode_rate(load: Load, speed: Speed, batch: int, context_bytes: int) -> float:
    """Output tokens per second, at best, of `batch` requests that read `context_bytes` of pages each per token."""
    reading = (load.read_bytes + batch * context_bytes) / speed.bandwidth
    computing = 2 * load.active_weights * batch / speed.flops
    return batch / max(reading, computing)


def prefill_rate(load: Load, speed: Speed) -> float:
    """Prompt tokens per second, at best, when prompts are long."""
    return speed.flops / (2 * load.active_weights)

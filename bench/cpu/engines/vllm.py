"""vLLM as one of the engines: the runner in vLLM's own environment, with the settings that suit its CPU backend best."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cpu.checkpoint import model_folder
from bench.cpu.engines.session import Engine, LineSession, Session, StartSession
from bench.cpu.place import Place, processor
from bench.cpu.workloads import CACHE_BYTES, Workload
from bench.shapes import SHAPES

RUNNER = Path(__file__).parents[1] / "runner" / "run.py"

# quantization_config of a config.json, as checkpoints of these formats have it.
W8A8: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
            "output_activations": None,
        }
    },
}
GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "desc_act": False,
    "sym": True,
    "lm_head": False,
}
FORMATS = {"W8A8": W8A8, "GPTQ": GPTQ}


def missing(place: Place) -> str | None:
    """Is it installed?"""
    if not (place.peers / "vllm" / "bin" / "python").exists():
        return f"not installed in {place.peers}; bench/cpu/install_peers.sh vllm does it"
    return None


def environment(place: Place) -> dict[str, str]:
    """Nothing sent home, one thread on each core, Intel's OpenMP and tcmalloc as its documents advise."""
    folder = place.peers / "vllm"
    cores = processor().cores[: place.threads]
    allocators = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"))
    preload = [str(path) for path in (*allocators[:1], folder / "lib" / "libiomp5.so") if path.exists()]
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(CACHE_BYTES >> 30),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in cores),
        "OMP_NUM_THREADS": str(place.threads),
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "LD_PRELOAD": ":".join(preload),
        "PYTHONPATH": "",
    }


def open_session(place: Place, workload: Workload, variant: str) -> Session:
    """A runner for the group of `workload`."""
    stored = workload.kind == "start"
    settings = {
        "engine": "vllm",
        "task": "generate",
        "model": str(model_folder(place.models, workload.shape, FORMATS.get(variant), stored)),
        "load_format": "auto" if stored else "dummy",
        # bfloat16 is a plain loop on processors without such instructions; four bits refuse float32.
        "dtype": "bfloat16" if processor().has_bf16 or variant == "GPTQ" else "float32",
        "vocab_size": SHAPES[workload.shape]["vocab_size"],
    }
    command = [str(place.peers / "vllm" / "bin" / "python"), str(RUNNER), json.dumps(settings)]
    kind = StartSession if stored else LineSession
    return kind(command, environment(place), place.logs / f"vllm-{workload.shape}-{variant}.log", place)


ENGINE = Engine("vllm", missing, open_session)

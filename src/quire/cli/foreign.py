"""Flags that users know from other engines and that quire does without.

IGNORED change nothing that could matter here: they are passed over with a line in the log. FOREIGN_FLAGS ask for
something that quire does in another way or cannot do: they are errors that say what to do instead. A flag that quire
gets one day is taken off these lists.
"""

from __future__ import annotations

_ONE_DEVICE = "this version runs on one device."
_NOT_YET = "this version cannot do it."

# Name -> how many values follow.
IGNORED = {
    "compilation-config": 1,
    "cuda-graph-sizes": 1,
    "disable-custom-all-reduce": 0,
    "disable-log-requests": 0,
    "enforce-eager": 0,
    "max-seq-len-to-capture": 1,
    "num-scheduler-steps": 1,
    "preemption-mode": 1,
    "swap-space": 1,
    "tokenizer-mode": 1,
    "use-v2-block-manager": 0,
}

FOREIGN_FLAGS = {
    "attention-backend": "the kernels follow from --device. Leave it out.",
    "chunked-prefill-size": "use --max-num-batched-tokens.",
    "context-length": "use --max-model-len.",
    "cpu-offload-gb": _NOT_YET,
    "distributed-executor-backend": _ONE_DEVICE,
    "enable-expert-parallel": _ONE_DEVICE,
    "enable-lora": _NOT_YET,
    "guided-decoding-backend": _NOT_YET,
    "kv-transfer-config": _NOT_YET,
    "lora-modules": _NOT_YET,
    "mem-fraction-static": "use --gpu-memory-utilization.",
    "model-path": "give the model as the first argument.",
    "structured-outputs-config": _NOT_YET,
    "tensor-parallel": "use --tensor-parallel-size.",
    "worker-use-ray": _ONE_DEVICE,
}

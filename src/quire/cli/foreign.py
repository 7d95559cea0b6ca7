"""Flags that users know from other engines and that quire has no use for, with what to do instead.

A sentence each, shown when such a flag is given. A flag that quire gets one day is taken off this list.
"""

from __future__ import annotations

_LEAVE_OUT = "nothing is compiled ahead here, so there is nothing to set. Leave it out."
_ONE_DEVICE = "this version runs on one device."
_NOT_YET = "this version cannot do it."

FOREIGN_FLAGS = {
    "attention-backend": "the kernels follow from --device. Leave it out.",
    "block-manager": "there is one. Leave it out.",
    "chunked-prefill-size": "use --max-num-batched-tokens.",
    "compilation-config": _LEAVE_OUT,
    "context-length": "use --max-model-len.",
    "cpu-offload-gb": _NOT_YET,
    "cuda-graph-sizes": _LEAVE_OUT,
    "disable-log-requests": "requests are logged only with --enable-log-requests. Leave it out.",
    "distributed-executor-backend": _ONE_DEVICE,
    "enable-expert-parallel": _ONE_DEVICE,
    "enable-lora": _NOT_YET,
    "enforce-eager": _LEAVE_OUT,
    "guided-decoding-backend": _NOT_YET,
    "kv-transfer-config": _NOT_YET,
    "lora-modules": _NOT_YET,
    "max-seq-len-to-capture": _LEAVE_OUT,
    "mem-fraction-static": "use --gpu-memory-utilization.",
    "model-path": "give the model as the first argument.",
    "num-scheduler-steps": "the next step is planned ahead without it. Leave it out.",
    "preemption-mode": "a request that gives its pages back is computed again, mostly from cached pages. Leave it out.",
    "reasoning-parser": _NOT_YET,
    "speculative-config": _NOT_YET,
    "structured-outputs-config": _NOT_YET,
    "swap-space": "pages are not swapped, but computed again. Leave it out.",
    "tensor-parallel": "use --tensor-parallel-size.",
    "tokenizer-mode": "the model's own tokenizer files decide. Leave it out.",
    "tool-call-parser": _NOT_YET,
    "use-v2-block-manager": "there is one. Leave it out.",
    "worker-use-ray": _ONE_DEVICE,
}

"""Parts of torch that run later: a native model does without them and says the same, and whoever asks for one has it."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from quire import LLM, SamplingParams
from quire.kernels.late_torch import RELEASES

pytestmark = pytest.mark.skipif(
    not importlib.metadata.version("torch").startswith(RELEASES), reason="tried with these releases only"
)
PARAMS = {"temperature": 0.8, "seed": 3, "max_tokens": 12, "logprobs": 2, "repetition_penalty": 1.1}

LEAVING = """
import sys
from quire.kernels.late_torch import LATE, PARTS, complete, leave_for_later
leave_for_later()
def left():
    return sorted(name for name in LATE if sys.modules[name].__spec__.loader is PARTS)
"""
GENERATES = f"""{LEAVING}
from quire import LLM, SamplingParams
llm = LLM(threads=1, kv_cache_memory_bytes=1 << 26, packed_cache="off")
print(llm.generate("Once upon a time", SamplingParams(**{PARAMS}), use_tqdm=False)[0].outputs[0].token_ids, left())
"""
META = "import torch; print(torch.nn.functional.pdist(torch.empty(3, 4, device='meta')).shape, left())"
WAYS = {
    "a package that wants all": "import transformers",
    "a compiler": "import torch._dynamo",
    "code that is not known": "complete()",
    "an attribute": "import torch; torch._meta_registrations.device_hint; torch.export.export; torch.distributions.Normal",
    "random weights": "from quire.models.load import dummy_weights; list(dummy_weights({}, 1))",
    "a name": "from torch.export import Dim; from torch.distributions import Normal; complete()",
    "a module inside": "import torch.export.dynamic_shapes; from torch.distributions.normal import Normal; "
    "assert Normal is torch.distributions.Normal; complete()",
}


def said(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    ).stdout.strip()


def test_a_native_model_does_without_them() -> None:
    llm = LLM(threads=1, kv_cache_memory_bytes=1 << 26, packed_cache="off")
    ids = llm.generate("Once upon a time", SamplingParams(**PARAMS), use_tqdm=False)[0].outputs[0].token_ids
    llm.close()
    left = ["torch._meta_registrations", "torch.distributions", "torch.export"]
    assert said(GENERATES) == f"{list(ids)} {left}"


@pytest.mark.parametrize("way", WAYS)
def test_whoever_asks_has_them(way: str) -> None:
    assert said(f"{LEAVING}\n{WAYS[way]}\n{META}").endswith("[]")

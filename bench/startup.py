"""From the start of the process to the first token: seconds by phase, peak memory, and what the environment takes.

python bench/startup.py [MODEL] [FLAGS of quire run] [--rounds 2]
python bench/startup.py --shape llama-3.2-1b --folder /tmp/models    random weights, written once

The first round begins with an empty cache of packed weights, the others find what it left. Weight files are read once
before, so that they are in the system's page cache.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from shapes import SHAPES, write_shape

PROMPT = "Once upon a time"
PHASE = " took "


@dataclass(frozen=True, slots=True)
class Start:
    """One start. Seconds and bytes."""

    first_token: float
    whole_process: float
    peak_bytes: int
    phases: dict[str, float]


def main() -> None:
    """Start the command several times and print each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape in place of a model")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quire-shapes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found, rest = parser.parse_known_args()
    model = [] if found.shape is None else [str(write_model(found.shape, found.folder)), "--skip-tokenizer-init"]
    for path in Path(model[0]).glob("*.safetensors") if model else ():
        path.read_bytes()
    starts = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(found.rounds):
            starts.append(start([*model, *rest], cache))
            print(f"start {number + 1}: {as_text(starts[-1])}")
    environment = measure_environment()
    print(f"environment: {environment['bytes'] / 1e9:.2f} GB, {environment['packages']} packages")
    found.results.mkdir(exist_ok=True)
    record = {"flags": [*model, *rest], "starts": [asdict(one) for one in starts], "environment": environment}
    (found.results / "startup.json").write_text(json.dumps(record, indent=2))


# What runs in the process that is measured: the engine by hand, so that a model without a tokenizer will do.
CHILD = """
import json, resource, sys, time
began = float(sys.argv[1])
from quire.cli.flags import FlagParser
from quire.cli.options import add_engine_flags, engine_options
parser = FlagParser("startup", "", "[MODEL]")
parser.add_argument("model_argument", nargs="?")
add_engine_flags(parser)
options = engine_options(parser.parse(sys.argv[2:]))
phases = {"python and flags": time.time() - began}
mark = time.time()
from quire.engine.engine import Engine
from quire.engine.start import start_engine
from quire.core.params import SamplingParams
phases["imports"] = time.time() - mark
engine = start_engine(options, on_phase=lambda name, seconds: phases.__setitem__(name, seconds))
mark = time.time()
prompt = {"prompt_token_ids": [1, 2, 3, 4]} if options.model.skip_tokenizer_init else "Once upon a time"
params = SamplingParams(max_tokens=1, detokenize=not options.model.skip_tokenizer_init)
engine.submit(engine.prepare("1", prompt, params))
while engine.has_work():
    engine.step()
phases["first token"] = time.time() - mark
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first_token": time.time() - began, "peak_bytes": peak, "phases": phases}), flush=True)
"""


def start(words: list[str], cache: str) -> Start:
    """Start a process, wait for its first token and its end."""
    began = time.time()
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(began), *words],
        stdout=subprocess.PIPE,
        env={**os.environ, "QUIRE_CACHE": cache},
        check=True,
    )
    told = json.loads(ran.stdout)
    return Start(told["first_token"], time.time() - began, told["peak_bytes"], told["phases"])


def as_text(one: Start) -> str:
    """One line, and one for each phase."""
    phases = "".join(f"\n    {name:30} {seconds:6.2f} s" for name, seconds in one.phases.items())
    return (
        f"first token after {one.first_token:.2f} s, process {one.whole_process:.2f} s, "
        f"peak {one.peak_bytes / 1e9:.2f} GB{phases}"
    )


def write_model(name: str, folder: Path) -> Path:
    """A model of that shape with random weights on disk; what is there already is taken."""
    target = write_shape(name, folder)
    path = target / "model.safetensors"
    if path.exists():
        return target
    # Imported here: only for the names and shapes of the weights.
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target))
    torch.manual_seed(0)
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    tensors = {
        key: torch.randn(tensor.shape, dtype=torch.bfloat16) * 0.02
        if tensor.dim() > 1
        else torch.ones_like(tensor, device="cpu", dtype=torch.bfloat16)
        for key, tensor in model.state_dict().items()
        if key not in tied
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def measure_environment() -> dict[str, int]:
    """Bytes and packages that quire's own dependencies bring, leaving out what is installed for tests and tools."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    listed = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    found: dict[str, int] = {}
    waiting = re.findall(r'"([^"]+)"', listed)
    while waiting:
        wanted = Requirement(waiting.pop())
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        try:
            package = importlib.metadata.distribution(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = sum(file.size or 0 for file in package.files or ())
        waiting += package.requires or []
    return {"bytes": sum(found.values()), "packages": len(found)}


if __name__ == "__main__":
    main()

"""From the start of the process to the first token: seconds by phase, memory, and what the environment takes.

python bench/startup.py [MODEL] [FLAGS of quire run] [--rounds 2]
python bench/startup.py --shape llama-3.2-1b --folder /tmp/models    random weights and a tokenizer, written once
python bench/startup.py --shape llama-3.2-1b --serve                 the same through quire serve, with both processes
python bench/startup.py --shape llama-3.2-1b --fill 4096 --kv-cache-memory-bytes 134217728 --max-model-len 2048
                                                                        memory with all pages in use

The first round begins with an empty cache of packed weights, the others find what it left. Weight files are read once
before, so that they are in the system's page cache, and Python's compiled files are there, as pip leaves them.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from shapes import SHAPES, write_shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

PROMPT = "Once upon a time"
PORT = 8123


@dataclass(frozen=True, slots=True)
class Start:
    """One start. Seconds and bytes; `memory` by process, as it is after the first token."""

    first_token: float
    phases: dict[str, float]
    memory: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Start the command several times and print each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape in place of a model")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "quire-shapes")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help="through quire serve instead of in one process")
    parser.add_argument("--fill", type=int, default=0, help="positions that are computed before memory is measured")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found, rest = parser.parse_known_args()
    words = ([] if found.shape is None else [str(write_model(found.shape, found.folder))]) + rest
    for path in Path(words[0]).glob("*.safetensors") if words else ():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", "import quire.engine.start, quire.serve.app"], env=environment, check=True)
    starts = []
    if found.fill and found.serve:
        parser.error("--fill is for one process, without --serve")
    with tempfile.TemporaryDirectory() as cache:
        for number in range(found.rounds):
            own = environment | {"QUIRE_CACHE": cache}
            starts.append(start_server(words, own) if found.serve else start(words, own, found.fill))
            print(f"start {number + 1}: {as_text(starts[-1])}", flush=True)
    installed = measure_environment()
    print(f"environment: {installed['bytes'] / 1e9:.2f} GB, {installed['packages']} packages")
    found.results.mkdir(exist_ok=True)
    record = {"flags": words, "serve": found.serve, "starts": [asdict(one) for one in starts], "environment": installed}
    (found.results / "startup.json").write_text(json.dumps(record, indent=2))


# What runs in the process that is measured.
CHILD = """
import json, resource, sys, time
began = float(sys.argv[1])
phases = {"python": time.time() - began}
mark = time.time()
from quire.cli.flags import FlagParser
from quire.cli.options import add_engine_flags, engine_options
parser = FlagParser("startup", "", "[MODEL]")
parser.add_argument("model_argument", nargs="?")
add_engine_flags(parser)
options = engine_options(parser.parse(sys.argv[3:]))
from quire.core.params import SamplingParams
from quire.engine.engine import Engine
phases["flags, text side"] = time.time() - mark
mark = time.time()
def on_phase(name, seconds):
    if seconds is None:
        phases.setdefault("importing torch", time.time() - mark)
    else:
        phases[name] = seconds
engine = Engine.from_options(options, on_phase=on_phase)
mark = time.time()
prompt = {"prompt_token_ids": [1, 2, 3, 4]} if options.model.skip_tokenizer_init else "Once upon a time"
params = SamplingParams(max_tokens=1, detokenize=not options.model.skip_tokenizer_init)
engine.submit(engine.prepare("1", prompt, params))
while engine.has_work():
    engine.step()
phases["first token"] = time.time() - mark
first_token = time.time() - began
LONG = 1024
for number in range(int(sys.argv[2]) // LONG):
    ids = [1 + (number * LONG + position) % 30000 for position in range(LONG - 1)]
    engine.submit(engine.prepare(f"fill {number}", {"prompt_token_ids": ids}, params))
while engine.has_work():
    engine.step()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"first_token": first_token, "peak": peak, "phases": phases}), flush=True)
"""


def start(words: list[str], environment: dict[str, str], fill: int) -> Start:
    """Start a process, wait for its first token, its `fill` positions and its end: by then packed weights are kept."""
    began = time.time()
    command = [sys.executable, "-c", CHILD, str(began), str(fill), *words]
    ran = subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True)
    told = json.loads(ran.stdout)
    return Start(told["first_token"], told["phases"], {"peak": told["peak"]})


def start_server(words: list[str], environment: dict[str, str]) -> Start:
    """Start `quire serve`, ask for one token as soon as it is ready, look at its processes, and end it."""
    began = time.time()
    command = [sys.executable, "-m", "quire.cli.main", "serve", *words, "--port", str(PORT), "--no-engine-spare"]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        phases = {"listening": 0.0, "ready": 0.0}
        while not phases["ready"]:
            status = _answer("GET", "/readyz")
            now = time.time() - began
            if status is not None and not phases["listening"]:
                phases["listening"] = now
            if status == 200:
                phases["ready"] = now
            elif server.poll() is not None:
                raise SystemExit("the server ended; see its log above")
            else:
                time.sleep(0.01)
        _answer("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 1})
        first = time.time() - began
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        memory = {"API process": _resident(server.pid), **{f"child {pid}": _resident(int(pid)) for pid in children}}
        return Start(first, phases, memory)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _answer(method: str, path: str, body: dict[str, object] | None = None) -> int | None:
    """The status of a request, None where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        return response.status
    except OSError:
        return None
    finally:
        connection.close()


def _resident(pid: int) -> int:
    """Bytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def as_text(one: Start) -> str:
    """One line, and one for each phase and process."""
    phases = "".join(f"\n    {name:30} {seconds:6.2f} s" for name, seconds in one.phases.items())
    memory = "".join(f"\n    {name:30} {nbytes / 1e6:6.0f} MB" for name, nbytes in one.memory.items())
    return f"first token after {one.first_token:.2f} s{phases}{memory}"


def write_model(name: str, folder: Path) -> Path:
    """A model of that shape with random weights on disk; what is there already is taken."""
    target = write_shape(name, folder)
    if not (target / "tokenizer.json").exists():
        write_tokenizer(target, SHAPES[name]["vocab_size"])
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


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE tokenizer of that many tokens: bytes, all pairs of bytes, then triples, and two special tokens."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(one, two) for one in tokens for two in tokens]
    triples = [(one + two, three) for one, two in pairs for three in tokens[:4]]
    merges = (pairs + triples)[: size - len(tokens) - 2]
    vocabulary = {token: index for index, token in enumerate([*tokens, *map("".join, merges)])}
    rust = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<s>", "</s>"])
    rust.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


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

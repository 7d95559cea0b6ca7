"""Finding models: where they are looked for, what their config says, and how each mistake is explained."""

from __future__ import annotations

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import write_tiny

from quire import resolve
from quire.config import ModelOptions
from quire.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from quire.models.files.hub import ModelFiles, choose_weights, find_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-llama", "llama")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy whose JSON files a test may change; the weights are linked."""
    copy = tmp_path / "model"
    copy.mkdir()
    for path in tiny.iterdir():
        if path.suffix == ".safetensors":
            (copy / path.name).symlink_to(path)
        else:
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def find(model: Path | str | None, **options: object) -> ModelFiles:
    return find_model(ModelOptions(model=None if model is None else str(model), **options))  # type: ignore[arg-type]


def change(folder: Path, name: str = "config.json", **fields: object) -> None:
    path = folder / name
    values = json.loads(path.read_text()) if path.exists() else {}
    values.update(fields)
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


# ---------------------------------------------------------------- where


def test_local_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find(tiny)
    assert files.folder == tiny and files.name == str(tiny) and files.tokenizer == str(tiny)
    assert files.architecture == "LlamaForCausalLM" and files.config.model_type == "llama"
    assert [path.name for path in files.weights] == ["model.safetensors"] and files.weight_format == "safetensors"
    monkeypatch.chdir(tiny.parent)
    assert find("tiny-llama").folder == tiny
    assert find("./tiny-llama/").folder == tiny


def test_nothing_means_the_bundled_model(monkeypatch: pytest.MonkeyPatch, tiny: Path, tmp_path: Path) -> None:
    import quire.models.files.hub as hub

    monkeypatch.setattr(hub.importlib.resources, "files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match="lacks the bundled one"):
        find(None)
    (tmp_path / "bundled").mkdir()
    (tmp_path / "bundled" / "model").symlink_to(tiny)
    files = find(None)
    assert files.name == "bundled" and files.architecture == "LlamaForCausalLM"


def test_wrong_path_names_the_nearest_folder(tiny: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"does not exist.*nearest existing folder is {tiny}"):
        find(tiny.parent / "tiny-lama")
    with pytest.raises(ModelNotFoundError, match=f"exists as far as {tiny.parent}"):
        find(tiny.parent / "zzz" / "model")


def test_a_file_is_no_model(tiny: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"is a file.*{tiny}"):
        find(tiny / "config.json")


def test_a_name_that_is_neither_path_nor_id() -> None:
    with pytest.raises(ModelNotFoundError, match="no hub id either"):
        find("not a model!")


def test_a_hub_id_offline() -> None:
    with pytest.raises(ModelNotFoundError, match="not complete in the hub's cache, and HF_HUB_OFFLINE is set"):
        find("nobody/nothing")


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json.*holds nothing"):
        find(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="Mistral's own format"):
        find(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="GGUF files are not supported"):
        find(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ModelNotFoundError, match="adapter of the model 'org/base'"):
        find(tmp_path)


def test_a_folder_above_the_model(tiny: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"Did you mean {tiny}"):
        find(tiny.parent)


# ---------------------------------------------------------------- config


def test_config_that_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ModelError, match=r"config\.json cannot be read as JSON"):
        find(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="holds a list"):
        find(folder)


def test_overrides_are_laid_over_the_config(folder: Path) -> None:
    files = find(folder, hf_overrides={"num_hidden_layers": 2, "rope_parameters": {"rope_theta": 77.0}})
    assert files.config.num_hidden_layers == 2 and files.raw_config["num_hidden_layers"] == 2
    assert files.config.rope_parameters["rope_theta"] == 77.0
    assert files.config.rope_parameters["rope_type"] == "default"


def test_impossible_config(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"refused by transformers' LlamaConfig"):
        find(folder, hf_overrides={"hidden_size": "wide"})


def test_unknown_model_type(folder: Path) -> None:
    change(folder, model_type="lama", architectures=["LamaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"of type 'lama'.*nearest one it knows is '\w*llama"):
        find(folder)


def test_missing_architecture_and_missing_type(folder: Path) -> None:
    change(folder, architectures=...)
    assert find(folder).architecture == "LlamaForCausalLM"
    change(folder, architectures=["Qwen3ForCausalLM"], model_type=...)
    assert find(folder).config.model_type == "qwen3"
    change(folder, architectures=...)
    with pytest.raises(UnsupportedModelError, match="has no model_type"):
        find(folder)
    change(folder, model_type="vit")
    with pytest.raises(UnsupportedModelError, match="no causal language model for the type 'vit'"):
        find(folder)


@pytest.mark.parametrize(
    ("kind", "scaling", "expected"),
    [
        ("llama", {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ("llama", {"rope_type": "default"}, {"rope_type": "default"}),
        ("qwen2", {"type": "mrope", "mrope_section": [2, 1, 1]}, {"rope_type": "default"}),
        (
            "phi3",
            {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            {"rope_type": "longrope", "original_max_position_embeddings": 128},
        ),
    ],
)
def test_older_spellings_of_rope(
    folder: Path, kind: str, scaling: dict[str, object], expected: dict[str, object]
) -> None:
    change(
        folder,
        model_type=kind,
        architectures=...,
        rope_parameters=...,
        rope_scaling=scaling,
        rope_theta=5000.0,
        original_max_position_embeddings=128,
    )
    rope = find(folder).config.rope_parameters
    assert expected.items() <= rope.items() and rope["rope_theta"] == 5000.0


# ---------------------------------------------------------------- code and quantization

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from pathlib import Path
Path(__file__).with_name("was-run").touch()
class OwnConfig(LlamaConfig):
    model_type = "own-llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_of_the_model_runs_only_when_trusted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "own.py").write_text(OWN_CODE)
    change(
        folder,
        model_type="own-llama",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    with pytest.raises(UnsupportedModelError, match="Python code of its own.*--trust-remote-code"):
        find(folder)
    assert not list(tmp_path.rglob("was-run"))
    files = find(folder, trust_remote_code=True, hf_overrides={"num_hidden_layers": 1})
    assert files.remote_code and type(files.config).__name__ == "OwnConfig"
    assert files.config.num_hidden_layers == 1
    assert list(tmp_path.rglob("was-run"))


def test_code_beside_a_known_model_is_not_needed(folder: Path) -> None:
    change(folder, auto_map={"AutoConfig": "own.OwnConfig"})
    assert not find(folder).remote_code
    assert not find(folder, trust_remote_code=True).remote_code


def test_quantized_weights_are_refused_by_name(folder: Path) -> None:
    change(folder, quantization_config={"quant_method": "quip", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantized with 'quip'.*It reads gptq"):
        find(folder)
    change(folder, quantization_config=...)
    change(folder, "hf_quant_config.json", quantization={"quant_algo": "FP8"})
    with pytest.raises(UnsupportedModelError, match="quantized with 'fp8'"):
        find(folder)


def test_only_known_methods_of_quantizing_are_taken(folder: Path) -> None:
    assert find(folder, quantization="int8").folder == folder
    with pytest.raises(ConfigError, match="quantization is 'int9'.*Did you mean 'int8'"):
        find(folder, quantization="int9")


# ---------------------------------------------------------------- generation defaults


def test_generation_defaults(folder: Path, tmp_path: Path) -> None:
    change(folder, "generation_config.json", eos_token_id=[2, 7], temperature=0.6, top_k=20, max_new_tokens=99, pad=0)
    files = find(folder)
    assert files.stop_token_ids == (2, 7)
    assert files.sampling_defaults == {"temperature": 0.6, "top_k": 20, "max_new_tokens": 99}
    overridden = find(folder, override_generation_config={"temperature": 0.1, "min_p": 0.2})
    assert overridden.sampling_defaults == {"temperature": 0.1, "top_k": 20, "min_p": 0.2, "max_new_tokens": 99}
    neutral = find(folder, generation_config="vllm")
    assert neutral.sampling_defaults == {} and neutral.stop_token_ids == (2, 7)
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"top_p": 0.5, "eos_token_id": 3}')
    named = find(folder, generation_config=str(other))
    assert named.sampling_defaults == {"top_p": 0.5} and named.stop_token_ids == (3,)
    with pytest.raises(ConfigError, match=r"no generation_config\.json"):
        find(folder, generation_config=str(tmp_path))


def test_stop_ids_fall_back_to_the_config(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    assert find(folder).stop_token_ids == (2,)
    change(folder, eos_token_id=None)
    assert find(folder).stop_token_ids == ()


# ---------------------------------------------------------------- weight files


def test_safetensors_come_first() -> None:
    names = ["pytorch_model.bin", "model.safetensors", "x.pt"]
    assert choose_weights(names, "auto", "here").files == ("model.safetensors",)
    assert choose_weights(names, "pt", "here").files == ("pytorch_model.bin",)
    assert choose_weights(names[2:], "auto", "here").files == ("x.pt",)
    assert choose_weights([], "dummy", "here").format == "dummy"
    with pytest.raises(CheckpointError, match="load_format 'safetensors'"):
        choose_weights(names[:1], "safetensors", "here")


# ---------------------------------------------------------------- a hub of our own

FIND = """
import json, sys
from quire.config import ModelOptions
from quire.errors import ModelError
from quire.models.files.headers import weight_headers
from quire.models.files.hub import find_model
found = []
for options in json.loads(sys.argv[1]):
    try:
        files = find_model(ModelOptions(**options), download="revision" not in options)
        if files.headers is not None:
            found.append([sum(header.nbytes for header in weight_headers(files).values()), files.weights[0].exists()])
            continue
        names = sorted(path.name for path in files.folder.iterdir())
        found.append([str(files.folder), files.architecture, names])
    except ModelError as error:
        found.append([type(error).__name__, str(error)])
print(json.dumps(found))
"""
COMMIT = "c" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Just enough of the hub's protocol: repository info and file download of org/tiny, and org/gated for a token."""

    root: Path
    failures = 0

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        hub = type(self)
        if hub.failures:
            hub.failures -= 1
            self.reply(503, b"busy", body)
        elif "/org/tiny" not in self.path and "/org/gated" not in self.path:
            self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        elif "/org/gated" in self.path and self.headers.get("Authorization") != "Bearer secret":
            self.reply(401, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif "/other" in self.path:
            self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif self.path.startswith("/api/"):
            files = [{"rfilename": path.name, "size": path.stat().st_size} for path in hub.root.iterdir()]
            tree = [{"type": "file", "path": f["rfilename"], "size": f["size"], "oid": "0" * 40} for f in files]
            info = {"id": "org/tiny", "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
            found: object = tree if "/tree/" in self.path else info
            self.reply(200, json.dumps(found).encode(), body, {"Content-Type": "application/json"})
        else:
            path = hub.root / self.path.rsplit("/", 1)[1]
            headers = {"ETag": f'"{path.name}"', "X-Repo-Commit": COMMIT}
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if part is not None:
                self.reply(206, path.read_bytes()[int(part[1]) : int(part[2]) + 1], body, headers)
            else:
                self.reply(200, path.read_bytes(), body, headers)

    def reply(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[type[Hub]]:
    class Own(Hub):
        root = tiny

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    Own.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Own
    server.shutdown()


def from_hub(hub: type[Hub], home: Path, *tried: dict[str, str], offline: bool = False) -> list[list[str]]:
    """find_model in a process of its own, whose hub is ours: the hub's client reads its environment on import."""
    own = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}  # type: ignore[attr-defined]
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1" if offline else "0"}
    environment.pop("HF_TOKEN", None)
    ran = subprocess.run(
        [sys.executable, "-c", FIND, json.dumps(tried)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: list[list[str]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def test_the_hub(hub: type[Hub], tmp_path: Path) -> None:
    hub.failures = 1  # transient: tried again
    planned, found, none, revision, gated, opened = from_hub(
        hub,
        tmp_path,
        {"model": "org/tiny", "revision": "main"},
        {"model": "org/tiny"},
        {"model": "org/none"},
        {"model": "org/tiny", "revision": "other"},
        {"model": "org/gated"},
        {"model": "org/gated", "hf_token": "secret"},
    )
    weights = load_file(hub.root / "model.safetensors").values()
    assert planned == [sum(tensor.numel() * 4 for tensor in weights), False]
    assert COMMIT in found[0] and found[1] == "LlamaForCausalLM"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found[2])
    assert none[0] == "ModelNotFoundError" and "the hub knows no such repository" in none[1]
    assert revision[0] == "ModelNotFoundError" and "has no revision 'other'" in revision[1]
    assert gated[0] == "ModelNotFoundError" and "is gated on the hub" in gated[1] and "HF_TOKEN" in gated[1]
    assert opened[1] == "LlamaForCausalLM"
    assert from_hub(hub, tmp_path, {"model": "org/tiny"}, offline=True) == [found]


def test_the_tokenizer_may_allow_less_than_the_model(folder: Path) -> None:
    assert resolve.model_length(find(folder)).value == 512
    change(folder, "tokenizer_config.json", model_max_length=300)
    shorter = resolve.model_length(find(folder))
    assert shorter.value == 300 and "model_max_length" in shorter.reason
    change(folder, "tokenizer_config.json", model_max_length=10**30)
    assert resolve.model_length(find(folder)).value == 512


def test_float16_is_refused_where_it_overflows(tmp_path: Path) -> None:
    files = find(write_tiny(tmp_path, "gemma2", tokenizer=False))
    with pytest.raises(ConfigError, match="float16, but activations of gemma2"):
        resolve.check_dtype(files, torch.float16)
    resolve.check_dtype(files, torch.bfloat16)


def test_dtype_of_the_config_is_read(tmp_path: Path) -> None:
    files = find(write_tiny(tmp_path / "half", dtype=torch.bfloat16, tokenizer=False))
    assert files.config.dtype == "bfloat16"

"""Model folders that are broken: each ends with a short error that names the file or the field, never with a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import quire.bundled
from quire.config import ModelOptions
from quire.errors import CheckpointError, ModelError, QuireError, UnsupportedModelError
from quire.layers.target import Target
from quire.models.files.describe import describe, stop_token_ids
from quire.models.files.headers import read_headers, read_index
from quire.models.files.hub import choose_weights, find_model
from quire.models.registry import select_impl
from quire.models.weights.load import LoadRules, load_into

BUNDLED = Path(quire.bundled.__file__).parent / "model"


def broken(folder: Path, **changes: Any) -> Path:
    """The bundled model's config with other values."""
    config = json.loads((BUNDLED / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -5),
        ("hidden_size", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 10**9),
        ("vocab_size", -3),
        ("vocab_size", 0),
        ("head_dim", -2),
        ("num_attention_heads", -1),
        ("num_key_value_heads", -1),
        ("architectures", "Qwen3ForCausalLM"),
        ("rope_theta", {"rope_type": "default", "rope_theta": "x"}),
        ("factor", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        ("factor", {"rope_type": "linear", "rope_theta": 1e4, "factor": "x"}),
        ("hidden_size", None),
        ("intermediate_size", "x"),
        ("hidden_act", 3),
    ],
)
def test_impossible_fields_are_named(tmp_path: Path, field: str, value: Any) -> None:
    key = "rope_parameters" if isinstance(value, dict) else field
    with pytest.raises(ModelError) as caught:
        describe(broken(tmp_path, **{key: value}), "rubbish", ModelOptions())
    message = str(caught.value)
    assert field in message and "config.json" in message and "rubbish" in message and len(message) < 700


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000], ids=repr)
def test_a_config_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match="config.json"):
        describe(tmp_path, "rubbish", ModelOptions())


@pytest.mark.parametrize("found", ["x", [1, "x"], {"a": 1}, [None]])
def test_ends_that_are_no_tokens(found: Any) -> None:
    with pytest.raises(ModelError, match="eos_token_id"):
        stop_token_ids({"eos_token_id": found}, None)


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": ["a", "b"]},
        {"data_offsets": [0.0, 8.0]},
        {"data_offsets": [8, 0]},
        {"data_offsets": [0, 10**12]},
        {"shape": [-1, -4]},
        {"shape": ["x"]},
        {"shape": [True]},
        {"shape": 5},
        {"dtype": ["F32"]},
        {"dtype": None},
    ],
    ids=repr,
)
def test_headers_of_weights(tmp_path: Path, change: dict[str, Any]) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change
    head = json.dumps({"a.weight": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head + bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.weight.*model\.safetensors|model\.safetensors.*a\.weight"):
        read_headers(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"), ("<!DOCTYPE html>", "web page")],
)
def test_what_lies_where_weights_should(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=told):
        read_headers(path)


@pytest.mark.parametrize(
    ("kind", "architecture", "told"),
    [
        ("t5", "T5ForConditionalGeneration", "has an encoder and a decoder"),
        ("whisper", "WhisperForConditionalGeneration", "has an encoder and a decoder"),
        ("bert", "BertForMaskedLM", "does not write text"),
        ("clip", "CLIPModel", "does not write text"),
        ("llama", "LlamaForSequenceClassification", "does not write text"),
        ("llama", "LlamaModel", "does not write text.*hf-overrides"),
    ],
)
def test_models_that_do_not_continue_text(tmp_path: Path, kind: str, architecture: str, told: str) -> None:
    config = {"model_type": kind, "architectures": [architecture], "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = find_model(ModelOptions(model=str(tmp_path), load_format="dummy"))
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*{told}"):
        select_impl(files, "auto")


def test_code_of_the_model_that_is_not_there(tmp_path: Path) -> None:
    own = {"AutoConfig": "own.OwnConfig"}
    with pytest.raises(ModelError, match=r"code that 'rubbish' brings.*own\.py"):
        describe(
            broken(tmp_path, model_type="own", architectures=["Own"], auto_map=own),
            "rubbish",
            ModelOptions(trust_remote_code=True),
        )


@pytest.mark.parametrize(
    ("file", "told"), [("model.gguf", "original repository"), ("adapter_config.json", "An adapter is no model")]
)
def test_weights_in_other_forms(file: str, told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        choose_weights(["config.json", file, "adapter_model.safetensors"], "auto", "here")


def test_integers_are_no_weights() -> None:
    target = Target((2,), torch.float32, lambda tensor: None)
    with pytest.raises(CheckpointError, match="'a.weight'.*torch.int64"):
        load_into({"a.weight": target}, [("a.weight", torch.ones(2, dtype=torch.int64))], LoadRules())


def test_no_end_is_no_token() -> None:
    assert stop_token_ids({"eos_token_id": [-1, 5]}, None) == (5,)


def test_json_without_end(tmp_path: Path) -> None:
    head = b"[" * 100_000
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    with pytest.raises(CheckpointError, match="not JSON"):
        read_headers(path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(head)
    with pytest.raises(CheckpointError, match="index"):
        read_index(index)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json", "model.safetensors"])
def test_what_is_cut_off(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a download that broke off; the whole way from the command line."""
    from quire.cli.main import run_command

    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    try:
        status = run_command(["run", str(folder), "x", "--max-tokens", "1", "--threads", "1"])
    except QuireError as error:  # what run_command shows of it is checked by the status
        raise AssertionError from error
    told = capsys.readouterr().err
    assert status == 1 and told.startswith("quire run: ") and "ownload" in told
    assert (name in told or "tokenizer" in told) and "Traceback" not in told and len(told) < 1500

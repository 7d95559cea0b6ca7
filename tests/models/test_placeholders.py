"""Files that are not what their names say: each is called by its name, with what lies there and what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import write_tiny

from quire.config import ModelOptions
from quire.errors import CheckpointError, ConfigError, QuireError
from quire.models.files.hub import find_model
from quire.models.weights.checkpoint import Checkpoint
from quire.text.chat import read_template
from quire.text.tokenizer import load_tokenizer

GIT_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 17210084\n"
WEB_PAGE = "<!doctype html>\n<html><body>Sign in</body></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("placeholders") / "tiny-llama", "llama")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def load(folder: Path) -> None:
    """All that is read of a model, in the order of a start."""
    files = find_model(ModelOptions(model=str(folder)))
    load_tokenizer(folder)
    Checkpoint(files)


@pytest.mark.parametrize(("text", "told"), [(GIT_LFS, "Git LFS.*git lfs pull"), (WEB_PAGE, "web page")])
@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"],
)
def test_each_file_is_named(folder: Path, name: str, text: str, told: str) -> None:
    assert (folder / name).is_file()
    (folder / name).write_text(text)
    with pytest.raises(QuireError, match=f"{name} is a.*{told.split('.*')[0]}") as raised:
        load(folder)
    assert told.split(".*")[-1] in str(raised.value)


def test_index_and_torch_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(GIT_LFS)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a placeholder of Git LFS"):
        Checkpoint(find_model(ModelOptions(model=str(folder))))
    (folder / "model.safetensors.index.json").write_text(GIT_LFS)
    with pytest.raises(CheckpointError, match=r"index\.json is a placeholder of Git LFS"):
        load(folder)


def test_templates(folder: Path) -> None:
    """A template may be any text: without a look at it, each prompt would be the placeholder."""
    path = folder / "chat_template.jinja"
    path.write_text(GIT_LFS)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a placeholder of Git LFS"):
        load(folder)
    assert load_tokenizer(folder, chat_template="{{ messages }}").given_template == "{{ messages }}"
    with pytest.raises(ConfigError, match="Git LFS"):
        read_template(str(path))


def test_files_that_nothing_reads_may_be_placeholders(folder: Path) -> None:
    for name in ("tokenizer.model", "pytorch_model.bin", "vocab.txt"):
        (folder / name).write_text(GIT_LFS)
    load(folder)


def test_a_vocabulary_without_a_tokenizer_json(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "vocab.txt").write_text(GIT_LFS)
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a placeholder of Git LFS"):
        load_tokenizer(folder)

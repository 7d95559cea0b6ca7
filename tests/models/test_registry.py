"""The registry of native classes: registration, plugins, and which path is chosen."""

from __future__ import annotations

import importlib.metadata

import pytest
from tiny import write_tiny

from quire.config import ModelOptions
from quire.errors import ConfigError, UnsupportedModelError
from quire.models.files.hub import ModelFiles, find_model
from quire.models.native.decoder import FAMILIES, NativeDecoder
from quire.models.registry import PLUGIN_GROUP, ModelRegistry, select_impl


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(ModelRegistry, "_classes", dict(ModelRegistry._classes))
    monkeypatch.setattr(ModelRegistry, "_plugins_loaded", False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return find_model(ModelOptions(model=str(write_tiny(tmp_path_factory.mktemp("tiny"), "llama", tokenizer=False))))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return find_model(ModelOptions(model=str(write_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2", tokenizer=False))))


class Plugged:
    """A class of a plugin."""


def test_built_in_architectures() -> None:
    assert set(ModelRegistry.architectures()) == set(FAMILIES)
    assert all(ModelRegistry.resolve(architecture) is NativeDecoder for architecture in FAMILIES)


def test_registration_by_class_and_by_name() -> None:
    ModelRegistry.register_model("PluggedForCausalLM", Plugged)
    assert ModelRegistry.resolve("PluggedForCausalLM") is Plugged
    ModelRegistry.register_model("LlamaForCausalLM", f"{__name__}:Plugged")
    assert ModelRegistry.resolve("LlamaForCausalLM").__name__ == "Plugged"
    with pytest.raises(ConfigError, match="'module:Class'"):
        ModelRegistry.register_model("X", "module.Class")


def test_plugins_come_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    good = importlib.metadata.EntryPoint("PluggedForCausalLM", f"{__name__}:Plugged", PLUGIN_GROUP)
    bad = importlib.metadata.EntryPoint("BadForCausalLM", "no-class-here", PLUGIN_GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [bad, good] if group == PLUGIN_GROUP else [])
    assert ModelRegistry.has("PluggedForCausalLM") and not ModelRegistry.has("BadForCausalLM")


def test_a_class_that_cannot_be_loaded() -> None:
    ModelRegistry.register_model("BrokenForCausalLM", "quire.no_such_module:Class")
    with pytest.raises(UnsupportedModelError, match=r"'quire.no_such_module:Class'.*--model-impl transformers"):
        ModelRegistry.resolve("BrokenForCausalLM")


def test_unknown_to_the_registry() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no native class for 'FooForCausalLM'.*LlamaForCausalLM"):
        ModelRegistry.resolve("FooForCausalLM")


@pytest.mark.parametrize(
    ("wanted", "path"),
    [("auto", "native"), ("native", "native"), ("vllm", "native"), ("transformers", "transformers")],
)
def test_path_of_an_architecture_with_a_native_class(files: ModelFiles, wanted: str, path: str) -> None:
    assert select_impl(files, wanted) == path


def test_path_of_an_architecture_without_one(gpt2: ModelFiles) -> None:
    assert select_impl(gpt2, "auto") == select_impl(gpt2, "transformers") == "transformers"
    with pytest.raises(UnsupportedModelError, match="no native class for 'GPT2LMHeadModel'"):
        select_impl(gpt2, "native")
    ModelRegistry.register_model("GPT2LMHeadModel", Plugged)
    assert select_impl(gpt2, "auto") == "native"


def test_an_architecture_nobody_knows(files: ModelFiles) -> None:
    folder = str(files.folder)
    unknown = find_model(ModelOptions(model=folder, hf_overrides={"architectures": ["LamaForCausalLM"]}))
    with pytest.raises(UnsupportedModelError, match=r"'LamaForCausalLM'.*nearest known one is 'LlamaForCausalLM'"):
        select_impl(unknown, "auto")
    with pytest.raises(ConfigError, match="it can be auto, native, transformers"):
        select_impl(files, "fast")

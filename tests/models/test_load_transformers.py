"""Checkpoints into Transformers models on meta, by the library's rules: the same model as its own from_pretrained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, write_tiny
from transformers import AutoModelForCausalLM

from quire.config import ModelOptions
from quire.errors import CheckpointError, ModelError
from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.layers.linear import Linear
from quire.models.files.hub import ModelFiles, find_model
from quire.models.transformers.conversion import load_transformers, model_targets
from quire.models.weights.load import LoadReport

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8, 9, 200]])


def find(folder: Path, **options: Any) -> ModelFiles:
    return find_model(ModelOptions(model=str(folder), **options))


def on_meta(files: ModelFiles, dtype: torch.dtype = torch.float32) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(files.library_config, dtype=dtype).eval()


def load(files: ModelFiles, dtype: torch.dtype = torch.float32) -> tuple[Any, LoadReport]:
    model = on_meta(files, dtype)
    return model, load_transformers(model, model_targets(model, dtype, CPU), files, CPU, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_model_as_from_pretrained(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, family, tokenizer=False, max_shard_size="60KB")
    model, report = load(find(folder), dtype)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    expected = {**dict(theirs.named_parameters()), **dict(theirs.named_buffers())}
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    # The same bits may round otherwise where a matrix begins at another address.
    torch.testing.assert_close(
        model(IDS).logits, theirs(IDS).logits, rtol=1e-3, atol=1e-3 if dtype.itemsize > 2 else 0.1
    )
    assert report.empty == frozenset() and report.ignored == ()


class Outer(torch.nn.Module):
    """Stands for a module whose code fills a buffer of another one inside it, and for one whose code forgets."""

    def __init__(self, model: Any, forgets: bool) -> None:
        super().__init__()
        self.inner = model.model.layers[0]
        self.inner.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
        original = type(model)._init_weights

        def init_weights(module: torch.nn.Module) -> None:
            original(model, module)
            if module is model.model and not forgets:
                self.inner.table.fill_(7.0)

        model._init_weights = model.model._init_weights = init_weights


@pytest.mark.parametrize("forgets", [False, True])
def test_buffers_that_another_module_fills(forgets: bool, tmp_path: Path) -> None:
    files = find(write_tiny(tmp_path, "llama", tokenizer=False))
    model = on_meta(files)
    outer = Outer(model, forgets)
    targets = model_targets(model, torch.float32, CPU)
    if forgets:
        with pytest.raises(ModelError, match="'table' of LlamaDecoderLayer is in no checkpoint"):
            load_transformers(model, targets, files, CPU, seed=0)
        return
    load_transformers(model, targets, files, CPU, seed=0)
    assert torch.equal(outer.inner.table, torch.full((3,), 7.0))
    weights = load_file(files.weights[0])
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weights["model.layers.0.mlp.up_proj.weight"])


def test_tied_weights_share_memory(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "gemma2", tokenizer=False)
    model, _ = load(find(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_modules_the_library_keeps_in_float32(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama", tokenizer=False)
    files = find(folder)
    model = on_meta(files, torch.bfloat16)
    model._keep_in_fp32_modules_strict = {"post_attention_layernorm", "layers.*.mlp.down_proj"}
    load_transformers(model, model_targets(model, torch.bfloat16, CPU), files, CPU, seed=0)
    layer = model.model.layers[1]
    assert layer.post_attention_layernorm.weight.dtype is torch.float32
    assert layer.mlp.down_proj.weight.dtype is torch.float32
    assert layer.mlp.up_proj.weight.dtype is layer.input_layernorm.weight.dtype is torch.bfloat16


def test_replaced_modules_bring_their_own_targets(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "llama", tokenizer=False)
    files = find(folder)
    model = on_meta(files)
    targets = model_targets(model, torch.float32, CPU)
    merged = {}
    for index, layer in enumerate(model.model.layers):
        linear = merged[index] = Linear(ops_of(reference), 32, (48, 48), False, torch.float32, CPU)
        for place, name in enumerate(("gate_proj", "up_proj")):
            targets[f"model.layers.{index}.mlp.{name}.weight"] = linear.weight_target(place)
            setattr(layer.mlp, name, torch.nn.Identity())
    load_transformers(model, targets, files, CPU, seed=0)
    tensors = load_file(folder / "model.safetensors")
    for index, linear in merged.items():
        parts = [tensors[f"model.layers.{index}.mlp.{name}.weight"] for name in ("gate_proj", "up_proj")]
        assert torch.equal(linear.packed.data, torch.cat(parts))


def test_dummy_weights_are_finite_and_repeatable(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "qwen3_next", tokenizer=False)
    first, _ = load(find(folder, load_format="dummy"))
    second, _ = load(find(folder, load_format="dummy"))
    logits = first(IDS).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.01
    assert torch.equal(logits, second(IDS).logits)


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def test_one_expert_missing(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "mixtral", tokenizer=False)
    name = next(n for n in load_file(folder / "model.safetensors") if "layers.1" in n and "experts.2" in n)
    change(folder, name, None)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*experts"):
        load(find(folder))


def test_missing_unexpected_and_misshapen(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "gpt2", tokenizer=False)
    name = "transformer.h.1.mlp.c_fc.weight"
    whole = load_file(folder / "model.safetensors")[name]
    change(folder, name, None)
    with pytest.raises(CheckpointError, match=rf"lacks 1 of 41 weights.*'{name}'"):
        load(find(folder))
    change(folder, name, whole.T.contiguous())
    with pytest.raises(CheckpointError, match=rf"'{name}' in .*model\.safetensors has shape"):
        load(find(folder))
    change(folder, name, whole)
    change(folder, "transformer.h.1.mlp.extra", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"no place for: 'transformer.h.1.mlp.extra' in .*model\.safetensors"):
        load(find(folder))

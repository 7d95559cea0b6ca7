"""Checkpoints that are stored quantized: each published layout is written here by hand, read, and compared."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from quire.cli.compare import run_served
from quire.config import EngineOptions, ModelOptions
from quire.errors import CheckpointError, ConfigError, UnsupportedModelError
from quire.kernels.rounding import restored
from quire.kernels.table import load_ops
from quire.kernels.weights import PackedLinear, QuantizedLinear
from quire.models.build import build_model
from quire.models.files.hub import find_model
from quire.models.native.decoder import NativeDecoder
from quire.resolve import EngineConfig, resolve

CPU = torch.device("cpu")
IDS = [[5, 9, 200, 31, 7, 64, 3, 3, 150]]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each nibble of a word holds, as AutoAWQ packs


@dataclass
class Rounded:
    """A weight as integers 0..15 or -128..127, before any layout: [N, K], scales and zeros [N, groups]."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    group: int

    def plain(self) -> torch.Tensor:
        scales, zeros = (x.repeat_interleave(self.group, 1) for x in (self.scales, self.zeros))
        return (self.values - zeros) * scales


def four_bits(weight: torch.Tensor, group: int, zero_points: bool) -> Rounded:
    """Scales that bfloat16 holds, so that nothing is lost beside what the layout says."""
    x = weight.float().view(weight.shape[0], -1, group)
    low, high = x.amin(-1), x.amax(-1)
    scales = ((high - low) / 15 if zero_points else x.abs().amax(-1) / 7.5).bfloat16().float()
    zeros = (-low / scales).round().clamp(1, 15) if zero_points else torch.full_like(scales, 8)
    values = ((x / scales[..., None]).round() + zeros[..., None]).clamp(0, 15).flatten(-2)
    return Rounded(values, scales, zeros, group)


def words(values: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight neighbours of the last dimension in an int32; nibble i holds neighbour order[i]."""
    eight = values.long().view(*values.shape[:-1], -1, 8)
    packed = sum(eight[..., order[i]] << 4 * i for i in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def as_gptq(found: Rounded, offset: int = 1) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(found.values).T.contiguous(),
        "qzeros": words(found.zeros.T.contiguous() - offset),
        "scales": found.scales.T.contiguous().half(),
        "g_idx": (torch.arange(found.values.shape[1]) // found.group).int(),
    }


def as_awq(found: Rounded) -> dict[str, torch.Tensor]:
    return {
        "qweight": words(found.values.T.contiguous(), AWQ_NIBBLES),
        "qzeros": words(found.zeros.T.contiguous(), AWQ_NIBBLES),
        "scales": found.scales.T.contiguous().half(),
    }


def as_packed(found: Rounded, zero_points: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": words(found.values),
        "weight_scale": found.scales.bfloat16(),
        "weight_shape": torch.tensor(found.values.shape),
    }
    if zero_points:
        tensors["weight_zero_point"] = words(found.zeros.T.contiguous()).T.contiguous()
    return tensors


def quantize_folder(folder: Path, config: dict[str, Any], make: Callable[[torch.Tensor], tuple[Any, Any]]) -> Path:
    """Store each linear of the layers as `make` says; returns a folder of the same model with what they stand for."""
    plain_folder = folder.parent / "plain"
    plain_folder.mkdir()
    for path in folder.iterdir():
        (plain_folder / path.name).write_bytes(path.read_bytes())
    tensors, plain = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        plain[name] = tensor
        if name.endswith("proj.weight"):
            stored, plain[name] = make(tensor)
            tensors.update({name.removesuffix("weight") + last: part.contiguous() for last, part in stored.items()})
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, plain_folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    return plain_folder


def packed_config(bits: int, layout: str, **weights: object) -> dict[str, Any]:
    one = {"num_bits": bits, "type": "int", "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": one}},
        "ignore": ["lm_head"],
    }


def make_four(write: Callable[[Rounded], dict[str, torch.Tensor]], group: int, zero_points: bool) -> Callable[..., Any]:
    def make(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found = four_bits(weight, group, zero_points)
        return write(found), found.plain()

    return make


def eight_bits(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """As published: the largest value near 127.5, so that -128 occurs."""
    scales = weight.abs().amax(-1, keepdim=True) / 127.5
    values = (weight / scales).round().clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scales}, values * scales


GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
LAYOUTS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "gptq": (GPTQ, make_four(as_gptq, 32, False)),
    "gptq with zero points": ({**GPTQ, "sym": False}, make_four(as_gptq, 64, True)),
    "gptq, second version": (
        {**GPTQ, "checkpoint_format": "gptq_v2"},
        make_four(lambda found: as_gptq(found, 0), 32, True),
    ),
    "awq": (AWQ, make_four(as_awq, 32, True)),
    "awq, groups of 64": (AWQ, make_four(as_awq, 64, True)),
    "packed": (packed_config(4, "pack-quantized"), make_four(lambda found: as_packed(found, False), 32, False)),
    "packed with zero points": (
        packed_config(4, "pack-quantized", symmetric=False),
        make_four(lambda found: as_packed(found, True), 32, True),
    ),
    "bytes": (packed_config(8, "int-quantized", strategy="channel"), eight_bits),
}


def config_of(folder: Path, impl: str = "native", **options: object) -> EngineConfig:
    return resolve(EngineOptions.from_flat({"model": str(folder), "model_impl": impl, "dtype": "float32", **options}))


def logits_of(config: EngineConfig) -> torch.Tensor:
    served = build_model(config.files, config.options.model, config.dtype, CPU, load_ops("cpu"))
    for thread in threading.enumerate():
        if thread.name == "packed-cache":
            thread.join()
    return run_served(served, config, IDS, None).logits[0]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_integers_are_those_of_the_checkpoint(tmp_path: Path, layout: str) -> None:
    config, make = LAYOUTS[layout]
    folder = write_tiny(tmp_path / "model", "qwen2", tokenizer=False, **SIZES)
    plain = quantize_folder(folder, config, make)
    files = find_model(ModelOptions(model=str(folder)))
    assert files.scheme is not None and files.scheme.method == config["quant_method"]
    ops = load_ops("cpu")
    found = config_of(folder)
    model = build_model(found.files, found.options.model, torch.float32, CPU, ops)
    assert isinstance(model, NativeDecoder)
    tensors = load_file(plain / "model.safetensors")
    for index, layer in enumerate(model.layers):
        name = f"model.layers.{index}."
        wanted = torch.cat([tensors[f"{name}self_attn.{x}_proj.weight"] for x in "qkv"])
        for linear, weight in ((layer.qkv, wanted), (layer.mlp.down, tensors[f"{name}mlp.down_proj.weight"])):
            assert isinstance(linear.packed, QuantizedLinear)
            torch.testing.assert_close(restored(ops.unpack_quantized(linear.packed)), weight, rtol=1e-6, atol=0)
    assert isinstance(model.head.packed, PackedLinear)  # not quantized in the checkpoint


@pytest.mark.parametrize("layout", ["gptq", "awq", "packed with zero points", "bytes"])
def test_both_paths_come_close_to_the_plain_model(tmp_path: Path, layout: str) -> None:
    """What is left between them is that activations are rounded to 8 bits, which these tiny models make much of."""
    config, make = LAYOUTS[layout]
    folder = write_tiny(tmp_path / "model", "llama", **SIZES)
    plain = logits_of(config_of(quantize_folder(folder, config, make)))
    native, library = logits_of(config_of(folder)), logits_of(config_of(folder, "transformers"))
    assert distance(native, plain) < 0.06
    assert distance(library, native) < 0.01
    assert torch.equal(logits_of(config_of(folder, quantization=config["quant_method"])), native)


def test_experts_on_the_native_path(tmp_path: Path) -> None:
    folder = write_tiny(
        tmp_path / "model", "qwen3_moe", tokenizer=False, **SIZES, moe_intermediate_size=32, num_experts=4
    )
    plain = quantize_folder(folder, *LAYOUTS["awq"])
    assert distance(logits_of(config_of(folder)), logits_of(config_of(plain))) < 0.05
    with pytest.raises(CheckpointError, match="joined with others.*--quantization int8"):
        logits_of(config_of(folder, "transformers"))


def test_one_scale_for_a_row(tmp_path: Path) -> None:
    """group_size -1: cut into groups that the kernels know."""
    folder = write_tiny(tmp_path / "model", tokenizer=False, **SIZES)

    def make(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found = four_bits(weight, weight.shape[1], False)
        return as_gptq(found), found.plain()

    plain = quantize_folder(folder, {**GPTQ, "group_size": -1}, make)
    assert distance(logits_of(config_of(folder)), logits_of(config_of(plain))) < 0.06


def test_the_plan_counts_what_is_packed(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tokenizer=False, **SIZES)
    plain = config_of(quantize_folder(folder, *LAYOUTS["gptq"])).memory.weights
    found = config_of(folder).memory.weights
    linears = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    assert plain - found == linears * 4 - (linears // 2 + linears // 32 * 3)


def test_the_second_start_maps_what_was_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    folder = write_tiny(tmp_path / "model", tokenizer=False, **SIZES)
    quantize_folder(folder, *LAYOUTS["awq"])
    first = logits_of(config_of(folder, packed_cache="on"))
    path = next((tmp_path / "cache" / "packed").glob("*.packed"))
    written = path.stat().st_mtime_ns
    assert torch.equal(logits_of(config_of(folder, packed_cache="on")), first)
    assert path.stat().st_mtime_ns > written  # it was used, and marked as such


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "config",
    [
        {**GPTQ, "bits": 8},
        {**AWQ, "version": "gemv"},
        packed_config(8, "pack-quantized"),
        packed_config(8, "int-quantized", strategy="channel", symmetric=False),
        packed_config(4, "marlin-24"),
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8"},
    ],
)
def test_what_cannot_be_read_is_refused_with_what_can(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_tiny(tmp_path / "model", tokenizer=False)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, "quantization_config": config}))
    with pytest.raises(UnsupportedModelError, match=f"'{config['quant_method']}'.*It reads gptq.*--quantization int8"):
        find_model(ModelOptions(model=str(folder)))


def test_inputs_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tokenizer=False, **SIZES)

    def make(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        found = four_bits(weight, 32, False)
        return {**as_gptq(found), "g_idx": as_gptq(found)["g_idx"].flip(0)}, found.plain()

    quantize_folder(folder, {**GPTQ, "desc_act": True}, make)
    with pytest.raises(UnsupportedModelError, match="another order.*desc_act=false"):
        logits_of(config_of(folder))


def test_the_option_must_agree_with_the_checkpoint(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", tokenizer=False, **SIZES)
    with pytest.raises(ConfigError, match="quantization is 'gptq'.*has no quantization_config"):
        find_model(ModelOptions(model=str(folder), quantization="gptq"))
    quantize_folder(folder, *LAYOUTS["awq"])
    for wrong in ("gptq", "int8"):
        with pytest.raises(ConfigError, match=f"quantization is '{wrong}'.*stored quantized by awq"):
            find_model(ModelOptions(model=str(folder), quantization=wrong))
    assert find_model(ModelOptions(model=str(folder), quantization="awq")).method == "int4-keep-head"

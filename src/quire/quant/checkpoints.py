"""Weights that a checkpoint stores with few bits: which layouts can be read, and what each means in our own formats.

Knows tensors and the config's words about them; nothing of files or models. The integers are taken as they are; scales of
4-bit groups are kept as bfloat16, activations are rounded to 8 bits as with every quantized linear here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quire.errors import ConfigError, UnsupportedModelError
from quire.kernels.rounding import MIDDLE, restored
from quire.kernels.table import Ops
from quire.kernels.weights import PackedLinear, QuantizedLinear, QuantizedWeights

METHODS = ("gptq", "awq", "compressed-tensors")
SUPPORTED = (
    "gptq (4 bits, groups in the order of the inputs), awq (4 bits, version gemm), and compressed-tensors "
    "(pack-quantized with 4 bits, int-quantized with 8 bits for each output)"
)
LARGEST_GROUP = 128  # larger groups are cut into these: activations are rounded group by group
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where column i of eight lies in a word

# By the last part of a tensor's name: the one that says that a linear is stored so, and the others that may belong to it.
MAIN = {"gptq": "qweight", "awq": "qweight", "pack-quantized": "weight_packed", "int-quantized": "weight"}
OTHERS = {
    "gptq": ("qzeros", "scales", "g_idx"),
    "awq": ("qzeros", "scales"),
    "pack-quantized": ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
    "int-quantized": ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point"),
}


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint stores its quantized linears."""

    method: str  # one of METHODS
    layout: str  # a key of MAIN
    zero_offset: int = 0  # what a stored zero point lacks


@dataclass(slots=True)
class StoredWeight:
    """One weight [N, K] as stored: views of the checkpoint's tensors, by the last part of their names."""

    scheme: Scheme
    name: str
    shape: tuple[int, int]
    tensors: dict[str, torch.Tensor]

    def to(self, device: torch.device) -> StoredWeight:
        """The same on another device."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})

    def split(self, sizes: Sequence[int]) -> tuple[StoredWeight, ...]:
        """The weight as one part; a stored weight cannot be cut."""
        if len(sizes) != 1:
            raise UnsupportedModelError(f"{self.name} is quantized and holds {len(sizes)} projections in one tensor.")
        return (self,)

    def numel(self) -> int:
        """Values."""
        return self.shape[0] * self.shape[1]

    def element_size(self) -> int:
        """Bytes of a value, for accounts: less than one counts as one."""
        return 1

    def unpack(self) -> QuantizedWeights:
        """The integers, scales and zero points in our own order. Raises UnsupportedModelError for groups out of order."""
        n, k = self.shape
        if self.scheme.layout == "int-quantized":
            scales = self.tensors["weight_scale"].float().reshape(-1, 1).expand(n, 1).contiguous()
            return QuantizedWeights(8, 0, self.tensors["weight"], scales)
        if self.scheme.layout == "pack-quantized":
            found = self._pack_quantized(n, k)
        else:
            found = self._by_columns(n)
        groups = found.scales.shape[1]
        group = -(-k // groups)
        self._check_order(group)
        if group % 32 and groups > 1:
            raise UnsupportedModelError(
                f"{self.name} is quantized in groups of {group} values; quire multiplies groups of a multiple of 32. "
                "Use a version of the model with groups of 32, 64 or 128."
            )
        return _cut(replace(found, group=group), k)

    def _pack_quantized(self, n: int, k: int) -> QuantizedWeights:
        values = _nibbles(self.tensors["weight_packed"])[:, :k]
        zeros = self.tensors.get("weight_zero_point")
        if zeros is not None:
            # Newer files pack them along the outputs, older ones have a signed byte for each.
            unpacked = _nibbles(zeros.T.contiguous()).T[:n] if zeros.dtype == torch.int32 else zeros + MIDDLE
            zeros = unpacked.to(torch.uint8)
        return QuantizedWeights(4, 0, values, _storable(self.tensors["weight_scale"]), _unless_middle(zeros))

    def _by_columns(self, n: int) -> QuantizedWeights:
        """GPTQ and AWQ, which store the weight with its inputs first."""
        words, zeros = self.tensors["qweight"], _nibbles(self.tensors["qzeros"])
        if self.scheme.layout == "awq":
            values, zeros = _awq_columns(_nibbles(words)).T, _awq_columns(zeros)
        else:
            values = _nibbles(words.T.contiguous())
        zeros = (zeros.T[:n] + self.scheme.zero_offset).to(torch.uint8)
        scales = _storable(self.tensors["scales"].T)
        return QuantizedWeights(4, 0, values.contiguous(), scales, _unless_middle(zeros))

    def _check_order(self, group: int) -> None:
        order = self.tensors.get("g_idx", self.tensors.get("weight_g_idx"))
        if order is None or bool((order < 0).all()):
            return
        if not torch.equal(order.long(), torch.arange(self.shape[1]) // group):
            raise UnsupportedModelError(
                f"{self.name} is quantized with its inputs in another order (desc_act or actorder), and quire multiplies "
                "groups of neighbours only. Use a version of the model that was quantized with desc_act=false."
            )


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] -> int8 [R, 8 C]: the lowest four bits come first."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).view(torch.int8)


def _awq_columns(values: torch.Tensor) -> torch.Tensor:
    """Columns in the order of the outputs."""
    return values.view(values.shape[0], -1, 8)[:, :, list(AWQ_ORDER)].flatten(-2)


def _storable(scales: torch.Tensor) -> torch.Tensor:
    return scales.bfloat16().float().contiguous()


def _unless_middle(zeros: torch.Tensor | None) -> torch.Tensor | None:
    """None in place of zero points that all lie in the middle, as without zero points."""
    return None if zeros is None or bool((zeros == MIDDLE).all()) else zeros.contiguous()


def _cut(weights: QuantizedWeights, k: int) -> QuantizedWeights:
    """The same with groups of at most LARGEST_GROUP, where they can be cut evenly."""
    whole = weights.scales.shape[1] == 1  # one scale for a row may be cut anyhow
    if weights.group <= LARGEST_GROUP and weights.group % 32 == 0:
        return weights
    size = next(size for size in (128, 64, 32) if whole or weights.group % size == 0)
    times = -(-k // size) if whole else weights.group // size
    zeros = None if weights.zeros is None else weights.zeros.repeat_interleave(times, 1)
    return replace(weights, group=size, scales=weights.scales.repeat_interleave(times, 1), zeros=zeros)


# ---------------------------------------------------------------- what the config says


def read_scheme(name: str, config: Mapping[str, Any]) -> Scheme:
    """The scheme of a quantization_config. Raises UnsupportedModelError with what is supported."""
    method = str(config.get("quant_method") or config.get("quant_algo") or "unknown").lower()
    if method == "gptq" and config.get("bits") == 4:
        return Scheme("gptq", "gptq", 0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    if method == "awq" and config.get("bits", config.get("w_bit")) == 4 and config.get("version", "gemm") == "gemm":
        return Scheme("awq", "awq")
    if method == "compressed-tensors":
        layout, groups = config.get("format"), list((config.get("config_groups") or {}).values())
        weights = [group.get("weights") or {} for group in groups]
        bits = {"pack-quantized": 4, "int-quantized": 8}.get(str(layout))
        plain = all(one.get("num_bits") == bits and one.get("type", "int") == "int" for one in weights)
        by_output = layout == "pack-quantized" or all(
            one.get("symmetric", True) and one.get("strategy") in ("channel", "tensor") for one in weights
        )
        if bits is not None and weights and plain and by_output:
            return Scheme("compressed-tensors", str(layout))
    words = ", ".join(f"{key} {config[key]!r}" for key in ("bits", "version", "format") if key in config)
    raise UnsupportedModelError(
        f"The weights of {name!r} are quantized with {method!r}{f' ({words})' if words else ''}, which quire cannot read. "
        f"It reads {SUPPORTED}; and it quantizes unquantized weights while loading: use the model's original repository "
        "with --quantization int8 or int4."
    )


def check_wish(name: str, scheme: Scheme | None, wanted: str | None) -> None:
    """Raise ConfigError where the option quantization contradicts how the checkpoint is stored."""
    if wanted is None or (scheme is not None and wanted == scheme.method):
        return
    if scheme is not None:
        raise ConfigError(
            f"quantization is {wanted!r}, but the weights of {name!r} are stored quantized by {scheme.method}, and are "
            "used as they are. Leave it out, or name a model with unquantized weights."
        )
    if wanted in METHODS:
        raise ConfigError(
            f"quantization is {wanted!r}, but the config of {name!r} has no quantization_config: its weights are not "
            "quantized. Leave it out, or use int8 or int4 to quantize them while loading."
        )


def stored_linears(names: Iterable[str], scheme: Scheme) -> dict[str, dict[str, str]]:
    """Each linear stored in the scheme: the name of its weight -> {last part of a tensor's name: the whole name}."""
    present = set(names)
    main = MAIN[scheme.layout]
    found: dict[str, dict[str, str]] = {}
    for name in present:
        prefix, _, last = name.rpartition(".")
        if last != main or (main == "weight" and f"{prefix}.weight_scale" not in present):
            continue
        parts = {other: f"{prefix}.{other}" for other in OTHERS[scheme.layout] if f"{prefix}.{other}" in present}
        found[f"{prefix}.weight"] = {main: name, **parts}
    return found


def stored_shape(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """[N, K] of a linear from the shapes of its tensors, by the last parts of their names."""
    first, second = shapes[MAIN[scheme.layout]]
    if scheme.layout == "gptq":
        return second, first * 8
    if scheme.layout == "awq":
        return second * 8, first
    return first, second * 8 if scheme.layout == "pack-quantized" else second


def stored_bytes(scheme: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes that the linear takes once it is packed, with zero points where it may have them."""
    n, k = stored_shape(scheme, shapes)
    if scheme.layout == "int-quantized":
        return n * (k + 4)
    groups = max(shapes["scales"][0] if "scales" in shapes else shapes["weight_scale"][1], -(-k // LARGEST_GROUP))
    return n * (k // 2 + groups * 3)


# ---------------------------------------------------------------- ops that take what was stored


def stored_ops(ops: Ops) -> Ops:
    """`ops` whose linears may be StoredWeights; others stay as they are."""

    def pack(weight: Any, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> Any:
        parts = [weight] if isinstance(weight, torch.Tensor | StoredWeight) else list(weight)
        stored = [part.unpack() for part in parts if isinstance(part, StoredWeight)]
        if len(stored) == len(parts):
            return ops.pack_quantized(_below_one_another(stored), bias, dtype or torch.bfloat16)
        plain = [restored(part.unpack()) if isinstance(part, StoredWeight) else part for part in parts]
        return ops.pack_linear(plain, bias, dtype)

    def linear(x: torch.Tensor, packed: PackedLinear | QuantizedLinear) -> torch.Tensor:
        return (ops.quantized_linear if isinstance(packed, QuantizedLinear) else ops.linear)(x, packed)

    def unpack(packed: PackedLinear | QuantizedLinear) -> torch.Tensor:
        if isinstance(packed, QuantizedLinear):
            return restored(ops.unpack_quantized(packed)).to(packed.dtype)
        return ops.unpack_linear(packed)

    return replace(ops, pack_linear=pack, linear=linear, unpack_linear=unpack)


def _below_one_another(parts: Sequence[QuantizedWeights]) -> QuantizedWeights:
    """Siblings as one weight. Groups become those of the finest, and zero points are written out where any has them."""
    group = min(part.group for part in parts)
    scales, zeros = [], []
    for part in parts:
        times = part.group // group if group else 1
        scales.append(part.scales.repeat_interleave(times, 1))
        points = torch.full_like(part.scales, MIDDLE, dtype=torch.uint8) if part.zeros is None else part.zeros
        zeros.append(points.repeat_interleave(times, 1))
    any_zeros = any(part.zeros is not None for part in parts)
    values = torch.cat([part.values for part in parts])
    return QuantizedWeights(parts[0].bits, group, values, torch.cat(scales), torch.cat(zeros) if any_zeros else None)

"""Every op in plain PyTorch: the meaning of each op, the oracle of its tests, and what runs where nothing is faster.

It knows nothing of requests, models or instruction sets. Clearness comes before speed, and two rules before both:
sums are taken in float32, and the bits of a row never depend on the other rows of the call.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from quire.kernels.programs import Recorder
from quire.kernels.rounding import round_to_bytes, round_to_nibbles
from quire.kernels.weights import SMALLEST, KeptLinear, PackedLinear, Parts, QuantizedLinear, QuantizedWeights, joined

NormStyle = Literal["down_then_scale", "scale_then_down", "plus_one"]
RotaryStyle = Literal["half", "interleaved"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@dataclass(slots=True)
class KVCache:
    """The pages of one layer, [num_pages, elements of a page]; how a page is laid out is its backend's own affair.

    In a cache of int8 each key and each value is rounded to bytes with a float32 scale of its own (per token and head).
    `shared`: values are the first value_dim elements of the keys and are not stored again (multi-head latent attention).
    """

    data: torch.Tensor
    num_pages: int
    page_size: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    shared: bool = False


# ---------------------------------------------------------------- linear


def pack_linear(weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> PackedLinear:
    """weight [N, K] or its parts, bias [N] or None, kept in `dtype`, else as they are. May keep or copy them; the caller
    drops the originals."""
    weight = joined(weight, dtype)
    bias = None if bias is None else bias.to(weight.dtype)
    return PackedLinear(weight.shape[0], weight.shape[1], weight.dtype, weight.detach(), bias)


def unpack_linear(packed: PackedLinear) -> torch.Tensor:
    """The weight [N, K] as it was packed, bit for bit."""
    return packed.data


def linear(x: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype. Each row by itself, so that its bits do not depend on the others."""
    weight = packed.data.float()
    rows = x.reshape(-1, packed.in_features).float()
    out = torch.empty(rows.shape[0], packed.out_features, device=x.device)
    for i in range(rows.shape[0]):
        torch.mv(weight, rows[i], out=out[i])
    if packed.bias is not None:
        out += packed.bias.float()
    return out.to(x.dtype).view(*x.shape[:-1], packed.out_features)


# ---------------------------------------------------------------- linear with weights of 8 or 4 bits


def pack_quantized(weights: QuantizedWeights, bias: torch.Tensor | None, dtype: torch.dtype) -> QuantizedLinear:
    """bias [N] or None in `dtype`. May keep or copy them; the caller drops the originals."""
    return QuantizedLinear(weights.values.shape[0], weights.values.shape[1], dtype, weights, bias)


def round_linear(
    weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None, bits: int, group: int, zero_points: bool
) -> QuantizedLinear:
    """weight [N, K] or its parts, in `dtype` or as they are, rounded as kernels/rounding.py says, and packed."""
    weight = joined(weight, dtype)
    rounded = round_to_bytes(weight) if bits == 8 else round_to_nibbles(weight, group, zero_points)
    return pack_quantized(rounded, bias, weight.dtype)


def unpack_quantized(packed: QuantizedLinear) -> QuantizedWeights:
    """The quantized weights as they were packed, bit for bit."""
    assert isinstance(packed.data, QuantizedWeights)
    return packed.data


def _round_to_bytes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 x [..., N] -> (whole numbers -127..127 [..., N], scale [..., 1]), both float32; NaN where x is not finite."""
    largest = x.abs().amax(-1, keepdim=True)
    usable = largest.isfinite() & (largest >= SMALLEST)
    factor = torch.where(usable, torch.full_like(largest, 127.0) / largest, 0.0)  # a division: ties are many
    q = torch.where(usable, (x * factor).round(), 0.0)
    return q, torch.where(usable, largest / 127.0, torch.where(largest.isfinite(), 0.0, torch.nan))


def quantized_linear(x: torch.Tensor, packed: QuantizedLinear) -> torch.Tensor:
    """x [..., K] -> [..., N] in x's dtype, each group of a row rounded to int8 first (8 bits: the whole row).

    With a = the largest |x| of a group, q = round(x * (127 / a)) to even, and s = a / 127: groups are summed in order as
    (sum of q * (value - zero), an exact integer) * s * scale in float32, then the bias is added. Nothing here depends on
    the order of other sums, so every backend gives the same bits. A row with inf or NaN in it becomes NaN.
    """
    weights = unpack_quantized(packed)
    n, k = packed.out_features, packed.in_features
    group = weights.group or k
    rows = x.to(packed.dtype).reshape(-1, k).float()
    total = torch.zeros(rows.shape[0], n, device=x.device)
    for g, start in enumerate(range(0, k, group)):
        q, scale = _round_to_bytes(rows[:, start : start + group])
        values = weights.values[:, start : start + group].double()
        if weights.bits == 4:
            values = values - (8 if weights.zeros is None else weights.zeros[:, g : g + 1].double())
        sums = q.double() @ values.T  # integers below 2^53: exact in any order
        total += sums.float() * scale * weights.scales[:, g]
    if packed.bias is not None:
        total += packed.bias.float()
    return total.to(packed.dtype).to(x.dtype).view(*x.shape[:-1], n)


# ---------------------------------------------------------------- packed weights in files


def packed_layout() -> str | None:
    """A name that two processes share only if each can read the other's packed weights; None: they are not kept."""
    return None


def take_apart(packed: PackedLinear | QuantizedLinear) -> KeptLinear | None:
    """What a file must keep of it; None for what this backend did not pack itself."""
    return None


def put_together(kept: KeptLinear) -> PackedLinear | QuantizedLinear:
    """The opposite. `data` is kept as it is, so it may be a view of a mapped file."""
    raise TypeError("this backend takes no weights apart")


def checksum(data: torch.Tensor) -> int:
    """64 bits that damage of uint8 [bytes] changes."""
    return zlib.crc32(data.numpy())


# ---------------------------------------------------------------- paged keys and values


def cache_bytes(
    page_size: int, kv_heads: int, key_dim: int, value_dim: int, dtype: torch.dtype, shared: bool = False
) -> int:
    """Bytes that one page of one layer takes."""
    numbers = page_size * kv_heads * (key_dim + (0 if shared else value_dim)) * dtype.itemsize
    scales = page_size * kv_heads * 8 if dtype == torch.int8 else 0
    return -(-numbers // 4) * 4 + scales if scales else numbers


def new_cache(
    num_pages: int,
    page_size: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    shared: bool = False,
) -> KVCache:
    """Pages for one layer. Nothing is promised about the content of a position that was never written."""
    nbytes = cache_bytes(page_size, kv_heads, key_dim, value_dim, dtype, shared)
    data = torch.zeros(num_pages, nbytes // dtype.itemsize, dtype=dtype, device=device)
    return KVCache(data, num_pages, page_size, kv_heads, key_dim, value_dim, dtype, shared)


def _keys(cache: KVCache) -> torch.Tensor:
    """View [num_pages, page_size, kv_heads, key_dim] of the first part of each page."""
    size = cache.page_size * cache.kv_heads * cache.key_dim
    return cache.data[:, :size].view(cache.num_pages, cache.page_size, cache.kv_heads, cache.key_dim)


def _values(cache: KVCache) -> torch.Tensor:
    """View [num_pages, page_size, kv_heads, value_dim] of the second part of each page, or of a part of its keys."""
    if cache.shared:
        return _keys(cache)[..., : cache.value_dim]
    first = cache.page_size * cache.kv_heads * cache.key_dim
    size = cache.page_size * cache.kv_heads * cache.value_dim
    return cache.data[:, first : first + size].view(cache.num_pages, cache.page_size, cache.kv_heads, cache.value_dim)


def _scales(cache: KVCache) -> torch.Tensor:
    """View float32 [num_pages, 2 (key, value), page_size, kv_heads] of the end of each page of int8."""
    size = 8 * cache.page_size * cache.kv_heads
    scales = cache.data[:, cache.data.shape[1] - size :].view(torch.float32)
    return scales.view(cache.num_pages, 2, cache.page_size, cache.kv_heads)


def write_cache(cache: KVCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """key [T, Hkv, Dk], value [T, Hkv, Dv] go to slots [T], a slot being page * page_size + offset.

    A cache of int8 rounds each of them as quantized_linear rounds a row; a shared one does not look at value.
    """
    pages, offsets = slots // cache.page_size, slots % cache.page_size
    parts = [(_keys(cache), key)] if cache.shared else [(_keys(cache), key), (_values(cache), value)]
    for index, (place, new) in enumerate(parts):
        if cache.dtype == torch.int8:
            new, scale = _round_to_bytes(new.float())
            _scales(cache)[pages, index, offsets] = scale[..., 0]
        place[pages, offsets] = new.to(cache.dtype)


def copy_pages(cache: KVCache, pairs: list[tuple[int, int]]) -> None:
    """Copy whole pages, (source, destination) by (source, destination), in that order."""
    for source, destination in pairs:
        cache.data[destination] = cache.data[source]


def attention(
    query: torch.Tensor,
    cache: KVCache,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of packed rows over paged keys and values: query [T, H, Dk] -> [T, H, Dv].

    Sequence s owns rows starts[s]..starts[s + 1]; its row i stands at position lengths[s] - rows + i and sees the
    positions up to itself, with `window` only the last `window` of them, with `chunk` only those of its own block of
    that many. Position p lies in page tables[s, p // page_size]; entries outside what is seen are never read.
    `softcap` bounds the scaled scores by c * tanh(score / c); `sinks` [H] are extra scores that take part in the sum
    of the softmax and carry no value.
    """
    out = torch.empty(*query.shape[:2], cache.value_dim, dtype=query.dtype, device=query.device)
    first_rows = starts.tolist()
    for s, length in enumerate(lengths.tolist()):
        rows = first_rows[s + 1] - first_rows[s]
        for i in range(rows):
            position = length - rows + i
            low = max(0, position + 1 - window) if window is not None else 0
            if chunk is not None:
                low = max(low, position // chunk * chunk)
            seen = torch.arange(low, position + 1, device=query.device)
            row = first_rows[s] + i
            out[row] = _attend(query[row], cache, tables[s], seen, scale, softcap, sinks)
    return out


def _attend(
    query: torch.Tensor,
    cache: KVCache,
    table: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One query row [H, Dk] over the positions `seen` of its sequence -> [H, Dv] in float32."""
    pages, offsets = table[seen // cache.page_size].long(), seen % cache.page_size
    group = query.shape[0] // cache.kv_heads
    keys, values = _keys(cache)[pages, offsets].float(), _values(cache)[pages, offsets].float()
    if cache.dtype == torch.int8:
        scales = _scales(cache)
        keys = keys * scales[pages, 0, offsets, :, None]
        values = values * scales[pages, 0 if cache.shared else 1, offsets, :, None]
    keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)  # [L, H, D]
    scores = torch.einsum("hd,lhd->hl", query.float(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None]], dim=1)
    weights = torch.softmax(scores, dim=-1)[:, : seen.shape[0]]
    return torch.einsum("hl,lhd->hd", weights, values)


def heads_linear(
    x: torch.Tensor, packed: PackedLinear, heads: int, width: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x [T, H, K] -> [T, H, width], each head with a matrix of its own: packed is of [H * N, K], N a multiple of 16, and
    head h's results are the first `width` of its N rows. Written to `out`, a view of that shape, if there is one. Each
    row by itself, so that its bits do not depend on the others."""
    weight = packed.data.float().view(heads, -1, packed.in_features)[:, :width]
    if out is None:
        out = torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device)
    for i in range(x.shape[0]):
        out[i] = torch.bmm(weight, x[i].float()[:, :, None])[..., 0]
    return out


# ---------------------------------------------------------------- norms, activations, rotary


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: NormStyle) -> torch.Tensor:
    """x [..., D] over its last dimension, weight [D]. `style` says where the cast to x's dtype happens:

    "down_then_scale"  weight * cast(normed)          "scale_then_down"  cast(weight * normed)
    "plus_one"         cast((1 + weight) * normed)    without a weight all three are cast(normed)
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if style == "down_then_scale":
        return (weight * normed.to(x.dtype)).to(x.dtype)
    if style == "plus_one":
        return ((1.0 + weight.float()) * normed).to(x.dtype)
    return (weight.float() * normed).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, style: NormStyle
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum x + residual, rounded to their dtype, and its rms_norm: (normed, sum)."""
    total = x + residual
    return rms_norm(total, weight, eps, style), total


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [..., D] over its last dimension, weight and bias [D]; float32 inside, rounded once."""
    wide = F.layer_norm(
        x.float(),
        x.shape[-1:],
        None if weight is None else weight.float(),
        None if bias is None else bias.float(),
        eps,
    )
    return wide.to(x.dtype)


def gated(gate_up: torch.Tensor, activation: str, gate_first: bool = True) -> torch.Tensor:
    """gate_up [..., 2F] -> [..., F]: activation(gate) * up. The activation is computed in float32 and rounded once to
    the dtype, then the product is, as the separate PyTorch operations do. Names: see ACTIVATIONS."""
    first, second = gate_up.chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return ACTIVATIONS[activation](gate.float()).to(gate.dtype) * up


@dataclass(slots=True)
class StackedExperts:
    """Gated blocks as they were given to stack_experts."""

    up: Sequence[PackedLinear | QuantizedLinear]
    down: Sequence[PackedLinear | QuantizedLinear]
    activation: str


def stack_experts(
    up: Sequence[PackedLinear | QuantizedLinear], down: Sequence[PackedLinear | QuantizedLinear], activation: str
) -> Any:
    """Blocks down(gated(up(x))) of one shape, as `experts` wants them; whoever asks keeps what it gets. None where this
    backend cannot compute them in one call."""
    return StackedExperts(up, down, activation)


def experts(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, stack: StackedExperts) -> torch.Tensor:
    """x [T, size], chosen int64 [T, C] a block for each choice, weights [T, C] -> [T, size] in x's dtype: the sum of
    weight times block, in float32 and in the order of the choices. A number that belongs to no block adds nothing."""
    total = torch.zeros(x.shape[0], stack.down[0].out_features, device=x.device)
    for row, numbers in enumerate(chosen.tolist()):
        for choice, number in enumerate(numbers):
            if 0 <= number < len(stack.up):
                hidden = gated(_product(x[row : row + 1], stack.up[number]), stack.activation)
                total[row] += _product(hidden, stack.down[number])[0].float() * weights[row, choice].float()
    return total.to(x.dtype)


def _product(x: torch.Tensor, packed: PackedLinear | QuantizedLinear) -> torch.Tensor:
    return linear(x, packed) if isinstance(packed, PackedLinear) else quantized_linear(x, packed)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: RotaryStyle) -> torch.Tensor:
    """Rotate the first R dimensions of x [T, H, D]; the rest passes through."""
    size = cos.shape[-1]
    part = x[..., :size]
    if style == "half":
        turned = torch.cat([-part[..., size // 2 :], part[..., : size // 2]], dim=-1)
    else:
        turned = torch.stack([-part[..., 1::2], part[..., 0::2]], dim=-1).flatten(-2)
    rotated = (part * cos[:, None] + turned * sin[:, None]).to(x.dtype)
    return torch.cat([rotated, x[..., size:]], dim=-1)


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, style: RotaryStyle
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, H, D], key [T, Hkv, D], cos and sin [T, R] with one entry for each of the R <= D rotated dimensions
    (so each angle appears twice: R/2 apart for "half", side by side for "interleaved"). Each step rounds to the wider
    of the two dtypes: with cos in bfloat16 as the unfused bfloat16 code does, with cos in float32 only at the end."""
    return _rotate(query, cos, sin, style), _rotate(key, cos, sin, style)


def rotary_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: RotaryStyle,
    cache: KVCache,
    slots: torch.Tensor,
) -> torch.Tensor:
    """rotary, then write_cache of the rotated key and the value; returns the rotated query [T, H, Dk]."""
    query, key = rotary(query, key, cos, sin, style)
    write_cache(cache, key, value, slots)
    return query


def set_threads(n: int) -> None:
    """How many threads the ops of this backend use."""
    torch.set_num_threads(n)


def new_recorder() -> Recorder | None:
    """What makes programs of forwards on this backend; None where nothing does."""
    return None

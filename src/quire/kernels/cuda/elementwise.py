"""Norms, gated activations and rotary embedding with cache write, in Triton.

Each kernel computes in float32 and rounds where the reference rounds, so that bfloat16 results agree bit for bit in
nearly all elements. One program owns one row (or one head of one row): rows never meet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.cuda.attention import dense_rows, values_of
from quire.kernels.reference import KVCache

NORM_STYLES = {"down_then_scale": 0, "scale_then_down": 1, "plus_one": 2}
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu2": 4, "sigmoid": 5, "quick_gelu": 6}


@triton.jit
def _rms_kernel(
    x, residual, weight, out, total, eps, size,
    STYLE: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * size
    lane = tl.arange(0, BLOCK)
    mask = lane < size
    value = tl.load(x + row + lane, mask, other=0.0).to(tl.float32)
    if ADD:
        value = value + tl.load(residual + row + lane, mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + lane, rounded, mask)
        value = rounded.to(tl.float32)
    normed = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / size + eps))
    if WEIGHTED:
        scale = tl.load(weight + lane, mask, other=0.0).to(tl.float32)
        if STYLE == 0:
            normed = normed.to(out.dtype.element_ty).to(tl.float32) * scale
        elif STYLE == 1:
            normed = normed * scale
        else:
            normed = normed * (1.0 + scale)
    tl.store(out + row + lane, normed.to(out.dtype.element_ty), mask)


def _launch_rms(x, residual, weight, eps, style, out, total) -> None:
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_kernel[(x.numel() // size,)](
        x, residual, weight, out, total, eps, size,
        NORM_STYLES[style], weight is not None, residual is not None, block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, style: str) -> torch.Tensor:
    """x [..., N] divided by its root mean square; `style` says where the result is rounded to x's type."""
    x = x.contiguous()
    out = torch.empty_like(x)
    _launch_rms(x, None, weight, eps, style, out, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float, style: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of x + residual, x + residual), in one pass over the row."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch_rms(x, residual, weight, eps, style, out, total)
    return out, total


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _gated_kernel(gate_up, out, size, GATE_FIRST: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < size
    first = tl.load(gate_up + row * 2 * size + lane, mask, other=0.0).to(tl.float32)
    second = tl.load(gate_up + row * 2 * size + size + lane, mask, other=0.0).to(tl.float32)
    gate, up = (first, second) if GATE_FIRST else (second, first)
    if KIND == 0:
        gate = gate / (1.0 + tl.exp(-gate))
    elif KIND == 1:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif KIND == 2:
        gate = 0.5 * gate * (1.0 + _tanh(0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)))
    elif KIND == 3:
        gate = tl.maximum(gate, 0.0)
    elif KIND == 4:
        gate = tl.maximum(gate, 0.0) * tl.maximum(gate, 0.0)
    elif KIND == 5:
        gate = 1.0 / (1.0 + tl.exp(-gate))
    else:
        gate = gate / (1.0 + tl.exp(-1.702 * gate))
    gate = gate.to(out.dtype.element_ty).to(tl.float32)  # torch rounds the activation before the product
    tl.store(out + row * size + lane, (gate * up).to(out.dtype.element_ty), mask)


def gated(gate_up: torch.Tensor, activation: str, gate_first: bool = True) -> torch.Tensor:
    """activation(gate) * up for gate_up [..., 2F]; returns [..., F]."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    rows = out.numel() // size
    block = min(1024, triton.next_power_of_2(size))
    _gated_kernel[(rows, triton.cdiv(size, block))](gate_up, out, size, gate_first, ACTIVATIONS[activation], block)
    return out


@triton.jit
def _rotary_write_kernel(
    query, key, value, cos, sin, slots, out, keys, values,
    page_stride, query_token, query_head, key_token, key_head, value_token, value_head,
    PAGE_SIZE: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    mask = lane < DIM
    turned = lane < ROTATED
    if INTERLEAVED:
        partner = tl.where(lane % 2 == 0, lane + 1, lane - 1)
        negative = lane % 2 == 0
    else:
        partner = tl.where(lane < ROTATED // 2, lane + ROTATED // 2, lane - ROTATED // 2)
        negative = lane < ROTATED // 2
    partner = tl.where(turned, partner, 0)
    c = tl.load(cos + token * ROTATED + lane, turned, other=1.0)
    s = tl.load(sin + token * ROTATED + lane, turned, other=0.0)
    is_query = head < HEADS
    source = query + token * query_token + head * query_head
    if not is_query:
        source = key + token * key_token + (head - HEADS) * key_head
    own = tl.load(source + lane, mask, other=0.0)
    other = tl.load(source + partner, turned, other=0.0)
    # Each step rounds to the wider of the two types, as the unfused operations do.
    left = (own * c).to(tl.float32)
    right = (tl.where(negative, -other, other) * s).to(tl.float32)
    result = tl.where(turned, (left + right).to(own.dtype), own)
    if is_query:
        tl.store(out + (token * HEADS + head) * DIM + lane, result, mask)
    else:
        slot = tl.load(slots + token)
        page = slot // PAGE_SIZE * page_stride
        line = slot % PAGE_SIZE * KV_HEADS + head - HEADS
        tl.store(keys + page + line * DIM + lane, result, mask)
        stays = lane < VALUE_DIM
        found = tl.load(value + token * value_token + (head - HEADS) * value_head + lane, stays)
        tl.store(values + page + line * VALUE_DIM + lane, found, stays)


def rotary_write(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    cache: KVCache,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Rotate query [T, H, D] and key [T, Hkv, D], write key and value to the pages, return the rotated query."""
    query, key, value = dense_rows(query), dense_rows(key), dense_rows(value)
    tokens, heads, dim = query.shape
    kv_heads, value_dim = value.shape[1:]
    out = query.new_empty((tokens, heads, dim))
    block = triton.next_power_of_2(max(dim, value_dim))
    _rotary_write_kernel[(tokens, heads + kv_heads)](
        query, key, value, cos.contiguous(), sin.contiguous(), slots, out, cache.data, values_of(cache),
        cache.data.stride(0), query.stride(0), query.stride(1), key.stride(0), key.stride(1),
        value.stride(0), value.stride(1),
        cache.page_size, heads, kv_heads, dim, value_dim, cos.shape[-1], style == "interleaved", block,
    )  # fmt: skip
    return out

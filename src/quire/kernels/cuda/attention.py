"""Paged attention and the cache write, in Triton.

Pages are laid out as the reference lays them out: all keys of a page [offset, kv head, dim], then its values alike, so
that one position of one head is one contiguous line. One kernel serves decode, chunked prefill and any mix of them: a
program owns a few query positions of one sequence and all query heads of one kv head, and walks the page table.

The context is always cut at multiples of SPLIT positions and the pieces are merged in order, whether one program walks
them all or each has a program of its own: how a row was scheduled does not change its sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quire.kernels.reference import KVCache

SPLIT = 1024  # positions of context per piece
KEY_BLOCK = 64  # positions of context per tile
LATENT_KEY_BLOCK, LATENT_ROWS = 16, 16  # the same where values are a part of the keys, and query heads per program


def copy_pages(cache: KVCache, pairs: list[tuple[int, int]]) -> None:
    """Copy whole pages, (source, target) each; no target is the source of another pair."""
    if pairs:
        source, target = torch.tensor(pairs, dtype=torch.int64).T.to(cache.data.device)
        cache.data[target] = cache.data[source]


def values_of(cache: KVCache) -> torch.Tensor:
    """The cache from the first value of page 0 on, where the keys of a shared one begin, too."""
    return cache.data if cache.shared else cache.data[:, cache.page_size * cache.kv_heads * cache.key_dim :]


def dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels take any stride between tokens and heads, but dims must lie side by side."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _write_kernel(
    key, value, keys, values, slots, page_stride, key_token, key_head, value_token, value_head,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + token)
    lane = tl.arange(0, BLOCK)
    page = slot // PAGE_SIZE * page_stride
    line = slot % PAGE_SIZE * KV_HEADS + head
    mask = lane < KEY_DIM
    tl.store(keys + page + line * KEY_DIM + lane, tl.load(key + token * key_token + head * key_head + lane, mask), mask)
    if not SHARED:
        mask = lane < VALUE_DIM
        found = tl.load(value + token * value_token + head * value_head + lane, mask)
        tl.store(values + page + line * VALUE_DIM + lane, found, mask)


def write_cache(cache: KVCache, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
    """Store key [T, Hkv, Dk] and value [T, Hkv, Dv] at `slots` [T] = page * page_size + offset."""
    key, value = dense_rows(key), dense_rows(value)
    tokens, heads, key_dim = key.shape
    block = triton.next_power_of_2(max(key_dim, value.shape[2]))
    _write_kernel[(tokens, heads)](
        key, value, cache.data, values_of(cache), slots, cache.data.stride(0),
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        cache.page_size, heads, key_dim, value.shape[2], block, cache.shared,
    )  # fmt: skip


@triton.jit
def _scores(
    query, keys, table, page_stride, positions, first, low, high, scale, softcap, head,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Base-2 scores [rows, BLOCK_N] against positions first .. first + BLOCK_N, -inf where not visible."""
    column = first + tl.arange(0, BLOCK_N)
    present = (column >= low) & (column < high)
    page = tl.load(table + column // PAGE_SIZE, present, other=0).to(tl.int64)
    page = page * page_stride
    line = column % PAGE_SIZE * KV_HEADS + head
    lane = tl.arange(0, BLOCK_K)
    tile = tl.load(
        keys + (page + line * KEY_DIM)[None, :] + lane[:, None],
        present[None, :] & (lane[:, None] < KEY_DIM), other=0.0,
    )  # fmt: skip
    score = tl.dot(query, tile, input_precision="ieee") * scale
    if SOFTCAP:
        bounded = score / softcap
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * bounded) + 1.0))  # tanh
    visible = present[None, :] & (column[None, :] <= positions[:, None])
    if WINDOW > 0:
        visible = visible & (column[None, :] > positions[:, None] - WINDOW)
    if CHUNK > 0:
        visible = visible & (column[None, :] // CHUNK == positions[:, None] // CHUNK)
    return tl.where(visible, score * 1.4426950408889634, float("-inf")), page, line, present


@triton.jit
def _attend_piece(
    query, keys, values, table, page_stride, positions, low, high, scale, softcap, head,
    PAGE_SIZE: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, VALUE_LINE: tl.constexpr,
):  # fmt: skip
    """Online softmax over positions [low, high): running maximum, sum and weighted values of each row."""
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lane = tl.arange(0, BLOCK_V)
    for first in range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        score, page, line, present = _scores(
            query, keys, table, page_stride, positions, first, low, high, scale, softcap, head,
            PAGE_SIZE, KV_HEADS, KEY_DIM, BLOCK_N, BLOCK_K, WINDOW, CHUNK, SOFTCAP,
        )  # fmt: skip
        peak = tl.maximum(best, tl.max(score, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        weight = tl.exp2(score - base[:, None])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weight, 1)
        tile = tl.load(
            values + (page + line * VALUE_LINE)[:, None] + lane[None, :],
            present[:, None] & (lane[None, :] < VALUE_DIM), other=0.0,
        )  # fmt: skip
        mixed = mixed * decay[:, None] + tl.dot(weight.to(tile.dtype), tile, input_precision="ieee")
        best = peak
    return best, total, mixed


@triton.jit
def _merge(best, total, mixed, piece_best, piece_total, piece_mixed):
    """Fold one piece of context into what the pieces before it gave."""
    peak = tl.maximum(best, piece_best)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    old, new = tl.exp2(best - base), tl.exp2(piece_best - base)
    return peak, total * old + piece_total * new, mixed * old[:, None] + piece_mixed * new[:, None]


@triton.jit
def _finish(best, total, mixed, sinks, heads, row_ok, SINKS: tl.constexpr):
    """Divide by the sum; a sink is one more logit in the sum that carries no value."""
    if SINKS:
        sink = tl.load(sinks + heads, row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(best, sink)
        total = total * tl.exp2(best - peak) + tl.exp2(sink - peak)
        mixed = mixed * tl.exp2(best - peak)[:, None]
    return mixed / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _attention_kernel(
    query, keys, values, tables, starts, lengths, sinks, out, piece_best, piece_total, piece_mixed,
    scale, softcap, sequences, page_stride, table_stride, query_token, query_head,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, PAGE_SIZE: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
    SPLIT_SIZE: tl.constexpr, APART: tl.constexpr, CUTS: tl.constexpr, VALUE_LINE: tl.constexpr,
):  # fmt: skip
    block, head, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # CUTS programs share a kv head
    PER_BLOCK: tl.constexpr = BLOCK_M // GROUP
    # Which sequence owns this block of query positions: sequence s starts at block starts[s] // PER_BLOCK + s.
    left, right = 0, sequences
    while left < right:
        middle = (left + right) // 2
        if tl.load(starts + middle) // PER_BLOCK + middle <= block:
            left = middle + 1
        else:
            right = middle
    sequence = left - 1
    start, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    inside = (block - (start // PER_BLOCK + sequence)) * PER_BLOCK
    if inside >= end - start:
        return
    row = tl.arange(0, BLOCK_M)
    offset = inside + row // GROUP
    row_ok = (row < PER_BLOCK * GROUP) & (offset < end - start)
    length = tl.load(lengths + sequence)
    positions = length - (end - start) + offset
    token = (start + offset).to(tl.int64)
    heads = head * GROUP + row % GROUP
    lane = tl.arange(0, BLOCK_K)
    rows = tl.load(
        query + token[:, None] * query_token + heads[:, None] * query_head + lane[None, :],
        row_ok[:, None] & (lane[None, :] < KEY_DIM), other=0.0,
    )  # fmt: skip
    table = tables + sequence * table_stride
    high = tl.minimum(length - (end - start) + inside + PER_BLOCK, length)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - (end - start) + inside - WINDOW + 1, 0)
    if CHUNK > 0:
        low = tl.maximum((length - (end - start) + inside) // CHUNK * CHUNK, low)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    first_piece, last_piece = low // SPLIT_SIZE, tl.cdiv(high, SPLIT_SIZE)
    if APART:
        first_piece = tl.maximum(piece, first_piece)
        last_piece = tl.minimum(piece + 1, last_piece)
    for part in range(first_piece, last_piece):
        part_best, part_total, part_mixed = _attend_piece(
            rows, keys, values, table, page_stride, positions, tl.maximum(part * SPLIT_SIZE, low),
            tl.minimum((part + 1) * SPLIT_SIZE, high), scale, softcap, head // CUTS,
            PAGE_SIZE, KV_HEADS, KEY_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, WINDOW, CHUNK, SOFTCAP,
            VALUE_LINE,
        )  # fmt: skip
        best, total, mixed = _merge(best, total, mixed, part_best, part_total, part_mixed)
    lane = tl.arange(0, BLOCK_V)
    if APART:
        line = (token * (KV_HEADS * CUTS * GROUP) + heads) * tl.num_programs(2) + piece
        tl.store(piece_best + line, best, row_ok)
        tl.store(piece_total + line, total, row_ok)
        tl.store(
            piece_mixed + line[:, None] * VALUE_DIM + lane[None, :], mixed,
            row_ok[:, None] & (lane[None, :] < VALUE_DIM),
        )  # fmt: skip
    else:
        answer = _finish(best, total, mixed, sinks, heads, row_ok, SINKS)
        line = token * (KV_HEADS * CUTS * GROUP) + heads
        tl.store(
            out + line[:, None] * VALUE_DIM + lane[None, :], answer.to(out.dtype.element_ty),
            row_ok[:, None] & (lane[None, :] < VALUE_DIM),
        )  # fmt: skip


@triton.jit
def _merge_kernel(
    piece_best, piece_total, piece_mixed, sinks, out, pieces,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program per (token, head) folds its pieces in the order of the context."""
    line = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    lane = tl.arange(0, BLOCK_V)
    one = tl.arange(0, 1)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    mixed = tl.zeros([1, BLOCK_V], tl.float32)
    for piece in range(pieces):
        at = line * pieces + piece
        found = tl.load(piece_mixed + at * VALUE_DIM + lane[None, :], lane[None, :] < VALUE_DIM, other=0.0)
        best, total, mixed = _merge(
            best, total, mixed, tl.load(piece_best + at + one), tl.load(piece_total + at + one), found
        )
    answer = _finish(best, total, mixed, sinks, tl.program_id(1) + one, one == 0, SINKS)
    tl.store(out + line * VALUE_DIM + lane[None, :], answer.to(out.dtype.element_ty), lane[None, :] < VALUE_DIM)


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
    """Causal attention of query [T, H, Dk] over the pages; returns [T, H, Dv]. Arguments as in kernels/reference.py."""
    query = dense_rows(query)
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = cache.kv_heads, cache.value_dim
    group, sequences = heads // kv_heads, tables.shape[0]
    decode = tokens == sequences  # every sequence brings one position: known without asking the device
    cuts, key_block, least = 1, KEY_BLOCK, 16 if decode else 64
    if cache.shared:  # latents are wide: fewer rows and keys at a time stay within a multiprocessor's memory
        cuts, key_block, least = _cuts(group), LATENT_KEY_BLOCK, 16
        group //= cuts
    rows = max(least, triton.next_power_of_2(group))
    blocks = sequences if decode else tokens // (rows // group) + sequences
    pieces = triton.cdiv(tables.shape[1] * cache.page_size, SPLIT)
    apart = pieces > 1 and blocks * kv_heads * cuts < _enough_programs(query.device)
    out = query.new_empty((tokens, heads, value_dim))
    scratch = tokens * heads * pieces if apart else 0
    best, total = out.new_empty((2, scratch), dtype=torch.float32)
    mixed = out.new_empty((scratch, value_dim), dtype=torch.float32)
    block_v = triton.next_power_of_2(value_dim)
    block_k = max(16, triton.next_power_of_2(key_dim))
    _attention_kernel[(blocks, kv_heads * cuts, pieces if apart else 1)](
        query, cache.data, values_of(cache), tables, starts, lengths, sinks, out, best, total, mixed,
        scale, softcap or 0.0, sequences, cache.data.stride(0), tables.stride(0), query.stride(0), query.stride(1),
        group, kv_heads, cache.page_size, key_dim, value_dim, rows, key_block, block_k, max(16, block_v),
        window or 0, chunk or 0, softcap is not None, sinks is not None, SPLIT, apart,
        cuts, key_dim if cache.shared else value_dim,
    )  # fmt: skip
    if apart:
        _merge_kernel[(tokens, heads)](
            best, total, mixed, sinks, out, pieces, heads, value_dim, max(16, block_v), sinks is not None
        )
    return out


def _cuts(group: int) -> int:
    """Into how many equal parts of at most LATENT_ROWS the query heads of a latent are cut."""
    return next(cuts for cuts in range(1, group + 1) if group % cuts == 0 and group // cuts <= LATENT_ROWS)


def _enough_programs(device: torch.device) -> int:
    """Below this many programs the context is worth splitting over more of them."""
    if device.type != "cuda":
        return 64
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count

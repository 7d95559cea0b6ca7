"""Paged attention, cache writes and rotary of every level against the reference, and bit for bit against themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from quire.kernels.reference import KVCache
from quire.kernels.table import Ops

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.2e-2, torch.int8: 1.2e-2}


@dataclass
class Scene:
    """Sequences with random pages, keys and values: `lengths` positions each, the last `new` of them to compute."""

    lengths: list[int]
    new: list[int]
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 32
    value_dim: int = 32
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    low: int = 0  # positions below have no page any more: their table entries are 0
    stored: torch.dtype | None = None  # of the cache, where it is not dtype
    shared: bool = False
    query: torch.Tensor = field(init=False)
    keys: list[torch.Tensor] = field(init=False)
    values: list[torch.Tensor] = field(init=False)
    tables: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.query = torch.randn(sum(self.new), self.heads, self.key_dim).to(self.dtype)
        self.keys = [torch.randn(n, self.kv_heads, self.key_dim).to(self.dtype) for n in self.lengths]
        self.values = [torch.randn(n, self.kv_heads, self.value_dim).to(self.dtype) for n in self.lengths]
        pages = [-(-n // self.page_size) for n in self.lengths]
        order = (torch.randperm(sum(pages)) + 1).tolist()
        self.tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for s, count in enumerate(pages):
            for i in range(count):
                page = order.pop()
                self.tables[s, i] = page if (i + 1) * self.page_size > self.low else 0

    @property
    def num_pages(self) -> int:
        return sum(-(-n // self.page_size) for n in self.lengths) + 1

    def cache(self, ops: Ops) -> KVCache:
        """Everything that no live position owns, page 0 with it, is NaN."""
        size = (self.num_pages, self.page_size, self.kv_heads, self.key_dim, self.value_dim)
        cache = ops.new_cache(*size, self.stored or self.dtype, "cpu", self.shared)
        cache.data.view(torch.uint8).fill_(255)  # NaN in every dtype, and as a scale of bytes
        for s, length in enumerate(self.lengths):
            at = torch.arange(self.low, length)
            slots = self.tables[s, at // self.page_size].long() * self.page_size + at % self.page_size
            ops.write_cache(cache, self.keys[s][self.low :], self.values[s][self.low :], slots)
        return cache

    def attend(self, ops: Ops, cache: KVCache | None = None, **options: object) -> torch.Tensor:
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        cache = self.cache(ops) if cache is None else cache
        return ops.attention(self.query, cache, self.tables, starts, lengths, self.key_dim**-0.5, **options)

    def check(self, ops: Ops, oracle: Ops, **options: object) -> None:
        got, want = self.attend(ops, **options), self.attend(oracle, **options)
        assert not got.isnan().any()
        tolerance = TOLERANCE[self.stored or self.dtype]
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_decode_and_prefill(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    Scene([1, 40, 77, 16, 200, 33], [1, 1, 77, 5, 1, 20], dtype=dtype).check(ops, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(64, 64), (80, 80), (48, 24), (20, 36), (7, 5), (1, 1), (192, 128), (256, 256)]
)
def test_any_head_size(ops: Ops, oracle: Ops, dtype: torch.dtype, key_dim: int, value_dim: int) -> None:
    Scene([50, 19], [1, 9], key_dim=key_dim, value_dim=value_dim, dtype=dtype).check(ops, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (8, 8), (14, 2), (40, 1), (12, 4)])
def test_any_grouping_of_heads(ops: Ops, oracle: Ops, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    Scene([50, 19], [1, 9], heads=heads, kv_heads=kv_heads, dtype=dtype).check(ops, oracle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 4, 7, 8, 16, 24, 32, 64, 128])
def test_any_page_size(ops: Ops, oracle: Ops, dtype: torch.dtype, page_size: int) -> None:
    Scene([50, 131], [1, 40], page_size=page_size, dtype=dtype).check(ops, oracle)
    Scene([90, 131], [1, 40], page_size=page_size, dtype=dtype, low=50).check(ops, oracle, window=40)


@pytest.mark.parametrize("dtype", DTYPES)
def test_window_chunk_softcap_sinks(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    scene = Scene([150, 300, 90], [1, 120, 90], dtype=dtype)
    scene.check(ops, oracle, window=1)
    scene.check(ops, oracle, window=50)
    scene.check(ops, oracle, chunk=64)
    scene.check(ops, oracle, chunk=50)
    scene.check(ops, oracle, softcap=0.7)
    scene.check(ops, oracle, sinks=torch.randn(scene.heads))
    scene.check(ops, oracle, sinks=torch.full((scene.heads,), 90.0))
    scene.check(ops, oracle, window=70, softcap=2.0, sinks=torch.randn(scene.heads).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_splits_of_the_context(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    Scene([1300, 512, 513, 1025], [1, 1, 3, 1], dtype=dtype).check(ops, oracle)
    Scene([1300, 1100], [1, 30], dtype=dtype, low=400).check(ops, oracle, window=600)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_with_scales(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    Scene([1, 40, 77, 200], [1, 1, 77, 5], dtype=dtype, stored=torch.int8).check(ops, oracle)
    Scene([50, 19], [1, 9], heads=12, kv_heads=4, key_dim=80, dtype=dtype, stored=torch.int8).check(ops, oracle)
    Scene([50, 19], [1, 9], key_dim=7, value_dim=5, dtype=dtype, stored=torch.int8).check(ops, oracle)
    for page_size in (12, 16, 48):
        scene = Scene([90, 131], [1, 40], page_size=page_size, dtype=dtype, low=50, stored=torch.int8)
        scene.check(ops, oracle, window=40, softcap=2.0, sinks=torch.randn(4))
    Scene([1300, 513], [1, 3], dtype=dtype, stored=torch.int8).check(ops, oracle)


def test_bytes_keep_large_and_small_tokens(ops: Ops, oracle: Ops) -> None:
    """Each token and head has a scale of its own: a token a thousand times as large as its neighbours spoils none."""
    scene = Scene([60], [2], stored=torch.int8)
    scene.values[0] *= torch.logspace(-3, 0, 60)[torch.randperm(60)][:, None, None]
    exact = Scene([60], [2])
    exact.query, exact.keys, exact.values, exact.tables = scene.query, scene.keys, scene.values, scene.tables
    scene.check(ops, oracle)
    torch.testing.assert_close(scene.attend(ops), exact.attend(oracle), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("stored", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("heads", "key_dim", "value_dim"), [(16, 576, 512), (3, 40, 32), (100, 24, 24), (5, 21, 17)])
def test_values_that_are_a_part_of_the_keys(
    ops: Ops, oracle: Ops, stored: torch.dtype, heads: int, key_dim: int, value_dim: int
) -> None:
    """Multi-head latent attention: one latent for all heads, kept once."""
    dtype = torch.bfloat16 if stored == torch.int8 else stored
    shape = {"heads": heads, "kv_heads": 1, "key_dim": key_dim, "value_dim": value_dim}
    for page_size in (16, 12):
        scene = Scene([37, 90], [1, 4], **shape, page_size=page_size, dtype=dtype, stored=stored, shared=True)
        scene.check(ops, oracle)
    scene = Scene([90, 530], [20, 1], **shape, dtype=dtype, stored=stored, shared=True, low=30)
    scene.check(ops, oracle, window=40)
    latent = ops.cache_bytes(16, 1, key_dim, value_dim, stored, True)
    assert latent < 1.15 * 16 * (key_dim * stored.itemsize + 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stored", "shared"), [(None, False), (torch.int8, False), (None, True)])
@pytest.mark.parametrize("page_size", [16, 12])
def test_bits_do_not_depend_on_company_or_chunking(
    ops: Ops, dtype: torch.dtype, page_size: int, stored: torch.dtype | None, shared: bool
) -> None:
    """A prompt at once, in pieces, one by one, alone or with others, on one thread or several: the same bits."""
    length = 1100
    kv_heads = 1 if shared else 2
    scene = Scene(
        [length, 700], [length, 1], 4, kv_heads, page_size=page_size, dtype=dtype, stored=stored, shared=shared
    )
    cache = scene.cache(ops)
    whole = scene.attend(ops, cache)[:length]

    def rows(first: int, last: int) -> torch.Tensor:
        starts = torch.tensor([0, last - first], dtype=torch.int32)
        lengths = torch.tensor([last], dtype=torch.int32)
        scale = scene.key_dim**-0.5
        return ops.attention(scene.query[first:last], cache, scene.tables[:1], starts, lengths, scale)

    for first, last in [(0, 100), (100, 611), (611, 612), (612, 1100)]:
        assert torch.equal(rows(first, last), whole[first:last])
    for row in (0, 1, 15, 16, 63, 511, 512, 513, 1023, 1024, 1099):
        assert torch.equal(rows(row, row + 1)[0], whole[row]), row
    ops.set_threads(1)
    assert torch.equal(scene.attend(ops, cache)[:length], whole)
    ops.set_threads(2)
    assert torch.equal(rows(1099, 1100)[0], whole[1099])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stored", "shared"), [(None, False), (torch.int8, False), (None, True)])
@pytest.mark.parametrize("page_size", [16, 12])
def test_bits_do_not_depend_on_who_shares_pages(
    ops: Ops, dtype: torch.dtype, page_size: int, stored: torch.dtype | None, shared: bool
) -> None:
    """Rows whose tables name the same pages for a part of the context are computed together: each has the bits of itself
    alone, on one thread and on several, with a window, a soft cap and sinks."""
    lengths, new = [900, 840, 900, 300, 90, 880, 1300, 40, 1200], [1, 1, 2, 1, 1, 1, 1, 1, 300]
    kv_heads = 1 if shared else 2
    scene = Scene(lengths, new, 4, kv_heads, page_size=page_size, dtype=dtype, stored=stored, shared=shared)
    cache = scene.cache(ops)
    # Everybody begins like sequence 6, for as many positions as are given; 0 and 2 go on alike, and so do 1 and 5.
    for s, same in enumerate([790, 790, 790, 272, 64, 790, 0, 30, 500]):
        scene.tables[s, : same // page_size] = scene.tables[6, : same // page_size]
    for s, like, same in [(2, 0, 850), (5, 1, 820)]:
        scene.tables[s, : same // page_size] = scene.tables[like, : same // page_size]
    starts = torch.tensor([0, *new]).cumsum(0).tolist()
    scale = scene.key_dim**-0.5
    sinks = torch.randn(scene.heads)
    for options in ({}, {"window": 400}, {"softcap": 2.0, "sinks": sinks}, {"chunk": 200}):
        together = scene.attend(ops, cache, **options)
        ops.set_threads(1)
        assert torch.equal(scene.attend(ops, cache, **options), together)
        ops.set_threads(2)
        for s, length in enumerate(lengths):
            first, last = starts[s], starts[s + 1]
            start, length_of = torch.tensor([0, last - first]).int(), torch.tensor([length]).int()
            query, table = scene.query[first:last], scene.tables[s : s + 1]
            alone = ops.attention(query, cache, table, start, length_of, scale, **options)
            assert torch.equal(alone, together[first:last]), (options, s)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_many_rows_that_share_pages(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    """More of them than one piece holds, with two lengths of what they share."""
    model = torch.bfloat16 if dtype == torch.int8 else dtype
    scene = Scene([560] * 40, [1] * 40, dtype=model, stored=dtype)
    for s in range(1, 40):
        scene.tables[s, : 8 if s % 3 else 20] = scene.tables[0, : 8 if s % 3 else 20]
    for keys in (scene.keys, scene.values):
        for s in range(1, 40):
            same = 128 if s % 3 else 320
            keys[s][:same] = keys[0][:same]
    scene.check(ops, oracle)
    scene.check(ops, oracle, window=300)


def test_queries_may_be_part_of_a_wider_row(ops: Ops) -> None:
    scene = Scene([30], [30])
    want = scene.attend(ops)
    wide = torch.randn(30, scene.heads + 3, scene.key_dim)
    wide[:, : scene.heads] = scene.query
    scene.query = wide[:, : scene.heads]
    assert torch.equal(scene.attend(ops), want)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_copied_pages_hold_the_same(ops: Ops, dtype: torch.dtype) -> None:
    scene = Scene([40], [1], dtype=dtype)
    cache = scene.cache(ops)
    want = scene.attend(ops, cache)
    moved = ops.new_cache(9, 16, scene.kv_heads, scene.key_dim, scene.value_dim, dtype, "cpu")
    for s, length in enumerate(scene.lengths):
        at = torch.arange(length)
        slots = scene.tables[s, at // 16].long() * 16 + at % 16
        ops.write_cache(moved, scene.keys[s], scene.values[s], slots)
    ops.copy_pages(moved, [(page, page + 4) for page in scene.tables[0].tolist()])
    scene.tables += 4
    assert torch.equal(scene.attend(ops, moved), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angles", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize(("dim", "rotated"), [(64, 64), (64, 16), (20, 10), (36, 36), (6, 2)])
@pytest.mark.parametrize("stored", [None, torch.int8])
def test_rotary(
    ops: Ops,
    oracle: Ops,
    dtype: torch.dtype,
    angles: torch.dtype,
    style: str,
    dim: int,
    rotated: int,
    stored: torch.dtype | None,
) -> None:
    tokens = 21
    qkv = torch.randn(tokens, 8, dim).to(dtype)
    query, key, value = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    cos, sin = torch.randn(2, tokens, rotated).to(angles)
    got, want = ops.rotary(query, key, cos, sin, style), oracle.rotary(query, key, cos, sin, style)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    caches = [ops.new_cache(4, 16, 2, dim, dim, stored or dtype, "cpu") for _ in range(2)]
    for cache in caches:
        cache.data.zero_()
    slots = torch.randperm(64)[:tokens]
    assert torch.equal(ops.rotary_write(query, key, value, cos, sin, style, caches[0], slots), want[0])
    ops.write_cache(caches[1], want[1], value, slots)
    assert torch.equal(caches[0].data, caches[1].data)


@pytest.mark.parametrize("tokens", [13, 20])
def test_few_tokens_are_rotated_by_several_threads(ops: Ops, oracle: Ops, tokens: int) -> None:
    qkv, slots = torch.randn(tokens, 33, 128), torch.randperm(64)[:tokens]  # enough to be worth it
    query, key, value = qkv[:, :15], qkv[:, 15:24], qkv[:, 24:]
    cos, sin = torch.randn(2, tokens, 128)
    want = oracle.rotary(query, key, cos, sin, "half")
    caches = [ops.new_cache(4, 16, 9, 128, 128, torch.float32, "cpu") for _ in range(2)]
    for cache in caches:
        cache.data.zero_()
    ops.write_cache(caches[1], want[1], value, slots)
    try:
        ops.set_threads(5)
        assert torch.equal(ops.rotary_write(query, key, value, cos, sin, "half", caches[0], slots), want[0])
        assert torch.equal(ops.rotary(query, key, cos, sin, "half")[1], want[1])
    finally:
        ops.set_threads(1)
    assert torch.equal(caches[0].data, caches[1].data)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_bytes_is_what_a_page_takes(ops: Ops, dtype: torch.dtype) -> None:
    for size in [(16, 2, 64, 64), (5, 1, 7, 3), (128, 8, 192, 128)]:
        cache = ops.new_cache(3, *size, dtype, "cpu")
        assert cache.data[0].nbytes == ops.cache_bytes(*size, dtype)
    assert ops.cache_bytes(16, 2, 64, 64, dtype) == 16 * 2 * 128 * dtype.itemsize  # nothing is wasted


@pytest.mark.parametrize(("model", "stored"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_cache_of_another_dtype(ops: Ops, oracle: Ops, model: torch.dtype, stored: torch.dtype) -> None:
    tokens, slots = 20, torch.arange(16, 36)
    query, key, value = torch.randn(3, tokens, 2, 16).to(model)
    cos, sin = torch.randn(2, tokens, 16).to(model)
    tables, starts = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    outputs = []
    for o in (ops, oracle):
        cache = o.new_cache(3, 16, 2, 16, 16, stored, "cpu")
        turned = o.rotary_write(query, key, value, cos, sin, "half", cache, slots)
        outputs.append(o.attention(turned, cache, tables, starts, lengths, 0.25))
    assert outputs[0].dtype == model
    torch.testing.assert_close(outputs[0].float(), outputs[1].float(), rtol=2e-2, atol=2e-2)

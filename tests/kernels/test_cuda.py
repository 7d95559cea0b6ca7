"""The CUDA backend against the reference: on a card where there is one, else through Triton's interpreter (conftest.py)."""

from __future__ import annotations

import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from quire.kernels import cuda, reference  # noqa: E402

# The interpreter knows no bfloat16 arithmetic (it works on the bits), so there float16 stands in for it.
DTYPES = [torch.float32, torch.bfloat16 if DEVICE == "cuda" else torch.float16]


def tolerance(dtype: torch.dtype) -> float:
    return 2e-5 if dtype is torch.float32 else 2e-2


def paged(lengths, page_size, kv_heads, key_dim, value_dim, dtype, seed=0, shared=False):
    """A cache with shuffled pages holding random keys and values, NaN wherever nothing was written."""
    generator = torch.Generator().manual_seed(seed)
    pages = [-(-length // page_size) for length in lengths]
    cache = reference.new_cache(sum(pages) + 1, page_size, kv_heads, key_dim, value_dim, dtype, DEVICE, shared)
    cache.data.fill_(float("nan"))
    order = (torch.randperm(sum(pages), generator=generator) + 1).int()
    tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    taken = 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        tables[row, :count] = order[taken : taken + count]
        taken += count
        position = torch.arange(length)
        slots = tables[row].long()[position // page_size] * page_size + position % page_size
        key = torch.randn(length, kv_heads, key_dim, generator=generator).to(dtype)
        value = torch.randn(length, kv_heads, value_dim, generator=generator).to(dtype)
        reference.write_cache(cache, key.to(DEVICE), value.to(DEVICE), slots.to(DEVICE))
    return cache, tables.to(DEVICE)


SHAPES = [  # heads, kv heads, key dim, value dim
    (4, 2, 16, 16),
    (8, 1, 24, 16),
    (6, 2, 64, 32),
]
RULES = [
    {},
    {"window": 7},
    {"chunk": 8},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": 20, "sinks": True, "softcap": 3.0},
]


@pytest.mark.parametrize("heads", [4, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_a_part_of_the_keys(dtype, heads):
    """Latents: written once, read by programs that share them when there are many heads."""
    lengths, counts = [1, 33, 70], [1, 1, 20]
    cache, tables = paged(lengths, 16, 1, 40, 24, dtype, shared=True)
    starts = torch.tensor([0, 1, 2, 22], dtype=torch.int32, device=DEVICE)
    query = torch.randn(sum(counts), heads, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    arguments = (query, cache, tables, starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), 0.2)
    expected, found = reference.attention(*arguments), cuda.attention(*arguments)
    torch.testing.assert_close(found, expected, rtol=tolerance(dtype), atol=tolerance(dtype))
    written = reference.new_cache(4, 16, 1, 40, 24, dtype, DEVICE, True)
    key = torch.randn(5, 1, 40, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    cuda.write_cache(written, key, key[..., :24], torch.arange(14, 19, device=DEVICE))
    assert torch.equal(written.data.view(-1, 40)[14:19], key[:, 0])
    assert written.data.count_nonzero() == key.count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rules", RULES)
def test_attention_of_mixed_rows(dtype, shape, rules):
    heads, kv_heads, key_dim, value_dim = shape
    lengths, counts = [1, 33, 70, 18], [1, 1, 30, 18]
    cache, tables = paged(lengths, 16, kv_heads, key_dim, value_dim, dtype)
    starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    query = torch.randn(sum(counts), heads, key_dim, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    options = dict(rules)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1, 1, heads, device=DEVICE)
    arguments = (query, cache, tables, starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), 0.2)
    expected = reference.attention(*arguments, **options)
    found = cuda.attention(*arguments, **options)
    assert (found - expected).abs().max() <= tolerance(dtype)


def test_long_context_is_the_same_split_or_whole(monkeypatch):
    """Decode rows whose context spans pieces: by one program each, and by one program a piece."""
    module = sys.modules["quire.kernels.cuda.attention"]  # the package shows the function under this name
    monkeypatch.setattr(module, "SPLIT", 64)
    lengths = [150, 64, 65]
    cache, tables = paged(lengths, 16, 2, 16, 16, torch.float32)
    starts = torch.arange(4, dtype=torch.int32, device=DEVICE)
    query = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    arguments = (query, cache, tables, starts, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), 0.25)
    expected = reference.attention(*arguments)
    monkeypatch.setattr(module, "_enough_programs", lambda device: 0)
    whole = cuda.attention(*arguments)
    monkeypatch.setattr(module, "_enough_programs", lambda device: 1 << 30)
    apart = cuda.attention(*arguments)
    assert (whole - expected).abs().max() < 2e-5
    assert torch.equal(whole, apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("wide", [False, True])
def test_rotary_write(dtype, style, rotated, wide):
    tokens, heads, kv_heads, dim, value_dim = 5, 4, 2, 16, 24
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(tokens, n, dim, generator=generator).to(DEVICE, dtype) for n in (heads, kv_heads))
    value = torch.randn(tokens, kv_heads, value_dim, generator=generator).to(DEVICE, dtype)
    angle = torch.randn(tokens, rotated, generator=generator)
    cos, sin = (f(angle).to(DEVICE, torch.float32 if wide else dtype) for f in (torch.cos, torch.sin))
    slots = torch.tensor([3, 17, 16, 5, 40], device=DEVICE)
    caches = [reference.new_cache(4, 16, kv_heads, dim, value_dim, dtype, DEVICE) for _ in range(2)]
    expected = reference.rotary_write(query, key, value, cos, sin, style, caches[0], slots)
    found = cuda.rotary_write(query, key, value, cos, sin, style, caches[1], slots)
    assert (found - expected).abs().max() <= tolerance(dtype)
    assert (caches[0].data - caches[1].data).abs().max() <= tolerance(dtype)


def test_write_and_copy_pages():
    generator = torch.Generator().manual_seed(4)
    key, value = (torch.randn(3, 2, dim, generator=generator).to(DEVICE) for dim in (8, 12))
    slots = torch.tensor([18, 1, 35], device=DEVICE)
    caches = [reference.new_cache(6, 16, 2, 8, 12, torch.float32, DEVICE) for _ in range(2)]
    for backend, cache in zip((reference, cuda), caches, strict=True):
        backend.write_cache(cache, key, value, slots)
        backend.copy_pages(cache, [(1, 3), (2, 5)])
        backend.copy_pages(cache, [])
    assert torch.equal(caches[0].data, caches[1].data)
    assert caches[0].data[5].abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("style", ["down_then_scale", "scale_then_down", "plus_one"])
@pytest.mark.parametrize("weighted", [True, False])
def test_norms(dtype, style, weighted):
    generator = torch.Generator().manual_seed(5)
    x, residual = (torch.randn(3, 5, 72, generator=generator).to(DEVICE, dtype) for _ in range(2))
    weight = torch.randn(72, generator=generator).to(DEVICE, dtype) if weighted else None
    assert (cuda.rms_norm(x, weight, 1e-5, style) - reference.rms_norm(x, weight, 1e-5, style)).abs().max() <= (
        tolerance(dtype)
    )
    found = cuda.add_rms_norm(x, residual, weight, 1e-5, style)
    expected = reference.add_rms_norm(x, residual, weight, 1e-5, style)
    assert torch.equal(found[1], expected[1])
    assert (found[0] - expected[0]).abs().max() <= tolerance(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated(dtype, activation, gate_first):
    gate_up = (torch.randn(4, 2 * 40, generator=torch.Generator().manual_seed(6)) * 3).to(DEVICE, dtype)
    found = cuda.gated(gate_up, activation, gate_first)
    expected = reference.gated(gate_up, activation, gate_first)
    assert torch.allclose(found, expected, atol=tolerance(dtype), rtol=tolerance(dtype))

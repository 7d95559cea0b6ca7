"""arg-max, uniform and sample of every level: the rules of the reference, and the distribution they promise."""

from __future__ import annotations

import pytest
import torch

from quire.kernels.choosing import Said
from quire.kernels.table import Ops

DTYPES = [torch.float32, torch.bfloat16]
MASK = 2**64 - 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 5, 16, 63, 1000, 5003])
def test_argmax_takes_the_first_of_equals(ops: Ops, dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randint(-3, 3, (20, vocab)).to(dtype)
    want = torch.tensor([row.tolist().index(row.max().item()) for row in logits])
    assert torch.equal(ops.argmax(logits), want)
    assert torch.equal(torch.cat([ops.argmax(row[None]) for row in logits]), want)


def splitmix(seed: int, position: int) -> float:
    """The same number from Python's own integers."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    return (mix((mix((seed + golden) & MASK) + (position + 1) * golden) & MASK) >> 11) * 2.0**-53


def test_uniform_is_the_same_everywhere(ops: Ops, oracle: Ops) -> None:
    pairs = [(0, 0), (1, 0), (0, 1), (-1, 5), (2**63 - 1, 123456), (-(2**63), 2**40), (42, 7)]
    seeds, positions = (torch.tensor(column) for column in zip(*pairs, strict=True))
    want = torch.tensor([splitmix(seed & MASK, position) for seed, position in pairs], dtype=torch.float64)
    assert torch.equal(ops.uniform(seeds, positions), want)
    assert torch.equal(oracle.uniform(seeds, positions), want)


def test_uniform_is_uniform(ops: Ops) -> None:
    drawn = ops.uniform(torch.arange(100).repeat_interleave(1000), torch.arange(1000).repeat(100))
    counts = torch.histc(drawn, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 100  # chi-square, 49 degrees of freedom: 1 in 10^5
    assert abs(torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]) < 0.02


def random_rules(rows: int) -> dict[str, torch.Tensor]:
    pick = torch.randint(0, 4, (3, rows))
    return {
        "temperature": torch.tensor([0.0, 0.3, 1.0, 4.0])[torch.randint(0, 4, (rows,))],
        "top_k": torch.tensor([0, 1, 7, 300])[pick[0]],
        "top_p": torch.tensor([1.0, 0.2, 0.9, 0.999])[pick[1]],
        "min_p": torch.tensor([0.0, 0.0, 0.05, 0.5])[pick[2]],
        "uniform": torch.rand(rows, dtype=torch.float64),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 3, 50, 1000, 20011])
@pytest.mark.parametrize("spread", [0.0, 0.5, 6.0])
def test_sample_draws_what_the_reference_draws(
    ops: Ops, oracle: Ops, dtype: torch.dtype, vocab: int, spread: float
) -> None:
    """Equal but where a draw falls within a rounding of the border of two tokens."""
    logits = (torch.randn(200, vocab) * spread).to(dtype)
    logits[:, 1::7] = float("-inf")
    rules = random_rules(200)
    got, want = ops.sample(logits, **rules), oracle.sample(logits, **rules)
    assert (got != want).sum() <= 2
    assert not torch.isinf(logits.gather(1, got[:, None])).any()


def rule(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> dict[str, torch.Tensor]:
    return {
        "temperature": torch.tensor([temperature]),
        "top_k": torch.tensor([top_k]),
        "top_p": torch.tensor([top_p]),
        "min_p": torch.tensor([min_p]),
    }


def kept(ops: Ops, logits: torch.Tensor, **options: float) -> set[int]:
    """All tokens that can be drawn."""
    return {
        ops.sample(logits, **rule(**options), uniform=torch.tensor([u], dtype=torch.float64)).item()
        for u in torch.linspace(0, 1 - 1e-9, 400).tolist()
    }


def test_what_is_kept(ops: Ops, oracle: Ops) -> None:
    logits = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.06, 0.04]).log()[None]
    for o in (ops, oracle):
        assert kept(o, logits) == {0, 1, 2, 3, 4, 5}
        assert kept(o, logits, top_k=1) == {0}
        assert kept(o, logits, top_k=3) == {0, 1, 2, 3}  # both that equal the third
        assert kept(o, logits, top_p=0.0) == {0}
        assert kept(o, logits, top_p=0.39) == {0}
        assert kept(o, logits, top_p=0.65) == {0, 1}
        assert kept(o, logits, top_p=0.75) == {0, 1, 2}  # of equals the lower id
        assert kept(o, logits, min_p=0.5) == {0, 1}
        assert kept(o, logits, top_k=2, top_p=0.55) == {0}  # the share is of what top-k left
        assert kept(o, logits, min_p=0.2, top_p=0.95) == {0, 1, 2, 3}
        assert kept(o, logits, temperature=1e-30) == {0}


def test_extreme_rows(ops: Ops) -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    for options in [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}]:
        assert ops.sample(torch.full((1, 9), float("nan")), **rule(**options), uniform=half).item() == -1
        assert ops.sample(torch.full((1, 9), float("-inf")), **rule(**options), uniform=half).item() == -1
        one = torch.full((1, 3000), float("-inf"))
        one[0, 2999] = 3.0
        assert ops.sample(one, **rule(**options), uniform=half).item() == 2999


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.05, "temperature": 0.7}])
def test_distribution(ops: Ops, options: dict[str, float]) -> None:
    """Chi-square of 40,000 draws against the probabilities computed here in float64."""
    count, vocab = 40_000, 60
    logits = torch.randn(vocab, dtype=torch.float64) * 1.5
    weights = torch.exp((logits.float().double() - logits.max()) / options.get("temperature", 1.0))
    weights[weights < options.get("min_p", 0.0) * weights.max()] = 0
    order = weights.argsort(descending=True)
    weights[order[int(options.get("top_k", vocab)) :]] = 0
    before = weights[order].cumsum(0) - weights[order]
    weights[order[before >= options.get("top_p", 2.0) * weights.sum()]] = 0
    expected = weights / weights.sum() * count

    rules = {name: value.expand(count) for name, value in rule(**options).items()}
    uniform = ops.uniform(torch.full((count,), 7), torch.arange(count))
    drawn = ops.sample(logits.float().expand(count, vocab), **rules, uniform=uniform)
    counts = torch.bincount(drawn, minlength=vocab).double()
    assert (counts[expected == 0] == 0).all()
    live = expected > 0
    chi = ((counts[live] - expected[live]) ** 2 / expected[live]).sum().item()
    freedom = int(live.sum()) - 1
    assert chi < freedom + 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 100, 5000, 32001])
def test_what_logprobs_are_made_of(ops: Ops, oracle: Ops, dtype: torch.dtype, vocab: int) -> None:
    wide = (torch.randn(4, vocab + 3) * 4).to(dtype)
    logits = wide[:, :vocab]
    logits[1] = logits[1].round()  # many ties
    logits[2, : vocab // 2] = float("-inf")
    chosen = logits.float().argmax(-1)
    chosen[3] = vocab // 2
    for count in sorted({0, 1, min(vocab, 20), vocab}):
        got, want = ops.rank(logits, chosen, count), oracle.rank(logits, chosen, count)
        torch.testing.assert_close(got.log_sums, want.log_sums, rtol=1e-6, atol=1e-5)
        assert torch.equal(got.ranks, want.ranks)
        assert torch.equal(got.best, want.best)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1003, 40003])
def test_rows_that_cannot_be_chosen_from(ops: Ops, oracle: Ops, dtype: torch.dtype, vocab: int) -> None:
    logits = torch.randn(6, vocab).to(dtype)
    logits[1, vocab - 1] = float("nan")
    logits[2, 5] = float("inf")
    logits[3] = float("-inf")
    logits[4, 1:] = float("-inf")
    want = [True, False, False, False, True, True]
    for table in (ops, oracle):
        assert (table.argmax(logits) >= 0).tolist() == want
        for top_p in (1.0, 0.9):
            settings = (torch.ones(6), torch.zeros(6).long(), torch.full((6,), top_p), torch.zeros(6))
            assert (table.sample(logits, *settings, torch.rand(6).double()) >= 0).tolist() == want


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_is_cut_for_the_team_without_a_change(ops: Ops, oracle: Ops, dtype: torch.dtype) -> None:
    logits = (torch.randn(8, 60001) * torch.tensor([0.01, 1, 3, 3, 3, 3, 9, 30])[:, None]).to(dtype)
    logits[3] = logits[3].round()  # many ties, also across the parts
    rules = random_rules(8)
    rules["temperature"].clamp_(min=0.3)
    for top_k, top_p in ((0, 1.0), (0, 0.9), (40, 1.0), (40, 0.5), (0, 0.999)):
        rules["top_k"], rules["top_p"] = torch.full((8,), top_k), torch.full((8,), top_p)
        together = ops.sample(logits, *rules.values())
        alone = [ops.sample(logits[i : i + 1], *(item[i : i + 1] for item in rules.values())) for i in range(8)]
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together, oracle.sample(logits, *rules.values()))


def test_scores_are_a_copy(ops: Ops, oracle: Ops) -> None:
    values = torch.randn(3, 40).bfloat16()
    values[1, :4] = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0])
    for logits in (values, values.float(), values.half(), values[1:], values.t(), torch.randn(4, 20011)[:, 5:]):
        for table in (ops, oracle):
            copy = table.scores(logits)
            assert copy.dtype == torch.float32 and copy.is_contiguous() and copy.data_ptr() != logits.data_ptr()
            assert torch.equal(copy.view(torch.int32), logits.float().contiguous().view(torch.int32))


@pytest.mark.parametrize("vocab", [1, 31, 150, 20011])
def test_what_masks_lack_is_forbidden(ops: Ops, oracle: Ops, vocab: int) -> None:
    logits, rows = torch.randn(7, vocab), torch.tensor([6, 0, 3])
    logits[3, 0] = torch.nan  # a broken row stays broken
    allowed = torch.randint(-(2**31), 2**31, (3, vocab // 32 + 2), dtype=torch.int32)
    got, want = logits.clone(), logits.clone()
    ops.forbid(got, allowed, rows)
    oracle.forbid(want, allowed, rows)
    assert torch.equal(got.nan_to_num(), want.nan_to_num()) and torch.equal(got.isnan(), want.isnan())
    for i, row in enumerate(rows.tolist()):
        for token in range(min(vocab, 200)):
            bit = int(allowed[i, token // 32]) >> token % 32 & 1
            assert torch.equal(
                got[row, token].nan_to_num(), (logits if bit else logits - torch.inf)[row, token].nan_to_num()
            )
    others = [1, 2, 4, 5]
    assert torch.equal(got[others], logits[others])


def test_penalties(ops: Ops, oracle: Ops) -> None:
    tokens = torch.randint(0, 50, (5, 40), dtype=torch.int32)
    said = Said(
        torch.tensor([3, 0, 2, 1]),
        torch.tensor([4, 1, 0, 2]),
        torch.tensor([10, 5, 0, 7]),
        torch.tensor([40, 5, 0, 21]),
        torch.tensor([1.3, 2.0, 1.5, 1.0]),
        torch.tensor([0.5, 1.0, 0.0, 0.0]),
        torch.tensor([0.25, 0.0, 1.0, -0.5]),
    )
    got = torch.randn(4, 60)
    want = got.clone()
    for _ in range(2):  # nothing is left behind
        ops.penalize(got, tokens, said)
        oracle.penalize(want, tokens, said)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_pages_are_copied_in_order(ops: Ops) -> None:
    cache = ops.new_cache(6, 16, 2, 20, 20, torch.int8, "cpu")
    cache.data.copy_(torch.randint(-100, 100, cache.data.shape))
    before = cache.data.clone()
    ops.copy_pages(cache, [(1, 2), (2, 3), (4, 4), (0, 1)])
    assert torch.equal(cache.data, before[[0, 0, 1, 1, 4, 5]])

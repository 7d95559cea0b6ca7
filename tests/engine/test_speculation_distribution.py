"""The distribution of sampled texts, drawn with guesses of every method, beside the model's own scores: chi-square."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from test_speculation import SETTINGS, TEXT
from test_speculation_heads import heads  # noqa: F401  a fixture

from quire import LLM, SamplingParams

SEEDS = 1500
WISH = {"temperature": 1.0, "top_k": 3, "top_p": 0.9}
GUESSED = {
    "ngram": {"prompt_lookup_min": 1, "num_speculative_tokens": 3},
    "suffix": {"prompt_lookup_min": 1, "num_speculative_tokens": 3},
    "draft_model": {"num_speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], float]:
    """The chance of each text of four tokens, from the model's log-probabilities, asked for token by token."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    one = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20, ignore_eos=True)
    with LLM(**SETTINGS) as llm:
        ids = llm.get_tokenizer().encode(TEXT)
        for _ in range(4):
            texts = list(found)
            outputs = llm.generate([{"prompt_token_ids": [*ids, *text]} for text in texts], one, use_tqdm=False)
            longer: dict[tuple[int, ...], float] = {}
            for text, output in zip(texts, outputs, strict=True):
                scores = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
                for token, share in kept_shares(scores, WISH["top_k"], WISH["top_p"]).items():
                    longer[(*text, token)] = found[text] * share
            found = longer
    return found


def kept_shares(scores: dict[int, float], top_k: int, top_p: float) -> dict[int, float]:
    """What each token's chance is when only the likeliest are left: `top_k` and their equals, then `top_p` of those."""
    ordered = sorted(scores, key=lambda token: (-scores[token], token))
    weights = {token: math.exp(scores[token]) for token in ordered if scores[token] >= scores[ordered[top_k - 1]]}
    total, kept = sum(weights.values()), {}
    for token, weight in weights.items():
        if sum(kept.values()) < top_p * total:
            kept[token] = weight
    return {token: weight / sum(kept.values()) for token, weight in kept.items()}


@pytest.mark.parametrize("method", [*GUESSED, "medusa", "eagle", "mtp"])
def test_the_distribution_is_that_of_the_model(
    expected: dict[tuple[int, ...], float], method: str, request: pytest.FixtureRequest
):
    """Of texts of four tokens over many seeds. Of the untrained mtp layer no guess need be right."""
    config = {**GUESSED[method], "method": method, "adaptive": False} if method in GUESSED else None
    config = config or request.getfixturevalue("heads")[method]
    with LLM(**{**SETTINGS, "max_num_seqs": 64}, speculative_config=config) as llm:
        params = [SamplingParams(**WISH, seed=seed, max_tokens=4, ignore_eos=True) for seed in range(SEEDS)]
        outputs = llm.generate([TEXT] * SEEDS, params, use_tqdm=False)
        stats = llm._engine.stats()
    assert stats.draft_tokens - stats.accepted_tokens > SEEDS / 4
    assert stats.accepted_tokens > SEEDS / 50 or method == "mtp"
    said = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    assert set(said) <= set(expected), "what is cut off is never said"
    cells = [(said[text], SEEDS * chance) for text, chance in expected.items() if SEEDS * chance >= 5]
    cells.append((SEEDS - sum(count for count, _ in cells), SEEDS - sum(chance for _, chance in cells)))
    distance = sum((count - chance) ** 2 / chance for count, chance in cells)
    freedom = len(cells) - 1
    assert freedom >= 20
    # The 0.9999 quantile, by Wilson and Hilferty; seeds are fixed, so this is no matter of luck.
    assert distance < freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3

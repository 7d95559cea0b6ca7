"""quire bench serve, against a real server: the requests that it makes, its figures, and what it says when they fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from served import Setup, served

from quire.cli.bench import main
from quire.cli.bench_client import Answer
from quire.cli.bench_serve import ServeBenchOptions, figures, make_requests, percentile
from quire.errors import ConfigError, QuireError

SMALL = ["--num-prompts", "12", "--random-input-len", "20", "--random-output-len", "5", "--random-vocab-size", "100"]


def answer(began: float, pieces: list[float], tokens: int) -> Answer:
    return Answer(10, began, pieces, tokens, pieces[-1])


def test_figures() -> None:
    answers = [answer(0.0, [1.0, 1.5, 2.5], 3), answer(1.0, [1.5, 2.0], 2), Answer(10, 0.0, error="status 503")]
    found = figures(answers, 5.0, [99])
    assert found["completed"] == 2 and found["failed"] == 1
    assert found["total_input_tokens"] == 20 and found["total_output_tokens"] == 5
    assert found["request_throughput"] == pytest.approx(0.4) and found["output_throughput"] == pytest.approx(1.0)
    assert found["mean_ttft_ms"] == pytest.approx(750.0) and found["mean_e2el_ms"] == pytest.approx(1750.0)
    assert found["median_itl_ms"] == pytest.approx(500.0) and found["mean_itl_ms"] == pytest.approx(2000 / 3)
    assert found["mean_tpot_ms"] == pytest.approx((750.0 + 500.0) / 2)
    assert found["p99_ttft_ms"] == pytest.approx(995.0)
    assert figures([], 1.0, [99])["p99_itl_ms"] == 0.0


def test_percentiles() -> None:
    times = [float(number) for number in range(101)]
    assert [percentile(times, share) for share in (1, 50, 99.5)] == [1.0, 50.0, 99.5]


def test_requests_are_the_same_for_the_same_seed() -> None:
    options = ServeBenchOptions(num_prompts=50, random_input_len=40, random_range_ratio=0.5, random_prefix_len=7)
    requests = make_requests(options)
    assert requests == make_requests(options)
    assert len({tuple(request.prompt[:7]) for request in requests}) == 1
    lengths = {len(request.prompt) for request in requests}
    assert min(lengths) >= 27 and max(lengths) <= 67 and len(lengths) > 10


@pytest.mark.parametrize("backend", ["openai", "openai-chat"])
def test_against_a_server(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(Setup(keys=("secret",))) as server:
        words = ["serve", "--base-url", server.url, "--api-key", "secret", "--backend", backend, *SMALL]
        words += ["--max-concurrency", "3", "--request-rate", "200", "--save-result", "--save-detailed"]
        assert main([*words, "--result-dir", str(tmp_path), "--result-filename", "found.json"]) == 0
        assert server.figures()["quire:generation_tokens_total"] == 13 * 5  # one of them is the warm-up
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["completed"] == 12 and found["failed"] == 0 and found["total_output_tokens"] == 60
    assert 1 <= found["max_concurrent_requests"] <= 3 and found["model_id"] == "parrot"
    if backend == "openai":
        assert found["total_input_tokens"] == 240
    assert len(found["ttfts"]) == 12 and 0 < found["median_ttft_ms"] <= found["p99_e2el_ms"]
    printed = capsys.readouterr().out
    assert "Successful requests:                                  12" in printed and "P99 TTFT (ms):" in printed


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with served() as server:
        words = ["serve", "--base-url", server.url, *SMALL, "--num-warmups", "0", "--extra-body", '{"top_p": 7}']
        assert main(words) == 1
    printed = capsys.readouterr().out
    assert "Failed requests:                                      12" in printed and "failed: status 400" in printed


def test_mistakes() -> None:
    with pytest.raises(QuireError, match="No OpenAI server answers"):
        main(["serve", "--port", "1"])
    for words in (["--percentile-metrics", "speed"], ["--metric-percentiles", "0"], ["--num-prompts", "0"]):
        with pytest.raises(ConfigError):
            main(["serve", *words])

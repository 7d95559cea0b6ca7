"""The figures of /metrics add up: after every mix of requests they say what was asked, made and ended."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import TOKENIZER, Running, Setup, served

from counting import calls
from quire.core.stats import Stats
from quire.engine.metrics import Histogram, Metrics, token_bounds
from quire.engine.observe import FinishedRequest, StepFigures

NAMES = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries prefix_cache_hits num_preemptions
prompt_tokens prompt_tokens_cached generation_tokens request_success request_prompt_tokens request_generation_tokens
iteration_tokens_total request_params_n request_params_max_tokens time_to_first_token_seconds inter_token_latency_seconds
request_time_per_output_token_seconds e2e_request_latency_seconds request_queue_time_seconds
request_inference_time_seconds request_prefill_time_seconds request_decode_time_seconds
request_prefill_kv_computed_tokens
"""


def test_every_name_is_there_and_prometheus_can_read_it() -> None:
    with served() as server:
        response = server.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    families = {family.name: family for family in text_string_to_metric_families(response.text)}
    for name in NAMES.split():
        samples = families["quire:" + name].samples
        assert all(sample.labels["model_name"] == "parrot" and sample.labels["engine"] == "0" for sample in samples)


def test_answers_are_counted_by_route() -> None:
    with served() as server:
        server.client.completions.create(model="", prompt="x|")
        server.http.post("/v1/completions", json={})
        server.http.get("/v1/models/parrot")
        server.http.get("/made/up/by/a/client")
        server.http.get("/health")
        text = server.http.get("/metrics").text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0' in text
    assert 'http_requests_total{handler="/v1/models/{name:path}",method="GET",status="2xx"} 1.0' in text
    assert 'http_requests_total{handler="none",method="GET",status="4xx"} 1.0' in text
    assert 'http_request_duration_seconds_count{handler="/v1/completions",method="POST"} 2.0' in text
    assert 'handler="/health"' not in text and "made" not in text


def test_a_server_without_metrics_says_so() -> None:
    with served() as server:
        server.service.registry = None
        assert server.http.get("/metrics").status_code == 404


def test_the_figures_add_up() -> None:
    """iteration tokens = prompt + generated; one latency between each two tokens of a completion; one ending each."""
    numbers, length = [*range(12), 11], 9
    with served() as server:

        def ask(number: int) -> None:
            server.client.completions.create(model="", prompt=f"{number} {'y' * number}|", max_tokens=length, n=2)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, numbers[:-1]))
        ask(numbers[-1])
        server.wait_idle()
        figures = server.figures()
    completions = 2 * len(numbers)
    prompt = sum(2 * len(TOKENIZER.encode(f"{number} {'y' * number}|")) for number in numbers)
    assert figures["quire:generation_tokens_total"] == completions * length
    assert figures["quire:prompt_tokens_total"] == prompt
    assert figures["quire:iteration_tokens_total_sum"] == prompt + completions * length
    assert figures["quire:inter_token_latency_seconds_count"] == completions * (length - 1)
    assert figures["quire:time_to_first_token_seconds_count"] == completions
    assert figures["quire:e2e_request_latency_seconds_count"] == completions
    assert figures["quire:request_success_total{finished_reason=length}"] == completions
    assert figures["quire:request_generation_tokens_sum"] == completions * length
    assert figures["quire:request_prompt_tokens_sum"] == prompt
    assert figures["quire:request_params_n_sum"] == 2 * completions
    assert figures["quire:request_params_max_tokens_sum"] == completions * length
    assert figures["quire:prompt_tokens_cached_total"] > 0
    assert figures["quire:num_requests_running"] == figures["quire:num_requests_waiting"] == 0
    assert figures["quire:kv_cache_usage_perc"] == 0
    parts = [figures[f"quire:request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
    assert sum(parts) == pytest.approx(figures["quire:e2e_request_latency_seconds_sum"], rel=0.2, abs=0.05)


def reasons(server: Running) -> dict[str, float]:
    server.wait_idle()
    figures = server.figures()
    return {
        reason: figures[f"quire:request_success_total{{finished_reason={reason}}}"]
        for reason in ("stop", "length", "abort", "error")
    }


def test_every_ending_is_counted_once() -> None:
    with served(Setup(delay=0.02)) as server:
        create = server.client.completions.create
        create(model="", prompt="say:x;|")
        create(model="", prompt="x|", stop="c")
        assert reasons(server) == {"stop": 2, "length": 0, "abort": 0, "error": 0}
        create(model="", prompt="x|")
        server.http.post("/v1/completions", json={"prompt": "crash;|"})
        stream = create(model="", prompt="x|", max_tokens=400, stream=True)
        next(iter(stream))
        assert server.figures()["quire:num_requests_running"] == 1
        assert server.figures()["quire:kv_cache_usage_perc"] > 0
        stream.close()
        assert reasons(server) == {"stop": 2, "length": 1, "abort": 1, "error": 1}


def test_a_histogram_is_right_at_its_bounds() -> None:
    histogram = Histogram((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 5, 6):
        histogram.add(value)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 4.0), ("5.0", 5.0), ("+Inf", 6.0)]
    assert histogram.total == 16
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)


def test_adding_up_is_cheap() -> None:
    """A step of 256 requests costs the engine's thread a few calls for each."""
    metrics = Metrics("m", 32768)
    finished = FinishedRequest("stop", 100, 10, 0, 1, 16, 1.0, 0.1, 0.1, 0.8)
    figures = StepFigures(0, 0, 256, (), {0.02: 256}, (finished,) * 4)
    assert calls(lambda: metrics.observe(Stats(), figures)) < 4 * 256

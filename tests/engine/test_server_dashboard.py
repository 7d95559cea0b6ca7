"""The dashboard asks for metrics that there are, under either prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from served import Running, Setup, served

from quire.config import EngineOptions, ServeOptions
from quire.errors import ConfigError
from quire.serve.admin import with_prefix
from quire.serve.run import run_server

DASHBOARD = json.loads((Path(__file__).parent.parent.parent / "deploy" / "grafana.json").read_text())


@pytest.fixture(scope="module", params=["quire", "vllm"])
def server(request: pytest.FixtureRequest) -> Iterator[Running]:
    with served(Setup(options=ServeOptions(metrics_prefix=request.param))) as running:
        running.client.completions.create(model="", prompt="say:hello;|")
        running.wait_idle()
        yield running


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def samples(server: Running) -> dict[str, set[str]]:
    """Names of all samples with the names of their labels."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_query_finds_its_metrics(server: Running) -> None:
    known, asked = samples(server), 0
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("${prefix}", server.service.options.metrics_prefix)
            for name, labels in re.findall(r"((?:quire:|vllm:|http_)[a-z0-9_]+)(?:\{([^}]*)\})?", query):
                asked += 1
                assert name in known, f"{panel['title']} asks for {name}"
                assert set(re.findall(r"(\w+)=", labels)) <= known[name]
            for group in re.findall(r"by \(([^)]*)\)", query):
                assert set(group.split(", ")) <= set.union(*known.values())
    assert asked > 30


def test_panels_do_not_lie_on_each_other() -> None:
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        grid = panel["gridPos"]
        own = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
        assert not own & places and max(x for x, _ in own) < 24
        places |= own
    identities = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identities)) == len(identities)


def test_the_names_that_dashboards_for_vllm_use() -> None:
    with served(Setup(options=ServeOptions(metrics_prefix="vllm"))) as server:
        server.client.completions.create(model="", prompt="say:hello;|")
        server.wait_idle()
        known = samples(server)
        assert [name for name in known if name.startswith("quire:")], "the names of this engine stay"
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prefix_cache_queries_total",
            "prefix_cache_hits_total",
            "num_preemptions_total",
            "prompt_tokens_total",
            "generation_tokens_total",
            "request_success_total",
            "time_to_first_token_seconds_bucket",
            "inter_token_latency_seconds_bucket",
            "e2e_request_latency_seconds_bucket",
            "request_queue_time_seconds_sum",
            "request_prefill_time_seconds_sum",
            "request_decode_time_seconds_sum",
            "request_prompt_tokens_bucket",
            "request_generation_tokens_bucket",
            "iteration_tokens_total_bucket",
        ):
            assert f"vllm:{name}" in known


def test_only_names_get_a_second_prefix() -> None:
    text = b'# HELP quire:x about quire:x\n# TYPE quire:x gauge\nquire:x{model="quire:x"} 1.0\nhttp_quire:y 2\n'
    expected = b'# HELP vllm:x about quire:x\n# TYPE vllm:x gauge\nvllm:x{model="quire:x"} 1.0\n'
    assert with_prefix(text, "vllm") == text + expected and with_prefix(text, "quire") == text


def test_a_prefix_that_prometheus_cannot_read() -> None:
    for prefix in ("", "a b", "x:", "9", "a-b"):
        with pytest.raises(ConfigError, match="metrics-prefix"):
            run_server(EngineOptions(), ServeOptions(port=0, metrics_prefix=prefix))

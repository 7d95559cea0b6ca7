"""The comparison with other engines: its arithmetic, its verdicts, and how it tells a disturbed run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from bench.cpu import compare, limits, plot, quiet, table  # noqa: E402
from bench.cpu.ceilings import Ceilings, mean  # noqa: E402
from bench.cpu.checkpoint import tensors_of, write_weights  # noqa: E402
from bench.cpu.compare import Contender, contenders, rotated  # noqa: E402
from bench.cpu.engines.session import EngineFailed, LineSession, last_reason  # noqa: E402
from bench.cpu.place import Place  # noqa: E402
from bench.cpu.results import Record, figure_of, figures_of, row_of  # noqa: E402
from bench.cpu.store import open_store  # noqa: E402
from bench.cpu.workloads import ENGINES, LLAMA, QWEN, VARIANTS, WORKLOADS, Workload, chosen, weight_count  # noqa: E402

MACHINE = Ceilings(0.0, 2, 50e9, 500e9, 1000e9, 2000e9, "avx512-bf16", "avx512-vnni")


def workload(name: str) -> Workload:
    return next(one for one in WORKLOADS if one.name == name)


def record(name: str, engine: str, value: float | None, **more: object) -> Record:
    variant = more.pop("variant", None) or VARIANTS[engine, workload(name).precision][0]
    return Record(name, engine, str(variant), 0, 0, value=value, ceilings=MACHINE, **more)  # type: ignore[arg-type]


def row(name: str, *records: Record) -> object:
    return row_of(workload(name), figures_of(records))


# ---------------------------------------------------------------- workloads


def test_workloads_are_complete() -> None:
    names = [one.name for one in WORKLOADS]
    assert len(set(names)) == len(names)
    for one in WORKLOADS:
        assert set(one.engines) <= set(ENGINES)
        assert all((engine, one.precision) in VARIANTS for engine in one.engines)
        assert all(variant in limits.BITS for engine in one.engines for variant in VARIANTS[engine, one.precision])


def test_quick_versions_are_smaller() -> None:
    for one, small in zip(chosen(None, False), chosen(None, True), strict=True):
        assert one.name == small.name
        assert small.requests * (small.input_len + small.output_len) <= one.requests * (one.input_len + one.output_len)


def test_workloads_are_chosen_by_a_part_of_their_name() -> None:
    assert [one.name for one in chosen(["1b-int8"], False)] == ["1b-int8-decode", "1b-int8-prefill", "1b-int8-batch"]
    with pytest.raises(ValueError, match="'2b'.*1b-bf16-decode"):
        chosen(["2b"], False)


def test_workloads_of_one_model_share_a_process_but_starts_do_not() -> None:
    assert workload("1b-bf16-decode").group == workload("1b-bf16-batch").group == workload("1b-memory").group
    assert len({workload(name).group for name in ("1b-bf16-decode", "1b-start", "1b-restart")}) == 3


def test_sizes_of_the_shapes() -> None:
    assert sum(weight_count(LLAMA)) == pytest.approx(1.2358e9, rel=1e-3)
    assert sum(weight_count(QWEN)) == pytest.approx(0.596e9, rel=1e-2)
    assert len(tensors_of(QWEN)) == 2 + 28 * 11


# ---------------------------------------------------------------- limits


def test_decoding_is_bound_by_bandwidth() -> None:
    one = workload("1b-bf16-decode")
    best = limits.best_seconds(one, "bf16", MACHINE)
    assert best is not None
    assert best == pytest.approx(one.output_len * 2 * sum(weight_count(LLAMA)) / MACHINE.read, rel=0.02)


def test_prompts_are_bound_by_arithmetic() -> None:
    one = workload("1b-int8-prefill")
    best = limits.best_seconds(one, "int8", MACHINE)
    assert best is not None
    least = 2 * weight_count(LLAMA)[0] * 8 * 1024 / MACHINE.int8
    assert least < best < 1.2 * least
    assert limits.seconds_of(one, 8 * 1024 / best) == pytest.approx(best)


def test_a_shared_beginning_is_computed_once() -> None:
    shared = limits.best_seconds(workload("0.6b-shared"), "bf16", MACHINE)
    assert shared is not None
    alone = 2 * weight_count(QWEN)[0] * 32 * 1088 / MACHINE.bf16
    assert shared < 0.5 * alone


def test_what_is_not_about_speed_has_no_limit() -> None:
    assert limits.best_seconds(workload("1b-memory"), "bf16", MACHINE) is None


# ---------------------------------------------------------------- quiet or not


def test_a_process_with_a_strange_name() -> None:
    fields = ["S", "7", *["0"] * 9, "100", "50", "30", "20", *["0"] * 6, "3"]
    process = quiet.parse_process("42 (a) b (c) " + " ".join(fields))
    assert (process.pid, process.parent) == (42, 7)
    assert process.seconds == pytest.approx(200 * quiet.TICK)
    assert process.resident == 3 * quiet.PAGE


def test_the_machine_counts_what_the_hypervisor_takes() -> None:
    assert quiet.parse_machine("cpu  1 2 3 900 900 4 5 6 0 0\ncpu0 ...") == pytest.approx(21 * quiet.TICK)


def test_a_family_is_all_that_descends() -> None:
    everyone = {pid: quiet.Process(pid, parent, 1.0, 0) for pid, parent in ((1, 0), (2, 1), (3, 2), (4, 1), (5, 3))}
    assert {process.pid for process in quiet.family(everyone, 2)} == {2, 3, 5}


def test_others_are_what_is_not_ours() -> None:
    before = quiet.Snapshot(10.0, 100.0, 50.0)
    assert quiet.others_between(before, quiet.Snapshot(20.0, 121.0, 70.0)) == pytest.approx(0.1)
    assert quiet.others_between(before, quiet.Snapshot(20.0, 119.0, 70.0)) == 0  # clocks differ by a tick


def test_what_disturbs() -> None:
    assert quiet.disturbance(0.05, 0.1, 0.15) is None
    assert "0.30 of a core" in str(quiet.disturbance(0.3, 0.0, 0.15))
    assert "40%" in str(quiet.disturbance(0.0, 0.4, 0.15))


def test_the_limits_before_and_after() -> None:
    slow = Ceilings(1.0, 2, 40e9, 500e9, 1000e9, 2000e9, "", "")
    assert MACHINE.differ(slow) == pytest.approx(0.2)
    assert mean([MACHINE, slow]).read == pytest.approx(45e9)


def test_this_process_is_seen() -> None:
    start = quiet.snapshot()
    while quiet.snapshot().ours - start.ours < 5 * quiet.TICK:
        sum(range(100_000))
    assert quiet.peak_memory(next(iter(quiet.family(quiet.processes(), 1))).pid) >= 0


# ---------------------------------------------------------------- figures and verdicts


def test_disturbed_runs_are_thrown_away() -> None:
    runs = [record("1b-bf16-decode", "quire", value) for value in (20.0, 22.0, 24.0)]
    runs.append(record("1b-bf16-decode", "quire", 2.0, disturbed="others"))
    figure = figure_of("bf16", runs)
    assert (figure.value, figure.runs, figure.disturbed) == (22.0, 3, False)
    assert figure.spread == pytest.approx(4 / 22)


def test_only_disturbed_runs_are_shown_as_such() -> None:
    figure = figure_of("bf16", [record("1b-bf16-decode", "quire", 2.0, disturbed="others")])
    assert (figure.value, figure.disturbed) == (2.0, True)


def test_a_disturbed_figure_reaches_nothing() -> None:
    ours = record("1b-int8-decode", "quire", 90.0)
    assert row("1b-int8-decode", ours, record("1b-int8-decode", "llama.cpp", 30.0)).verdict == "reached"
    peer = record("1b-int8-decode", "llama.cpp", 30.0, disturbed="others")
    assert row("1b-int8-decode", ours, peer).verdict == "disturbed"


def test_a_failure_has_a_reason() -> None:
    found = row("1b-int4-decode", record("1b-int4-decode", "vllm", None, failed="no such kernel"))
    assert table.failures([found]) == ["1b-int4-decode, vllm GPTQ: failed: no such kernel"]
    assert "failed" in table.as_text([found])
    assert found.verdict == "-"


def test_the_best_variant_of_a_peer_counts() -> None:
    found = row(
        "1b-int4-decode",
        record("1b-int4-decode", "quire", 80.0),
        record("1b-int4-decode", "quire", 60.0, variant="int4-g32"),
        record("1b-int4-decode", "vllm", None, failed="no"),
        record("1b-int4-decode", "llama.cpp", 40.0),
        record("1b-int4-decode", "llama.cpp", 50.0, variant="Q4_K_M"),
    )
    assert found.ratio == pytest.approx(1.6)
    assert found.verdict == "reached"
    text = table.as_text([found])
    assert "50 Q4_K_M" in text and "80; 60 int4-g32" in text


@pytest.mark.parametrize(("value", "verdict"), [(19.9, "reached"), (18.0, "not reached")])
def test_bandwidth_must_be_used_and_both_peers_beaten(value: float, verdict: str) -> None:
    found = row(
        "1b-bf16-decode",
        record("1b-bf16-decode", "quire", value),
        record("1b-bf16-decode", "llama.cpp", 15.0),
        record("1b-bf16-decode", "vllm", 10.0),
    )
    assert found.verdict == verdict


def test_an_aim_may_name_one_peer() -> None:
    runs = [record("1b-bf16-prefill", engine, value) for engine, value in zip(ENGINES, (120, 100, 200), strict=True)]
    found = row("1b-bf16-prefill", *runs)
    assert found.verdict == "reached"
    assert found.ratio == pytest.approx(0.6)
    assert row("1b-bf16-prefill", runs[0], runs[2]).verdict == "-"


def test_less_time_is_better() -> None:
    runs = (record("0.6b-shared", "quire", 5.0), record("0.6b-shared", "vllm", 8.0))
    assert row("0.6b-shared", *runs).verdict == "not reached"
    assert row("0.6b-shared", record("0.6b-shared", "quire", 4.0), runs[1]).verdict == "reached"


def test_memory_packages_and_perplexity() -> None:
    assert row("1b-memory", record("1b-memory", "quire", 7.4)).verdict == "reached"
    assert row("1b-memory", record("1b-memory", "quire", 7.9)).verdict == "not reached"
    sizes = [record("environment", engine, value) for engine, value in (("quire", 1.0), ("vllm", 3.0))]
    assert row("environment", *sizes).verdict == "-"  # nobody counted the packages
    counted = record("environment", "quire", 1.0, details={"packages": 59})
    assert row("environment", counted, sizes[1]).verdict == "reached"
    plain = record("perplexity-bf16", "quire", 40.0)
    runs = (
        plain,
        record("perplexity-int4", "quire", 42.0),
        record("perplexity-int4", "quire", 42.0, variant="int4-g32"),
    )
    assert [part.reached for part in row("perplexity-int4", *runs).parts] == [True, False]


# ---------------------------------------------------------------- order, files, processes


def test_every_engine_comes_first_once() -> None:
    group = contenders(workload("1b-int4-decode"), list(ENGINES))
    assert [item.variant for item in group] == ["int4", "int4-g32", "GPTQ", "Q4_0", "Q4_K_M"]
    assert {rotated(group, by)[0] for by in range(len(group))} == set(group)
    assert rotated([], 3) == []
    assert Contender("quire", "int4") in group


def test_records_survive_and_machines_are_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "figures.json"
    store = open_store(path, "a machine", False, "abc")
    store.add(record("1b-bf16-decode", "quire", 20.123456, samples=(20.1, 20.2), details={"packages": 3}))
    store.add(record("1b-int4-decode", "vllm", None, failed="no such kernel"))
    again = open_store(path, "a machine", False, "def")
    assert [one.value for one in again.records] == [20.123, None]
    assert again.records[0].ceilings == MACHINE
    assert again.records[0].commit == "abc"
    assert json.loads(path.read_text())["quick"] is False
    for machine, quick in (("another", False), ("a machine", True)):
        with pytest.raises(ValueError, match="--json"):
            open_store(path, machine, quick, "abc")


def test_points_of_the_picture() -> None:
    figures = figures_of([record("1b-bf16-decode", "quire", 20.0), record("1b-memory", "quire", 5.0)])
    points = plot.points_of(WORKLOADS, figures)
    assert [(point.workload, point.engine) for point in points] == [("1b-bf16-decode", "quire")]
    assert points[0].intensity == pytest.approx(1.0, rel=0.02)  # two operations for each two-byte weight
    assert points[0].rate == pytest.approx(20 * 2 * sum(weight_count(LLAMA)), rel=0.02)


def test_a_checkpoint_can_be_read(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    write_weights(path, {"a": (6, 10), "norm": (4,)})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").shape == (6, 10)
        assert 0 < file.get_tensor("a").float().abs().max() < 0.2
        assert file.get_tensor("norm").tolist() == [1, 1, 1, 1]


def runner(code: str, tmp_path: Path, limit: float = 20) -> LineSession:
    place = Place(tmp_path, tmp_path, 1, limit, limit)
    return LineSession([sys.executable, "-c", code], {}, tmp_path / "runner.log", place)


def test_a_runner_answers_line_by_line(tmp_path: Path) -> None:
    code = "import sys; print('{}', flush=True); [print('{\"value\": 3, \"samples\": [3]}', flush=True) for _ in sys.stdin]"
    session = runner(code, tmp_path)
    assert [session.run(workload("tiny-batch")).value for _ in range(2)] == [3, 3]
    session.close()
    assert session.process is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no kernel for this processor')", "RuntimeError: no kernel for this processor"),
        ('print(\'{"error": "out of memory"}\')', "out of memory"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_runner_that_fails_says_why(code: str, reason: str, tmp_path: Path) -> None:
    session = runner(code, tmp_path, limit=1 if "sleep" in code else 60)
    with pytest.raises(EngineFailed, match=reason):
        session.run(workload("tiny-batch"))
    session.close()


def test_the_cause_is_found_in_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "INFO all is well\n"
        "(Worker pid=1) ERROR 11-21 02:24:42 [x.py:1] AttributeError: no attribute 'gemm'\n"
        "(EngineCore pid=2) ERROR 11-21 02:24:42 [core.py:9] RuntimeError: Worker failed, see stack trace above\n"
        "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
        "bye\n"
    )
    assert last_reason(log) == "AttributeError: no attribute 'gemm'"
    assert last_reason(tmp_path / "none") == "no log"


def test_the_command_needs_no_engine_to_say_what_it_can(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare.py", "--list"])
    assert compare.main() == 0
    assert "1b-int8-prefill" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare.py", "--workloads", "nothing"])
    assert compare.main() == 2
    assert "No workload has 'nothing'" in capsys.readouterr().err

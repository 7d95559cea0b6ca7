"""Choosing the library, its threads, and what happens where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.errors import ConfigError
from quire.kernels import reference
from quire.kernels.cpu import CpuOps, native, ops
from quire.kernels.table import Ops, load_ops, ops_of
from quire.kernels.threads import cgroup_cpus, usable_cpus

built = pytest.mark.skipif("plain" not in native.built_levels(), reason="the native library is not built")


@built
def test_the_best_level_is_chosen_and_a_lower_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QUIRE_CPU_LEVEL", raising=False)
    assert native.choose_level() == native.machine_level()
    monkeypatch.setenv("QUIRE_CPU_LEVEL", "plain")
    assert native.choose_level() == "plain"
    assert isinstance(load_ops("cpu").linear.__self__, CpuOps)


@built
def test_impossible_levels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CPU_LEVEL", "avx9")
    with pytest.raises(ConfigError, match="plain, avx2, avx512, avx512bf16"):
        native.choose_level()
    monkeypatch.setenv("QUIRE_CPU_LEVEL", "avx512bf16")
    monkeypatch.setattr(native, "machine_level", lambda: "avx2")
    with pytest.raises(ConfigError, match="cannot run"):
        native.choose_level()


def test_without_a_library_plain_pytorch_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    assert ops.load() is reference
    assert "not built" in caplog.text
    assert ops_of(ops.load()).linear is reference.linear


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(ConfigError, match="Choose one of: cpu, cuda"):
        load_ops("meta")


def test_thread_count_honours_the_cgroup(tmp_path: Path) -> None:
    assert cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cgroup_cpus(tmp_path) == 2
    assert usable_cpus(tmp_path) <= 2
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cgroup_cpus(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("400000\n")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_cpus(tmp_path) == 4
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    assert cgroup_cpus(tmp_path) is None


@built
def test_default_threads_stay_within_the_affinity_mask() -> None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert 1 <= native.default_threads() <= allowed


def some_work(ops: Ops) -> list[torch.Tensor]:
    """Ops that are large enough to wake the team."""
    torch.manual_seed(3)
    packed = ops.pack_linear(torch.randn(600, 500), None)
    x = torch.randn(40, 500)
    return [
        ops.linear(x, packed),
        ops.rms_norm(torch.randn(300, 500), torch.randn(500), 1e-6, "plus_one"),
        ops.argmax(torch.randn(50, 3000)),
    ]


@built
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_a_team_gives_the_same_bits(threads: int) -> None:
    """Threads against one thread; the team is begun and ended on the way, and may be larger than the machine."""
    level = native.choose_level()
    alone = some_work(ops_of(CpuOps(level, threads=1)))
    team = CpuOps(level, threads=threads)
    for _ in range(3):
        for got, want in zip(some_work(ops_of(team)), alone, strict=True):
            assert torch.equal(got, want)
        team._lib.set_threads(2)
    team._lib.set_threads(1)


@built
def test_importing_the_table_loads_no_library() -> None:
    code = "import quire.kernels, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@built
def test_the_ceilings_are_plausible() -> None:
    library = native.Library(native.choose_level())
    library.set_threads(1)
    assert 1e8 < library.read_bandwidth(megabytes=64) < 1e13
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        assert 1e8 < library.multiply_rate(100_000, dtype) < 1e14

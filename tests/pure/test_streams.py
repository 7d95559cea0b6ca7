"""Streams that are closed, full or read by nobody; no home, no /proc, no place for what shall be remembered."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quire import env
from quire.kernels.memory import cpu_memory
from quire.models.files.remembered import recall, remember


def shell(script: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which `quire` is the command."""
    line = f'quire() {{ {sys.executable} -m quire.cli.main "$@"; }}; {script}'
    return subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("quire --help | true; quire --help 2>&1 >/dev/null | cat", 0),
        ("quire --help >/dev/full 2>&1", 1),
        ("quire --version 2>/dev/full", 0),
        ("quire --version <&- >&- 2>&-", 0),
        ("quire serve --prot 1 2>/dev/full", 2),
    ],
)
def test_streams_that_take_nothing(script: str, status: int) -> None:
    found = shell(script)
    assert found.returncode == status and "Traceback" not in found.stderr and "ignored" not in found.stderr


def test_a_full_disk_is_told() -> None:
    found = shell("quire --help >/dev/full")
    assert found.stderr == "quire: [Errno 28] No space left on device\n"


def test_closed_streams_are_held_open_for_children_too() -> None:
    child = "import os; os.fstat(0), os.fstat(1), os.fstat(2); os.write(1, b'x')"
    program = (
        "import subprocess, sys; from quire import env; env.open_closed_streams(); "
        f"sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    )
    found = subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', program], timeout=60)
    assert found.returncode == 0


def test_a_user_without_a_home_remembers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("QUIRE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(OSError, match="Not a directory"):
        env.cache_folder().mkdir(parents=True)


def test_a_machine_without_proc_knows_its_memory() -> None:
    plain, without = cpu_memory(), cpu_memory(meminfo=Path("/nowhere/meminfo"))
    assert abs(plain.total - without.total) < plain.total / 10 and 0 < without.free <= without.total


def test_what_cannot_be_remembered_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    remember(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] and recall(tmp_path / "folder") is None
    remember(tmp_path / "file", "text")
    assert recall(tmp_path / "file") == "text"

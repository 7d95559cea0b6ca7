"""Packed weights on disk: a second start has the very same weights, and no damage to a file ever does harm."""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from quire.cli.compare import run_served
from quire.config import EngineOptions
from quire.engine import prefetch
from quire.kernels.memory import AHEAD
from quire.kernels.table import Ops, load_ops
from quire.kernels.weights import KeptLinear
from quire.models.build import build_model
from quire.models.weights import packed_file
from quire.models.weights.packed_cache import PackedCache, packed_cache
from quire.models.weights.packed_file import PackedFile, write_packed
from quire.resolve import EngineConfig, resolve

CPU = torch.device("cpu")
IDS = [[5, 9, 200, 31, 7, 64]]

pytestmark = pytest.mark.skipif(load_ops("cpu").packed_layout() is None, reason="the native library is not built")


class Counting:
    """Ops that count how often a weight was really packed."""

    def __init__(self) -> None:
        self.count = 0
        ops = load_ops("cpu")

        def counted(pack):  # type: ignore[no-untyped-def]
            def run(*arguments):  # type: ignore[no-untyped-def]
                self.count += 1
                return pack(*arguments)

            return run

        self.ops: Ops = replace(ops, pack_linear=counted(ops.pack_linear), round_linear=counted(ops.round_linear))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def config_of(folder: Path, impl: str = "native", method: str | None = None, **options: object) -> EngineConfig:
    values = {
        "model": str(folder),
        "model_impl": impl,
        "quantization": method,
        "dtype": "bfloat16",
        "packed_cache": "on",
    }
    return resolve(EngineOptions.from_flat({**values, **options}))


def start(config: EngineConfig) -> tuple[torch.Tensor, int]:
    """The logits of a freshly loaded model, and how many weights it packed. Waits until the file is written."""
    counting = Counting()
    served = build_model(config.files, config.options.model, config.dtype, CPU, counting.ops)
    for thread in threading.enumerate():
        if thread.name == "packed-cache":
            thread.join()
    return run_served(served, config, IDS, None).logits[0], counting.count


def packed_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.packed"))


@pytest.mark.parametrize(
    ("kind", "impl", "method"),
    [
        ("qwen2", "native", None),  # biases, merged siblings, tied head
        ("qwen2", "transformers", "int8"),
        ("llama", "native", "int4-g32-zp"),
        ("qwen3_moe", "native", "int4-keep-head"),  # experts and routers
        ("qwen3_moe", "transformers", "int4-g32"),
    ],
)
def test_the_second_start_packs_nothing(
    tmp_path: Path, cache_folder: Path, kind: str, impl: str, method: str | None
) -> None:
    config = config_of(write_tiny(tmp_path / "model", kind), impl, method)
    first, packed = start(config)
    assert packed > 0 and len(packed_files(cache_folder)) == 1
    written = packed_files(cache_folder)[0].stat().st_ino
    second, packed_again = start(config)
    assert packed_again == 0
    assert torch.equal(first, second)
    assert packed_files(cache_folder)[0].stat().st_ino == written


def test_what_may_differ_has_a_file_of_its_own(tmp_path: Path, cache_folder: Path) -> None:
    folder = write_tiny(tmp_path / "model")
    start(config_of(folder))
    for config in (
        config_of(folder, method="int8"),
        config_of(folder, "transformers"),
        config_of(folder, dtype="float32"),
    ):
        assert start(config)[1] > 0
    assert len(packed_files(cache_folder)) == 4


def test_changed_weights_are_packed_again(tmp_path: Path, cache_folder: Path) -> None:
    """By the identity of the file; and where that was forged, by the values themselves."""
    folder = write_tiny(tmp_path / "model")
    start(config_of(folder))
    weights = folder / "model.safetensors"
    stat = weights.stat()
    tensors = load_file(weights)
    tensors["model.layers.1.self_attn.k_proj.weight"] *= -1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert start(config_of(folder))[1] > 1
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed, packed = start(config_of(folder))
    assert packed == 1  # only the matrix that has the changed part
    assert torch.equal(changed, start(config_of(folder, packed_cache="off"))[0])
    assert start(config_of(folder))[1] == 0  # and it was written anew


INSIDE = packed_file.FIRST + 100
DAMAGES = {
    "cut off": lambda raw: raw[: len(raw) // 2],
    "cut in the header": lambda raw: raw[:60],
    "empty": lambda raw: b"",
    "another file": lambda raw: b"\x80\x04pickle" + raw[9:],
    "a byte of the header": lambda raw: raw[:100] + bytes([raw[100] ^ 1]) + raw[101:],
    "a byte of the panels": lambda raw: raw[:INSIDE] + bytes([raw[INSIDE] ^ 64]) + raw[INSIDE + 1 :],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen_and_mended(
    tmp_path: Path, cache_folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(write_tiny(tmp_path / "model"), method="int8")
    want, packed_first = start(config)
    path = packed_files(cache_folder)[0]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    found, packed = start(config)
    assert torch.equal(found, want)
    assert 0 < packed <= packed_first
    assert str(path) in caplog.text
    assert start(config)[1] == 0


def test_a_file_that_others_may_write_is_not_used(tmp_path: Path, cache_folder: Path) -> None:
    config = config_of(write_tiny(tmp_path / "model"))
    start(config)
    packed_files(cache_folder)[0].chmod(0o666)
    assert start(config)[1] > 0


# ---------------------------------------------------------------- files


def some_linear(rows: int = 32) -> KeptLinear:
    ops = load_ops("cpu")
    kept = ops.take_apart(ops.pack_linear(torch.randn(rows, 64), torch.randn(rows)))
    assert kept is not None
    return kept


def write(path: Path, limit: int = 1 << 30, linears: int = 3) -> int:
    return write_packed(path, [(str(i), some_linear()) for i in range(linears)], load_ops("cpu").checksum, limit)


def test_the_file_has_what_was_written(tmp_path: Path) -> None:
    checksum, linear = load_ops("cpu").checksum, some_linear(40)
    nbytes = write_packed(tmp_path / "a.packed", [("first", linear)], checksum, 1 << 30)
    assert (tmp_path / "a.packed").stat().st_size == nbytes
    assert (tmp_path / "a.packed").stat().st_mode & 0o777 == 0o600
    found = PackedFile.open(tmp_path / "a.packed", checksum)
    assert found is not None
    assert found.entry(0, "second") is None and found.entry(1, "first") is None
    back = found.entry(0, "first")
    assert back is not None and back.bias is not None and linear.bias is not None
    assert torch.equal(back.data, linear.data) and torch.equal(back.bias, linear.bias)
    assert back.data.data_ptr() % 4096 == 0
    assert (back.out_features, back.in_features, back.dtype) == (40, 64, torch.float32)


def test_only_one_process_writes(tmp_path: Path) -> None:
    with (tmp_path / "a.part").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert write(tmp_path / "a.packed") == 0
        assert (tmp_path / "a.part").exists()
    assert write(tmp_path / "a.packed") > 0  # what a process left that died is taken over
    assert not (tmp_path / "a.part").exists()


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    sizes = {name: write(tmp_path / f"{name}.packed") for name in ("a", "b", "c")}
    for age, name in enumerate(("b", "c", "a")):
        os.utime(tmp_path / f"{name}.packed", (1000.0 + age, 1000.0 + age))
    assert PackedFile.open(tmp_path / "b.packed", load_ops("cpu").checksum) is not None  # used: now the youngest
    assert write(tmp_path / "d.packed", limit=3 * sizes["a"]) > 0
    assert {path.stem for path in packed_files(tmp_path)} == {"a", "b", "d"}
    assert write(tmp_path / "e.packed", limit=sizes["a"] - 1) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.packed", "b.packed", "d.packed"}


def test_a_full_disk_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "SPARE_DISK", 1 << 60)
    assert write(tmp_path / "a.packed") == 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "file"))
    assert start(config_of(write_tiny(tmp_path / "model")))[1] > 0
    assert "are not kept" in caplog.text or "cannot be used" in caplog.text


def test_large_panels_may_lie_in_huge_pages() -> None:
    """Aligned, and in private memory: a shared mapping gets none."""
    packed = load_ops("cpu").pack_linear(torch.randn(2048, 512), None)
    address = packed.data.data_ptr()
    assert address % (2 << 20) == 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, kind = line.split()[:2]
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            assert kind.endswith("p")


# ---------------------------------------------------------------- what is kept


def test_by_default_only_what_takes_long_is_kept(tmp_path: Path, cache_folder: Path) -> None:
    folder = write_tiny(tmp_path / "model")

    def cache(method: str | None, wanted: str) -> PackedCache | None:
        config = config_of(folder, method=method, packed_cache=wanted)
        return packed_cache(config.files, config.options.model, "native", config.dtype, load_ops("cpu"))

    assert cache(None, "auto") is None and cache("int8", "off") is None
    assert cache(None, "on") is not None and cache("int8", "auto") is not None
    start(config_of(folder, method="int8", packed_cache="auto"))
    assert not packed_files(cache_folder)  # too small to matter


def begin_ahead(config: EngineConfig) -> None:
    """What happens before torch is imported, with all of the file read."""
    prefetch.begin(config.options)
    for thread in threading.enumerate():
        if thread.name == "memory":
            thread.join()


def test_the_file_is_read_ahead(tmp_path: Path) -> None:
    config = config_of(write_tiny(tmp_path / "model", "qwen2", tokenizer=False), skip_tokenizer_init=True, device="cpu")
    expected, _ = start(config)
    begin_ahead(config)
    begun = AHEAD._memory
    assert begun is not None
    found, packed = start(config)
    assert packed == 0 and torch.equal(found, expected)
    assert AHEAD._memory is None, "the load took over the mapping"


def test_a_note_of_another_file_does_no_harm(tmp_path: Path, cache_folder: Path) -> None:
    folder = write_tiny(tmp_path / "model", "qwen2", tokenizer=False)
    config = config_of(folder, skip_tokenizer_init=True, device="cpu")
    other = config_of(folder, method="int8", skip_tokenizer_init=True, device="cpu")
    expected = start(config)[0]
    start(other)
    notes = {note: note.read_text() for note in cache_folder.glob("*.last")}
    assert len(notes) == 2
    for note, name in zip(notes, reversed(notes.values()), strict=True):
        note.write_text(name)
    begin_ahead(config)
    found, packed = start(config)
    assert packed == 0 and torch.equal(found, expected)
    AHEAD.give_back()
    for note in notes:
        note.write_text("../../model/model.safetensors")
    begin_ahead(config)
    assert AHEAD._memory is None, "a note names files of its folder only"

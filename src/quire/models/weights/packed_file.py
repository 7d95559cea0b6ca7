"""Files of packed linears: written once as a whole, mapped for reading, never trusted. No pickle, no code.

    8 bytes   MAGIC
    8 bytes   length of the header, little endian
    32 bytes  sha256 of the header
    header    JSON: {"entries": [{"offset", "nbytes", "bias_nbytes", "checksums", "source", and those of KeptLinear}]}
    entries   the first one at a multiple of 2 MiB, each at a multiple of 4 KiB: its panels, then its bias

A file appears under its name only when it is complete and on disk, and is never changed afterwards. Knows nothing of
models: who asks for entry i says what it must have been made of.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from quire.kernels.memory import AHEAD
from quire.kernels.weights import KeptLinear
from quire.models.files.remembered import check_owner

logger = logging.getLogger(__name__)

MAGIC = b"QUIREPK1"
PREFIX = struct.Struct("<8sQ32s")
FIRST, EACH = 2 << 20, 4096  # where entries may begin
MOST_HEADER = 64 << 20
MOST_ENTRY = 512  # bytes of an entry in the header
PIECE = 16 << 20  # bytes that are written at a time
SPARE_DISK = 2 << 30  # bytes that stay free on the disk
STALE_SECONDS = 86400.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Checksum = Callable[[torch.Tensor], int]
Entries = Sequence[tuple[str, KeptLinear]]  # (source, linear)


class PackedFile:
    """A mapped file. The mapping lives as long as any tensor of it."""

    def __init__(self, path: Path, memory: mmap.mmap, entries: list[dict[str, Any]], checksum: Checksum) -> None:
        self.path = path
        self._memory = memory
        self._entries = entries
        self._checksum = checksum
        self._damaged = False

    @classmethod
    def open(cls, path: Path, checksum: Checksum) -> PackedFile | None:
        """The file, or None where there is none, or none that can be used: a line in the log says why."""
        try:
            with path.open("rb") as file:
                check_owner(file)
                entries = _read_header(file)
                memory = AHEAD.take_file(file)
            for entry in entries:
                _check_entry(entry, len(memory))
            os.utime(path)  # what was used longest ago goes first when room is needed
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("the packed weights in %s cannot be used, weights are packed again: %s", path, error)
            return None
        return cls(path, memory, entries, checksum)

    def entry(self, index: int, source: str) -> KeptLinear | None:
        """Linear number `index` if it was made of `source` and is as it was written; its tensors are views of the file."""
        if self._damaged or index >= len(self._entries) or self._entries[index]["source"] != source:
            return None
        found = self._entries[index]
        start, nbytes, bias_nbytes = found["offset"], found["nbytes"], found["bias_nbytes"]
        blob = torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes + bias_nbytes, offset=start)
        data, bias = blob[:nbytes], blob[nbytes:]
        if [self._checksum(data), self._checksum(bias)] != found["checksums"]:
            logger.warning(
                "the packed weights in %s are damaged (entry %d), weights are packed again", self.path, index
            )
            self._damaged = True
            return None
        dtype = DTYPES[found["dtype"]]
        return KeptLinear(
            out_features=found["out_features"],
            in_features=found["in_features"],
            dtype=dtype,
            bits=found["bits"],
            group=found["group"],
            zero_points=found["zero_points"],
            data=data,
            bias=bias.view(dtype) if bias_nbytes else None,
        )


def _read_header(file: BinaryIO) -> list[dict[str, Any]]:
    prefix = file.read(PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise ValueError("it is too short")
    magic, length, digest = PREFIX.unpack(prefix)
    if magic != MAGIC or length > MOST_HEADER:
        raise ValueError("it does not begin as such a file does")
    header = file.read(length)
    if hashlib.sha256(header).digest() != digest:
        raise ValueError("its header is damaged")
    entries: list[dict[str, Any]] = json.loads(header)["entries"]
    return entries


def _check_entry(entry: dict[str, Any], size: int) -> None:
    start, nbytes, bias_nbytes = entry["offset"], entry["nbytes"], entry["bias_nbytes"]
    if start % EACH or nbytes <= 0 or bias_nbytes < 0 or start + nbytes + bias_nbytes > size:
        raise ValueError("it was cut off")
    width = DTYPES[entry["dtype"]].itemsize * entry["out_features"]
    if nbytes % 4 or bias_nbytes not in (0, width):
        raise ValueError("an entry has an impossible size")


# ---------------------------------------------------------------- writing


def write_packed(path: Path, entries: Entries, checksum: Checksum, limit: int) -> int:
    """Write a file of these linears; its size, or 0 where another process is at it or there is no room for it.

    Others in its folder are removed, the longest unused first, until all together take at most `limit` bytes.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    room = PREFIX.size + MOST_ENTRY * len(entries)
    listed, offset = [], -(-room // FIRST) * FIRST
    for source, linear in entries:
        listed.append(_described(source, linear, offset, checksum))
        offset += -(-(listed[-1]["nbytes"] + listed[-1]["bias_nbytes"]) // EACH) * EACH
    header = json.dumps({"entries": listed}).encode()
    assert PREFIX.size + len(header) <= room, "MOST_ENTRY is too small"
    part = path.with_suffix(".part")
    with _only_writer(part) as file:
        if file is None:
            return 0
        if not _room_for(path, offset, limit):
            part.unlink()
            return 0
        file.write(PREFIX.pack(MAGIC, len(header), hashlib.sha256(header).digest()) + header)
        for entry, (_, linear) in zip(listed, entries, strict=True):
            file.seek(entry["offset"])
            _write_tensor(file, linear.data)
            if linear.bias is not None:
                _write_tensor(file, linear.bias.view(torch.uint8))
        file.flush()
        file.truncate(offset)
        os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)
    return offset


def _described(source: str, linear: KeptLinear, offset: int, checksum: Checksum) -> dict[str, Any]:
    bias = torch.empty(0, dtype=torch.uint8) if linear.bias is None else linear.bias.view(torch.uint8)
    return {
        "out_features": linear.out_features,
        "in_features": linear.in_features,
        "dtype": str(linear.dtype).removeprefix("torch."),
        "bits": linear.bits,
        "group": linear.group,
        "zero_points": linear.zero_points,
        "source": source,
        "offset": offset,
        "nbytes": linear.data.numel(),
        "bias_nbytes": bias.numel(),
        "checksums": [checksum(linear.data), checksum(bias)],
    }


def _write_tensor(file: BinaryIO, data: torch.Tensor) -> None:
    view = memoryview(data.numpy())
    for start in range(0, len(view), PIECE):
        file.write(view[start : start + PIECE])


@contextmanager
def _only_writer(part: Path) -> Iterator[BinaryIO | None]:
    """The file `part`, empty, for as long as this process alone writes it; None if another one does."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before may have finished meanwhile: then what is open here is its file, complete and in use.
            alone = os.path.samestat(os.stat(part), os.fstat(descriptor))
        except OSError:
            alone = False
        if not alone:
            yield None
            return
        file.truncate(0)
        try:
            yield file
        except BaseException:
            part.unlink(missing_ok=True)
            raise


def _room_for(path: Path, nbytes: int, limit: int) -> bool:
    """Make room within the limit; False where the file would not fit, into the limit or on the disk."""
    if nbytes > limit:
        logger.info("packed weights of %.2f GB are not kept: --packed-cache-gb allows %.2f", nbytes / 1e9, limit / 1e9)
        return False
    others = []
    for other in path.parent.iterdir():
        stat = other.stat()
        if other.suffix == ".part" and other.stem != path.stem and time.time() - stat.st_mtime > STALE_SECONDS:
            other.unlink(missing_ok=True)
        elif other.suffix == path.suffix and other != path:
            others.append((stat.st_mtime, stat.st_size, other))
    total = nbytes + sum(size for _, size, _ in others)
    for _, size, other in sorted(others):
        if total <= limit:
            break
        logger.info("packed weights in %s, unused for longest, make room", other)
        other.unlink(missing_ok=True)
        total -= size
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + SPARE_DISK:
        logger.info("packed weights of %.2f GB are not kept: %.2f GB are free", nbytes / 1e9, free / 1e9)
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

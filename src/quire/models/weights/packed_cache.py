"""PackedCache: the packed weights of a model on disk, so that its second start maps them instead of packing again.

It stands between a model and its ops and sees linears only, in the order in which the model packs them; a file holds the
same linears in the same order. Whatever does not fit is packed as if there were no file. How a file is written, found and
read is known to packed_file.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quire import __version__, env
from quire.config import ModelOptions
from quire.kernels.table import Ops
from quire.kernels.weights import KeptLinear, PackedLinear, Parts, QuantizedLinear
from quire.models.files.hub import ModelFiles
from quire.models.files.remembered import weight_identity
from quire.models.weights.packed_file import PackedFile, write_packed
from quire.models.weights.packed_folder import note_file, packed_folder
from quire.quant.checkpoints import StoredWeight
from quire.quant.format import QuantizedOps

logger = logging.getLogger(__name__)

WORTH_BYTES = 64 << 20  # below this packing takes no time that anybody would notice
SAMPLE_ROWS, SAMPLE_COLUMNS = 8, 64  # what is compared of each weight with what was packed: see `source_of`

Packed = PackedLinear | QuantizedLinear


class PackedCache:
    """One load of one model. `ops` are those to build it with; `finish` comes when it is loaded."""

    def __init__(self, ops: Ops, path: Path, limit: int, least: int) -> None:
        self._base = ops
        self._path = path
        self._limit = limit
        self._least = least
        self._file = PackedFile.open(path, ops.checksum)
        self._made: list[tuple[str, Packed]] = []
        self._found = 0
        self.ops = self._wrapped(ops)

    @property
    def hit(self) -> bool:
        """Whether there is a file that may have everything."""
        return self._file is not None

    def finish(self) -> threading.Thread | None:
        """Write a new file where what was found did not do; the thread that does it, which nobody has to wait for."""
        if self._found == len(self._made):
            logger.info("%d packed linears mapped from %s", self._found, self._path)
            return None
        kept = [(source, self._base.take_apart(packed)) for source, packed in self._made]
        entries = [(source, linear) for source, linear in kept if linear is not None]
        if len(entries) < len(kept) or sum(linear.data.numel() for _, linear in entries) < self._least:
            return None
        thread = threading.Thread(target=self._write, args=(entries,), name="packed-cache")
        thread.start()
        return thread

    def _write(self, entries: list[tuple[str, KeptLinear]]) -> None:
        began = time.perf_counter()
        env.lower_priority()
        try:
            nbytes = write_packed(self._path, entries, self._base.checksum, self._limit)
        except OSError as error:
            logger.warning("packed weights are not kept in %s: %s", self._path, error)
            return
        if nbytes:
            logger.info(
                "packed weights kept in %s, %.2f GB in %.2f s", self._path, nbytes / 1e9, time.perf_counter() - began
            )

    def _wrapped(self, ops: Ops) -> Ops:
        if not isinstance(ops, QuantizedOps):
            return replace(ops, pack_linear=self._packing(ops.pack_linear))
        own = self._packing(ops.pack_linear)
        return replace(ops, pack_linear=own, head=self._wrapped(ops.head), full=self._wrapped(ops.full))

    def _packing(self, pack: Callable[..., Any]) -> Callable[..., Any]:
        def look_or_pack(weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> Packed:
            source = source_of(weight, bias, dtype)
            kept = None if self._file is None else self._file.entry(len(self._made), source)
            packed = self._put_together(kept) if kept is not None else None
            if packed is None:
                packed = pack(weight, bias, dtype)
            else:
                self._found += 1
            self._made.append((source, packed))
            return packed

        return look_or_pack

    def _put_together(self, kept: KeptLinear) -> Packed | None:
        try:
            return self._base.put_together(kept)
        except ValueError as error:
            logger.warning("%s is passed over: %s", self._path, error)
            return None


def packed_cache(
    files: ModelFiles, options: ModelOptions, impl: str, dtype: torch.dtype, ops: Ops
) -> PackedCache | None:
    """The cache for a load of `files`; None where it is not wanted, or where nothing can be kept."""
    wanted = options.packed_cache
    layout = ops.packed_layout()
    if wanted == "off" or (wanted == "auto" and files.method is None) or layout is None or not files.weights:
        return None
    key = {
        "quire": __version__,
        "layout": layout,
        "implementation": impl,
        "dtype": str(dtype),
        "quantization": files.rounding,
        "files": [weight_identity(path) for path in files.weights],
    }
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    path = packed_folder() / f"{name}.packed"
    note_file(options, path)
    least = WORTH_BYTES if wanted == "auto" else 0
    return PackedCache(ops, path, int(options.packed_cache_gb * 1e9), least)


def source_of(weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None) -> str:
    """A few values of each part of a weight, with its shape: enough to tell it from other weights and other models."""
    digest = hashlib.blake2b(digest_size=16)
    for part in _tensors(weight):
        digest.update(f"{tuple(part.shape)} {part.dtype} {dtype};".encode())
        rows = part[:: max(1, part.shape[0] // SAMPLE_ROWS)][:SAMPLE_ROWS]
        digest.update(_bytes(rows[:, :SAMPLE_COLUMNS]))
    if bias is not None:
        digest.update(f"bias {bias.dtype};".encode() + _bytes(bias))
    return digest.hexdigest()


def _tensors(weight: Parts | StoredWeight) -> Iterator[torch.Tensor]:
    for part in [weight] if isinstance(weight, torch.Tensor | StoredWeight) else weight:
        if isinstance(part, StoredWeight):
            yield from (tensor if tensor.dim() == 2 else tensor.view(1, -1) for tensor in part.tensors.values())
        else:
            yield part


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

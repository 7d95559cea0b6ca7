"""Checkpoint: the weight files of a model as one table of names, each tensor read when asked for.

safetensors are mapped, so a tensor is a view of the file and costs no memory of its own; .bin and .pt go through
torch's safe unpickler. Knows files and tensors, not models.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch

from quire.errors import CheckpointError
from quire.kernels.memory import FILE_PAGES
from quire.models.files.headers import WeightHeader, merge_headers, read_index, weight_headers, with_stored_linears
from quire.models.files.hub import ModelFiles
from quire.placeholders import placeholder
from quire.quant.checkpoints import StoredWeight

SWEEP_BYTES = 128 << 20  # pages of a mapped file are let go when so many bytes may be resident


class _Reader(Protocol):
    """One opened weight file."""

    def read(self, header: WeightHeader) -> torch.Tensor: ...

    def forget(self, header: WeightHeader) -> None: ...

    def sweep(self) -> None: ...


class Checkpoint:
    """All tensors of some weight files. `headers` is the table; `read` gives one tensor, `forget` lets its pages go."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.headers: dict[str, WeightHeader] = {}
        self._readers: dict[Path, _Reader] = {}
        self._taken = 0  # bytes
        if files.weight_format == "safetensors":
            self.headers = weight_headers(files)
        elif files.weight_format == "pt":
            index = read_index(files.index) if files.index is not None else None
            readers = {path: _TorchFile(path) for path in files.weights}
            self._readers.update(readers)
            merged = merge_headers((reader.headers for reader in readers.values()), index)
            self.headers = with_stored_linears(merged, files.scheme)
        self._nbytes = max(1, sum(header.nbytes for header in self.headers.values()))

    def read(self, name: str) -> torch.Tensor | StoredWeight:
        """The tensor of that name; a view of the mapped file where the format allows, and as stored if it is quantized."""
        header = self.headers[name]
        if header.parts is not None:
            assert self.files.scheme is not None, "only a scheme makes parts"
            tensors = {last: self._read(part) for last, part in header.parts.items()}
            return StoredWeight(self.files.scheme, name, (header.shape[0], header.shape[1]), tensors)
        return self._read(header)

    def _read(self, header: WeightHeader) -> torch.Tensor:
        if header.path not in self._readers:
            self._readers[header.path] = _SafetensorsFile(header.path, self.files.read_ahead)
        return self._readers[header.path].read(header)

    def forget(self, name: str) -> None:
        """The tensor was taken: its file pages need not stay resident for long. Views of it remain valid."""
        header = self.headers[name]
        for part in [header] if header.parts is None else header.parts.values():
            self._readers[part.path].forget(part)
        self._taken += header.nbytes
        if self.files.on_share is not None:
            self.files.on_share(self._taken / self._nbytes)

    def sweep(self) -> None:
        """Everything was taken: let all file pages go. Views remain valid; what is read again comes back."""
        for reader in self._readers.values():
            reader.sweep()

    def where(self, name: str) -> str:
        """The file of a tensor, for messages."""
        return str(self.headers[name].path)


def stream_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, torch.Tensor | StoredWeight]]:
    """Each tensor once, in file order. Its file pages are let go once others have followed."""
    for name in checkpoint.headers:
        yield name, checkpoint.read(name)
        checkpoint.forget(name)
    checkpoint.sweep()


class _SafetensorsFile:
    """A mapped safetensors file. The mapping lives as long as any view of it."""

    def __init__(self, path: Path, read_ahead: bool) -> None:
        self._read_ahead = read_ahead
        try:
            with path.open("rb") as file:
                # Copy-on-write: a stray write into a view changes this process's memory, never the file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            FILE_PAGES.add(self._map)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"The weight file {path} cannot be mapped into memory: {error}.") from error
        self._resident = 0  # bytes of tensors that were read since the last sweep

    def read(self, header: WeightHeader) -> torch.Tensor:
        if header.nbytes == 0:
            return torch.empty(header.shape, dtype=header.dtype)
        if header.start + header.nbytes > len(self._map):
            raise CheckpointError(
                f"The weight file {header.path} became shorter while tensor {header.name!r} was read."
            )
        if self._read_ahead:
            start = header.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, start, header.start + header.nbytes - start)
        if header.start % header.dtype.itemsize == 0:
            count = header.nbytes // header.dtype.itemsize
            return torch.frombuffer(self._map, dtype=header.dtype, count=count, offset=header.start).view(header.shape)
        # Allowed by the format, though rare: a tensor that does not start at a multiple of its element size.
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=header.nbytes, offset=header.start)
        return raw.clone().view(header.dtype).view(header.shape)

    def forget(self, header: WeightHeader) -> None:
        # Siblings that are packed together are read again after they were forgotten, so single ones are not let go.
        self._resident += header.nbytes
        if self._resident > SWEEP_BYTES:
            self.sweep()

    def sweep(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)
        self._resident = 0


class _TorchFile:
    """A .bin or .pt file: a dictionary of tensors, mapped when its zip layout allows. No code in it is ever run."""

    def __init__(self, path: Path) -> None:
        self._tensors = _load_torch_file(path)
        self.headers = {
            name: WeightHeader(name, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.element_size(), 0, path)
            for name, tensor in self._tensors.items()
        }

    def read(self, header: WeightHeader) -> torch.Tensor:
        return self._tensors[header.name]

    def forget(self, header: WeightHeader) -> None:
        self._tensors.pop(header.name, None)

    def sweep(self) -> None:
        self._tensors.clear()


def _load_torch_file(path: Path) -> dict[str, torch.Tensor]:
    if instead := placeholder(path):
        raise CheckpointError(f"The weight file {path} is {instead}.")
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"  # files from before torch 1.6 are bare pickles and cannot be mapped
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        raise CheckpointError(
            f"The weight file {path} is corrupt, or it contains Python objects other than tensors; quire does not run "
            "code from weight files. Convert it to safetensors where you trust it, or find a safetensors version."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"The weight file {path} is corrupt or truncated: {first[:200]}. Download or copy it again."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CheckpointError(f"The weight file {path} does not hold a dictionary of tensors, so it is no model.")
    return dict(found)

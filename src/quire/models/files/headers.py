"""Reads what weight files say about themselves, without reading the weights: safetensors headers, and their index.

Every contradiction in a header is found here, before the first tensor is touched. Knows files, not models.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quire.errors import CheckpointError
from quire.placeholders import placeholder
from quire.quant.checkpoints import MAIN, Scheme, stored_linears, stored_shape

if TYPE_CHECKING:
    from quire.models.files.hub import ModelFiles

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the format itself


@dataclass(frozen=True, slots=True)
class WeightHeader:
    """One tensor of a safetensors file; its bytes are [start, start + nbytes) of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    start: int
    path: Path
    parts: dict[str, WeightHeader] | None = None  # of a quantized linear: its tensors by the last part of their names


def weight_headers(files: ModelFiles) -> dict[str, WeightHeader]:
    """Every weight of a model from its safetensors headers alone. Empty for .bin, .pt and dummy weights: no headers."""
    if files.headers is not None:
        return with_stored_linears(files.headers, files.scheme)
    if files.weight_format != "safetensors":
        return {}
    index = read_index(files.index) if files.index is not None else None
    return with_stored_linears(merge_headers((read_headers(path) for path in files.weights), index), files.scheme)


def with_stored_linears(headers: dict[str, WeightHeader], scheme: Scheme | None) -> dict[str, WeightHeader]:
    """The headers with one in place of all the tensors of each linear that is stored quantized: its weight [N, K]."""
    if scheme is None:
        return headers
    linears = stored_linears(headers, scheme)
    inner = {name for names in linears.values() for name in names.values()}
    found = {name: header for name, header in headers.items() if name not in inner}
    for weight, names in linears.items():
        parts = {last: headers[name] for last, name in names.items()}
        main = parts[MAIN[scheme.layout]]
        try:
            shape = stored_shape(scheme, {last: part.shape for last, part in parts.items()})
        except ValueError as error:
            raise _broken(main.path, f"the quantized tensor {main.name!r} has shape {list(main.shape)}") from error
        nbytes = sum(part.nbytes for part in parts.values())
        found[weight] = WeightHeader(weight, main.dtype, shape, nbytes, main.start, main.path, parts)
    return dict(sorted(found.items(), key=lambda item: (str(item[1].path), item[1].start)))


def read_headers(path: Path) -> dict[str, WeightHeader]:
    """All tensors of one safetensors file. Raises CheckpointError that names the file, and the tensor when one is bad."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                if found := placeholder(path):  # text, read as a length, is more than any file has
                    raise CheckpointError(f"The weight file {path} is {found}.")
                raise _broken(path, f"its {size} bytes cannot hold the header of {length} bytes that it announces")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"The weight file {path} cannot be read: {error}. Check its path and permissions."
        ) from error
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _broken(path, "its header is not a JSON object")
    entries.pop("__metadata__", None)
    return {name: _header(path, name, entry, 8 + length, size) for name, entry in entries.items()}


def _header(path: Path, name: str, entry: Any, base: int, size: int) -> WeightHeader:
    try:
        kind, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"the header entry of tensor {name!r} is malformed") from error
    if kind not in DTYPES:
        raise CheckpointError(
            f"Tensor {name!r} in {path} has data type {kind!r}, which quire cannot read; it reads {', '.join(DTYPES)}."
        )
    dtype = DTYPES[kind]
    nbytes = math.prod(shape) * dtype.itemsize
    if end - begin != nbytes:
        raise _broken(
            path,
            f"tensor {name!r} of shape {list(shape)} and type {kind} needs {nbytes} bytes but has [{begin}, {end})",
        )
    if base + end > size:
        raise _broken(path, f"tensor {name!r} ends at byte {base + end}, but the file has only {size} bytes")
    return WeightHeader(name, dtype, shape, nbytes, base + begin, path)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"The weight file {path} is corrupt or truncated: {what}. "
        "Download or copy it again and compare its size with the original."
    )


def read_index(path: Path) -> dict[str, str]:
    """The weight map of an index file (*.index.json): tensor name -> file name."""
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        if found := placeholder(path):
            raise CheckpointError(f"The weight index {path} is {found}.") from error
        raise CheckpointError(
            f"The weight index {path} cannot be read ({type(error).__name__}: {error}). Download it again."
        ) from error
    outside = sorted({file for file in names.values() if Path(file).name != file})
    if outside:
        raise CheckpointError(f"The weight index {path} points outside its own folder, at {outside[0]!r}; refused.")
    return names


def merge_headers(headers: Iterable[dict[str, WeightHeader]], index: dict[str, str] | None) -> dict[str, WeightHeader]:
    """One table of many files. The index decides for a name in several files; without one that is an error.

    Names of the index that are in no file are an error, too: they name the shard that is incomplete.
    """
    merged: dict[str, WeightHeader] = {}
    for table in headers:
        for name, header in table.items():
            if index is not None and index.get(name, header.path.name) != header.path.name:
                continue
            if name in merged:
                raise CheckpointError(
                    f"Tensor {name!r} is in two files, {merged[name].path} and {header.path.name}, and no index says "
                    "which one counts. Remove the file that does not belong to this model."
                )
            merged[name] = header
    for name, file in (index or {}).items():
        if name not in merged:
            raise CheckpointError(
                f"The index says that tensor {name!r} is in {file}, but that file does not contain it. "
                "The shards and the index are of different versions: download both again."
            )
    return merged

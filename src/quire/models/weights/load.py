"""Puts weights where they belong: every name is consumed or explicitly ignored, every target is filled.

Tensors come one at a time and are packed at once, so that loading needs the model's weights plus one tensor.
Knows names and targets, not what the layers do with them.
"""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from quire.errors import CheckpointError
from quire.layers.target import Target
from quire.quant.checkpoints import StoredWeight

# Leftovers of old training code that no model reads: rotary tables and causal masks are computed, not loaded.
LEFTOVERS = (r"rotary_emb\.inv_freq$", r"\.rotary_emb\.(cos|sin)_cached$", r"\.attn\.masked_bias$", r"position_ids$")


@dataclass(frozen=True, slots=True)
class LoadRules:
    """How names of the checkpoint relate to targets.

    `rename` gives a checkpoint name's target name. `ignored` are patterns of checkpoint names to pass over. `tied` maps
    a target to the target whose tensor it shares when the checkpoint lacks its own. `optional` are targets that may
    stay empty. `origin` names the file of a checkpoint name, for messages.
    """

    rename: Callable[[str], str] = field(default=lambda name: name)
    ignored: tuple[str, ...] = LEFTOVERS
    tied: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    origin: Callable[[str], str] = field(default=lambda name: "the checkpoint")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did; `ignored` are checkpoint names that were passed over on purpose."""

    tensors: int
    nbytes: int
    seconds: float
    ignored: tuple[str, ...]
    empty: frozenset[str]  # optional targets for which nothing came


class Filler:
    """Fills targets, and knows which are still empty. One per load."""

    def __init__(self, targets: Mapping[str, Target], rules: LoadRules) -> None:
        self.targets = targets
        self.rules = rules
        self._ignored_names = re.compile("|".join(f"(?:{pattern})" for pattern in rules.ignored) or r"(?!)")
        self._empty = set(targets)
        self._kept: dict[str, torch.Tensor | StoredWeight] = {}  # tensors that a tied target may still need
        self._tied_sources = set(rules.tied.values()) | set(rules.tied)
        self._unexpected: list[str] = []
        self._ignored: list[str] = []
        self._nbytes = 0
        self._tensors = 0
        self._started = time.perf_counter()

    def give(self, name: str, tensor: torch.Tensor | StoredWeight, source: str) -> None:
        """Hand `tensor` to target `name`; `source` is the checkpoint's name for it."""
        target = self.targets.get(name)
        if target is None:
            self.reject(source)
            return
        if name not in self._empty:
            raise CheckpointError(f"Tensor {source!r} in {self.rules.origin(source)} fills {name!r} a second time.")
        if tuple(tensor.shape) != target.shape:
            raise CheckpointError(
                f"Tensor {source!r} in {self.rules.origin(source)} has shape {list(tensor.shape)}, but the config asks "
                f"for {list(target.shape)}. The weights and config.json do not belong together, or hf_overrides "
                "changed a size."
            )
        if target.dtype.is_floating_point and isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
            raise CheckpointError(
                f"Tensor {source!r} in {self.rules.origin(source)} holds numbers of type {tensor.dtype} where "
                "the model has weights. It may be quantized in a way that config.json does not tell; use the "
                "model's original repository."
            )
        stored = target.load(tensor)
        self._empty.discard(name)
        self._tensors += 1
        self._nbytes += tensor.numel() * tensor.element_size()
        if name in self._tied_sources:
            self._kept[name] = tensor if stored is None else stored

    def reject(self, source: str) -> None:
        """A checkpoint name that has no target: ignored by rule, or remembered for the error."""
        if self._ignored_names.search(source):
            self._ignored.append(source)
        else:
            self._unexpected.append(source)

    def finish(self) -> LoadReport:
        """Fill tied targets and check that nothing is missing or left over."""
        for name, source in self.rules.tied.items():
            # The checkpoint may hold either end of a tie.
            for empty, full in ((name, source), (source, name)):
                if empty in self._empty and full in self._kept:
                    self.give(empty, self._kept[full], full)
        self._kept.clear()
        missing = sorted(self._empty - self.rules.optional)
        if missing:
            hint = f" Names without a place: {_some(self._unexpected)}." if self._unexpected else ""
            raise CheckpointError(
                f"The checkpoint lacks {len(missing)} of {len(self.targets)} weights that the config asks for: "
                f"{_some(missing)}.{hint} The download may be incomplete, or the weights belong to another config."
            )
        if self._unexpected:
            raise CheckpointError(
                f"The checkpoint has {len(self._unexpected)} weights that the model has no place for: "
                + ", ".join(f"{name!r} in {self.rules.origin(name)}" for name in self._unexpected[:3])
                + ". Running without them would give wrong answers; the weights belong to another config or a newer "
                "version of the model."
            )
        seconds = time.perf_counter() - self._started
        return LoadReport(self._tensors, self._nbytes, seconds, tuple(self._ignored), frozenset(self._empty))


def load_into(
    targets: Mapping[str, Target], weights: Iterable[tuple[str, torch.Tensor | StoredWeight]], rules: LoadRules
) -> LoadReport:
    """Fill every target from (checkpoint name, tensor) pairs. Raises CheckpointError naming file and tensor."""
    filler = Filler(targets, rules)
    for name, tensor in weights:
        filler.give(rules.rename(name), tensor, name)
    return filler.finish()


def dummy_weights(targets: Mapping[str, Target], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """A random tensor for each target, the same for the same seed and name whatever the order.

    Each is a view of one seeded strip in which rows overlap, so that a billion parameters cost no memory until they are
    packed. Matrices are small normal numbers, vectors scales near one or offsets near zero: activations stay in range.
    """
    shapes = [target.shape for target in targets.values() if target.dtype.is_floating_point]
    longest = max((math.prod(shape[:-1]) * _ROW_STEP + shape[-1] for shape in shapes if shape), default=1)
    generator = torch.Generator().manual_seed(seed)
    # Numbers are drawn in blocks of 16: a whole number of them makes the first ones the same for any length.
    normal = torch.randn((longest + _STARTS + 15) // 16 * 16, generator=generator) * 0.02
    strips: dict[torch.dtype, torch.Tensor] = {}
    for name, target in targets.items():
        if not target.dtype.is_floating_point:
            yield name, torch.zeros(target.shape, dtype=target.dtype)
            continue
        if target.dtype not in strips:
            strips[target.dtype] = normal.to(target.dtype)
        start = zlib.crc32(name.encode()) % _STARTS
        tensor = strips[target.dtype].as_strided(target.shape, _overlapping(target.shape), start)
        yield name, tensor + 1 if tensor.dim() <= 1 and name.endswith("weight") else tensor


_ROW_STEP = 61  # elements between the starts of two rows; odd, so that no usual width repeats
_STARTS = 4099


def _overlapping(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor whose last dimension is contiguous and whose rows begin _ROW_STEP apart."""
    strides = [1] * len(shape)
    step = _ROW_STEP
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:4])
    return shown + (f" and {len(names) - 4} more" if len(names) > 4 else "")

"""The rotary frequencies that follow from a config, for every kind of rope that native families have.

The numbers are those of the Transformers library, bit for bit: each is computed in the same order and precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from quire.errors import UnsupportedModelError
from quire.layers.rope import Frequencies

LENGTH_ROPES = ("dynamic", "longrope")  # frequencies depend on how long a sequence is


def rope_type(config: Any) -> str:
    """default, linear, dynamic, yarn, longrope or llama3."""
    return str((config.rope_parameters or {}).get("rope_type") or "default")


def frequencies_of(config: Any, head_dim: int) -> Frequencies:
    """The rotary frequencies of a config. Raises UnsupportedModelError for a kind of rope that is not computed here."""
    kind, rope = rope_type(config), config.rope_parameters
    compute = _KINDS.get(kind)
    if compute is None:
        raise UnsupportedModelError(
            f"The rope type {kind!r} is unknown to native models; they know {', '.join(sorted(_KINDS))}. "
            "Correct rope_parameters with --hf-overrides, or use --model-impl transformers."
        )
    found = compute(rope, head_dim, config.max_position_embeddings)
    if kind == "dynamic":
        beyond: Callable[[int], torch.Tensor] = partial(_dynamic_beyond, rope, head_dim, config.max_position_embeddings)
        return Frequencies(found.inverse, found.scaling, config.max_position_embeddings, beyond)
    if kind == "longrope":
        threshold = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return Frequencies(found.inverse, found.scaling, threshold, partial(_long_beyond, rope, head_dim))
    return found


def _exponents(size: int) -> torch.Tensor:
    """2i / size for each rotated pair i."""
    return torch.arange(0, size, 2, dtype=torch.float32) / size


def _plain(base: float, size: int) -> torch.Tensor:
    return 1.0 / (base ** _exponents(size))


def _default(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    return Frequencies(_plain(rope["rope_theta"], size))


def _linear(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    """Positions divided by a factor."""
    return Frequencies(_plain(rope["rope_theta"], size) / rope["factor"])


def _dynamic(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    return Frequencies(_dynamic_beyond(rope, size, positions, positions))


def _dynamic_beyond(rope: Mapping[str, Any], size: int, positions: int, length: int) -> torch.Tensor:
    """A base that grows with the length of the sequence."""
    factor = rope["factor"]
    stretch = (factor * max(length, positions) / positions) - (factor - 1)
    return _plain(rope["rope_theta"] * stretch ** (size / (size - 2)), size)


def _yarn(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    """Fast frequencies as they are, slow ones divided by a factor, and a ramp between them."""
    base, factor = rope["rope_theta"], rope["factor"]
    original = rope["original_max_position_embeddings"]
    if factor is None:
        factor = positions / original
    low, high = (
        _pair_that_turns(turns, size, base, original)
        for turns in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1)
    )
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    if low == high:
        high += 0.001  # a ramp must have a width
    kept = 1 - torch.clamp((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    wavelengths = base ** _exponents(size)
    inverse = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
    return Frequencies(inverse, _yarn_scaling(rope, factor))


def _pair_that_turns(turns: float, size: int, base: float, positions: int) -> float:
    """The number, not whole, of the rotated pair that makes so many turns within so many positions."""
    return (size * math.log(positions / (turns * 2 * math.pi))) / (2 * math.log(base))


def _yarn_scaling(rope: Mapping[str, Any], factor: float) -> float:
    given, top, bottom = rope.get("attention_factor"), rope.get("mscale"), rope.get("mscale_all_dim")
    if given is not None:
        return given
    if top and bottom:
        return float(_log_scale(factor, top) / _log_scale(factor, bottom))
    return _log_scale(factor, 1)


def _log_scale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _longrope(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    """A factor of its own for each frequency, and other ones behind the context of the training."""
    original, factor = rope["original_max_position_embeddings"], rope.get("factor")
    if factor is None:
        factor = positions / original
    scaling = rope.get("attention_factor")
    if scaling is None:
        scaling = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return Frequencies(_long_inverse(rope, "short_factor", size), scaling)


def _long_beyond(rope: Mapping[str, Any], size: int, length: int) -> torch.Tensor:
    original = rope["original_max_position_embeddings"]
    return _long_inverse(rope, "long_factor" if length > original else "short_factor", size)


def _long_inverse(rope: Mapping[str, Any], name: str, size: int) -> torch.Tensor:
    return 1.0 / (torch.tensor(rope[name], dtype=torch.float32) * rope["rope_theta"] ** _exponents(size))


def _llama3(rope: Mapping[str, Any], size: int, positions: int) -> Frequencies:
    """Long waves divided by a factor, short ones as they are, and a smooth passage between them."""
    factor, slow, fast = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    inverse = _plain(rope["rope_theta"], size)
    waves = 2 * math.pi / inverse
    longest, shortest = original / slow, original / fast
    divided = torch.where(waves > longest, inverse / factor, inverse)
    share = (original / waves - slow) / (fast - slow)
    smooth = (1 - share) * divided / factor + share * divided
    between = (waves >= shortest) & (waves <= longest)
    return Frequencies(torch.where(between, smooth, divided))


_KINDS: dict[str, Callable[[Mapping[str, Any], int, int], Frequencies]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}

"""Prompts for benchmarks, made or read, always the same for the same seed.

random: token ids out of the vocabulary. prefix_repetition: groups of requests that begin alike. sharegpt and custom:
texts from a JSON or JSONL file.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quire.config import option, refuse_nonsense
from quire.errors import ConfigError

FIRST_ORDINARY_ID = 16  # the first ids of a vocabulary are often special


@dataclass(frozen=True, slots=True)
class WorkloadOptions:
    """Which requests a benchmark sends."""

    dataset_name: Literal["random", "prefix_repetition", "sharegpt", "custom"] = option(
        "random", help="made of random tokens, or read from a file"
    )
    dataset_path: str | None = option(None, help="JSON or JSONL file of sharegpt or custom")
    num_prompts: int = option(1000, help="how many requests", least=1)
    input_len: int | None = option(
        None, help="prompt tokens of each request; 1024 for made ones, else the file's", least=1
    )
    output_len: int | None = option(None, help="output tokens of each request; 128, or what the file has", least=1)
    n: int = option(1, help="outputs of each request", least=1)
    random_range_ratio: float = option(0.0, help="lengths vary by this share up and down")
    random_prefix_len: int = option(0, help="tokens that all random prompts begin with, on top of input_len", least=0)
    prefix_repetition_num_prefixes: int = option(10, help="how many different beginnings there are", least=1)

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


@dataclass(frozen=True, slots=True)
class Item:
    """One request: its prompt as token ids, and how many tokens to generate."""

    prompt_token_ids: list[int]
    output_len: int


def make_items(options: WorkloadOptions, vocab_size: int, encode: Callable[[str], list[int]], seed: int) -> list[Item]:
    """The requests of a workload. `encode` is only called for texts of a file."""
    if options.dataset_name in ("sharegpt", "custom"):
        return _from_file(options, encode, seed)
    draw = random.Random(seed)
    first = FIRST_ORDINARY_ID if vocab_size > 2 * FIRST_ORDINARY_ID else 0

    def ids(count: int) -> list[int]:
        return [draw.randrange(first, vocab_size) for _ in range(count)]

    mean_in, mean_out = options.input_len or 1024, options.output_len or 128
    if options.dataset_name == "prefix_repetition":
        prefixes = [ids(mean_in // 2) for _ in range(options.prefix_repetition_num_prefixes)]
    else:
        prefixes = [ids(options.random_prefix_len)]
        mean_in += options.random_prefix_len
    items = []
    for index in range(options.num_prompts):
        prefix = prefixes[index % len(prefixes)]
        own = _around(draw, mean_in - len(prefix), options.random_range_ratio)
        items.append(Item(prefix + ids(own), _around(draw, mean_out, options.random_range_ratio)))
    return items


def _around(draw: random.Random, mean: int, ratio: float) -> int:
    """A length within `ratio` of the mean, at least 1."""
    if not 0 <= ratio < 1:
        raise ConfigError(f"random_range_ratio is {ratio}; it is a share, from 0 to below 1.")
    return max(1, draw.randint(int(mean * (1 - ratio)), int(mean * (1 + ratio))))


def _from_file(options: WorkloadOptions, encode: Callable[[str], list[int]], seed: int) -> list[Item]:
    if options.dataset_path is None:
        raise ConfigError(f"--dataset-name {options.dataset_name} needs --dataset-path, the file to read.")
    path = Path(options.dataset_path)
    pairs = list(_sharegpt(path) if options.dataset_name == "sharegpt" else _custom(path))
    random.Random(seed).shuffle(pairs)
    items = []
    for prompt, answer in pairs:
        ids = encode(prompt)[: options.input_len]
        length = options.output_len or (len(encode(answer)) if answer else 128)
        if ids and length:
            items.append(Item(ids, length))
        if len(items) == options.num_prompts:
            return items
    if not items:
        raise ConfigError(f"{path} holds no prompt that can be used.")
    return items


def _sharegpt(path: Path) -> Iterator[tuple[str, str]]:
    """The first two turns of each conversation: what was asked and what was answered."""
    for entry in _read_json(path):
        turns = entry.get("conversations") or []
        if len(turns) >= 2:
            yield turns[0]["value"], turns[1]["value"]


def _custom(path: Path) -> Iterator[tuple[str, str]]:
    """One object per line with `prompt`, and `output` when the length of the answer counts."""
    for entry in _read_json(path):
        if "prompt" not in entry:
            raise ConfigError(f'{path}: each line must be an object with a prompt, such as {{"prompt": "..."}}.')
        yield entry["prompt"], entry.get("output") or ""


def _read_json(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return list(json.loads(text))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The dataset {path} cannot be read: {error}") from error

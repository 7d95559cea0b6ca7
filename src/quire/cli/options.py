"""The flags that several commands share: the model, the engine, and how to sample.

Turns parsed flags into EngineOptions and sampling wishes. Starts nothing.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from quire.cli.flags import FlagParser
from quire.config import EngineOptions, engine_fields, option
from quire.errors import ConfigError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

TITLES = {
    "model": "model",
    "cache": "cache",
    "schedule": "schedule",
    "parallel": "devices",
    "speculate": "speculative decoding",
    "observe": "observability",
}


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """How to choose tokens; what is left out follows the model's generation_config.json."""

    max_tokens: int | None = option(None, help="most tokens to generate")
    temperature: float | None = option(None, help="0 takes the most likely token, 1 follows the model")
    top_p: float | None = option(None, help="keep the most likely tokens that make up this probability")
    top_k: int | None = option(None, help="keep this many of the most likely tokens")
    min_p: float | None = option(None, help="keep tokens at least this likely, relative to the most likely one")
    repetition_penalty: float | None = option(None, help="above 1 makes tokens that were there less likely")
    stop: tuple[str, ...] = option((), help="texts that end the output")
    ignore_eos: bool | None = option(None, help="go on past the end-of-text token")

    def chosen(self) -> dict[str, Any]:
        """Only what the user chose, by SamplingParams' names."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in found.items() if value is not None and value != ()}


def engine_parser(prog: str, description: str) -> FlagParser:
    """A parser with all engine flags, --config, and the model as an argument."""
    parser = FlagParser(prog, description, "[MODEL]")
    add_model_argument(parser)
    add_engine_flags(parser)
    return parser


def add_model_argument(parser: FlagParser) -> None:
    """The model as the first word behind the command."""
    text = "local folder or hub id; nothing means the bundled model"
    parser.add_argument("model_argument", metavar="MODEL", nargs="?", help=text)


def add_engine_flags(parser: FlagParser, without: Sequence[str] = ()) -> None:
    """All engine flags in groups, and --config. `without` names aliases that mean other things."""
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; those on the command line win")
    types = get_type_hints(EngineOptions)
    for name, title in TITLES.items():
        parser.add_section(types[name], title, without=without)


def engine_options(found: argparse.Namespace) -> EngineOptions:
    """EngineOptions of the flags that were given."""
    values = {item.name: getattr(found, item.name) for _, item in engine_fields() if hasattr(found, item.name)}
    given = getattr(found, "model_argument", None)
    if given is not None:
        values["model"] = given
    if "model" not in values:
        _check_swallowed(found)
    return EngineOptions.from_flat(values)


def _check_swallowed(found: argparse.Namespace) -> None:
    """Raise ConfigError where a flag of several values seems to have taken the model for one of them.

    Else the bundled model would be served under that name, or to whoever knows the model's name as a key.
    """
    for name, value in vars(found).items():
        if not isinstance(value, tuple) or len(value) < 2:
            continue
        last = str(value[-1])
        if _looks_like_model(last):
            raise ConfigError(
                f"--{name.replace('_', '-')} takes all words behind it, so {last!r} is one of its values, and there is no "
                "model. If that is the model, give it before the flags, or with --model."
            )


def section_of(section: type, found: argparse.Namespace) -> Any:
    """The dataclass `section` made of the flags that were given."""
    return section(**{item.name: getattr(found, item.name) for item in fields(section) if hasattr(found, item.name)})


def split_model(words: Sequence[str]) -> tuple[str | None, str]:
    """[MODEL] TEXT: one word is the text for the bundled model, two are a model and a text."""
    if len(words) == 1:
        if _looks_like_model(words[0]):
            raise ConfigError(
                f"{words[0]!r} looks like a model, and there is no prompt. Give one in quotes, or - to read it from stdin; "
                "quire chat talks to a model."
            )
        return None, words[0]
    if len(words) == 2:
        return words[0], words[1]
    raise ConfigError("Give a model and a prompt, the prompt in quotes.")


def _looks_like_model(word: str) -> bool:
    """Whether a word is written like a hub id, or names a folder with a model."""
    return _HUB_ID.fullmatch(word) is not None or os.path.isfile(os.path.join(word, "config.json"))

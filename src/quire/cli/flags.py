"""Flags made from dataclass fields: names, types, help texts and defaults all come from config.py.

Understands --a-b and --a_b, --x and --no-x, 32k and 1K, JSON values, --flag.key.key value, and --config file.yaml.
Knows how text becomes values; what the values mean is decided elsewhere.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from quire.errors import ConfigError
from quire.foreign import FOREIGN, changes_nothing, instead_of

logger = logging.getLogger(__name__)

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class FlagParser(argparse.ArgumentParser):
    """An argument parser whose flags come from dataclasses, and whose errors name the nearest flag."""

    def __init__(self, prog: str, description: str, arguments: str = "") -> None:
        usage = f"{prog} {arguments} [options]".replace("  ", " ")
        super().__init__(
            prog=prog, usage=usage, description=description, allow_abbrev=False, formatter_class=_Formatter
        )

    def add_section(self, section: type, title: str, without: Sequence[str] = ()) -> None:
        """Add one flag per field of a dataclass; flags that are not given leave no trace in the result.

        `without` names aliases that mean something else here.
        """
        group = self.add_argument_group(title, (section.__doc__ or "").splitlines()[0])
        hints = get_type_hints(section)
        for item in fields(section):
            add_field(group, item, hints[item.name], without)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse flags in all the forms this module understands. Prints a usage error and exits with 2."""
        try:
            tokens = [_dashed(token) for token in with_config_file(list(argv))]
            tokens = gather_dotted(without_foreign(tokens))
            found, rest = self.parse_known_args(tokens)
            if rest:
                self.error(self._unknown(rest[0]))
        except ConfigError as error:
            self.error(str(error))
        return found

    def error(self, message: str) -> NoReturn:
        """Print the message in one paragraph and exit with 2."""
        self.exit(2, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")

    def _unknown(self, token: str) -> str:
        if not token.startswith("-"):
            return f"Unexpected argument {token!r}."
        flag = token.split("=")[0]
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        return f"Unknown flag {flag}." + (f" Did you mean {near[0]}?" if near else "")


class _Formatter(argparse.HelpFormatter):
    """Help with room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)


def add_field(group: Any, item: Field[Any], kind: Any, without: Sequence[str] = ()) -> None:
    """Add the flag of one dataclass field to an argument group."""
    flag = _flag(item.name)
    names = [flag, *(alias for alias in item.metadata.get("aliases", ()) if alias not in without)]
    text = _help(item)
    plain = without_none(kind)
    if plain is bool:
        group.add_argument(*names, action=_Switch, dest=item.name, default=argparse.SUPPRESS, help=text)
    elif get_origin(plain) is tuple:
        group.add_argument(
            *names, nargs="+", action=_Extend, dest=item.name, default=argparse.SUPPRESS, metavar="X", help=text
        )
    elif get_origin(plain) is Literal:
        choices = [str(choice) for choice in get_args(plain)]
        group.add_argument(*names, dest=item.name, choices=choices, default=argparse.SUPPRESS, help=text)
    else:
        reader, metavar = reader_of(plain, item.name)
        group.add_argument(*names, dest=item.name, type=reader, metavar=metavar, default=argparse.SUPPRESS, help=text)


def without_none(kind: Any) -> Any:
    """int for int | None; the first alternative of other unions."""
    inner = [part for part in get_args(kind) if part is not NoneType]
    return inner[0] if NoneType in get_args(kind) else kind


def reader_of(kind: Any, name: str) -> tuple[Any, str]:
    """The function that turns a word into a value of this type, and what help calls it."""
    if kind is int:
        return (length_or_auto if name == "max_model_len" else human_int), "N"
    if kind is float:
        return float, "X"
    if get_origin(kind) is dict or kind is dict:
        return json_object, "JSON"
    return str, "TEXT"


def human_int(text: str) -> int:
    """4096, 32k (decimal), 1K (binary), 1.5m."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgKMG]?)", text.strip())
    value = float(match[1]) * _SCALE[match[2]] if match else 0.5
    if not match or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write 4096, 32k (32000) or 32K (32768)")
    return int(value)


def length_or_auto(text: str) -> int:
    """A number of tokens, or auto (-1): fit it to the memory."""
    return -1 if text.strip().lower() == "auto" else human_int(text)


def json_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


class _Switch(argparse.BooleanOptionalAction):
    """--x and --no-x, with the help text left as it is."""


class _Extend(argparse.Action):
    """--x a b --x c: all of them, as a tuple."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *values))


def _help(item: Field[Any]) -> str:
    text = str(item.metadata.get("help", "")).replace("%", "%%")
    if item.default not in (MISSING, None, "", ()):
        text += f" (default: {item.default})"
    return text


def _dashed(token: str) -> str:
    """--a_b=c_d -> --a-b=c_d; the part after the first dot of a dotted flag is a JSON key and stays."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    name, dot, keys = flag.partition(".")
    return name.replace("_", "-") + dot + keys + equals + value


def without_foreign(tokens: list[str]) -> list[str]:
    """Leave out flags of other engines that change nothing here, and say so. ConfigError for those that would."""
    kept: list[str] = []
    words = iter(tokens)
    for token in words:
        flag, equals, text = token.partition("=")
        dashed = flag.partition(".")[0].removeprefix("--")
        name = dashed.removeprefix("no-").replace("-", "_")
        if not token.startswith("--") or name not in FOREIGN:
            kept.append(token)
            continue
        if FOREIGN[name].switch:
            value = str(not dashed.startswith("no-"))
        else:
            value = text if equals else next(words, "")
        if not changes_nothing(name, value):
            raise ConfigError(f"quire has no flag {flag}: {instead_of(name, _flag)}")
        logger.warning("%s has no effect here and can be left out.", flag)
    return kept


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def gather_dotted(tokens: list[str]) -> list[str]:
    """Turn --flag.a.b 1 --flag.c x into --flag '{"a": {"b": 1}, "c": "x"}'; a key that ends in + appends to a list."""
    kept: list[str] = []
    gathered: dict[str, dict[str, Any]] = {}
    words = iter(tokens)
    for token in words:
        match = re.fullmatch(r"(--[A-Za-z][\w-]*)\.([^=\s]+)(?:=(.*))?", token, re.DOTALL)
        if match is None:
            kept.append(token)
            continue
        text = match[3] if match[3] is not None else next(words, None)
        if text is None:
            raise ConfigError(f"{token} needs a value.")
        _put(gathered.setdefault(match[1], {}), match[2].split("."), _json_or_text(text))
    for flag, value in gathered.items():
        kept += [flag, json.dumps(value)]
    return kept


def _put(target: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        target = target.setdefault(key, {})
    last = keys[-1]
    if last.endswith("+"):
        target.setdefault(last[:-1], []).append(value)
    else:
        target[last] = value


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_config_file(tokens: list[str]) -> list[str]:
    """Put the flags of --config FILE before the others, so that those of the command line win."""
    for index, token in enumerate(tokens):
        if token == "--config" and index + 1 < len(tokens):
            others = tokens[:index] + tokens[index + 2 :]
            return _file_flags(Path(tokens[index + 1]), others) + others
        if token.startswith("--config="):
            others = tokens[:index] + tokens[index + 1 :]
            return _file_flags(Path(token.removeprefix("--config=")), others) + others
    return tokens


def _file_flags(path: Path, others: list[str]) -> list[str]:
    """The flags of a file, less those that the command line has, too."""
    # Imported here: only this flag needs it.
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The config file {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"The config file {path} must hold one flag per line, such as 'port: 8123'.")
    given = {_dashed(token).split("=")[0].removeprefix("--no-").removeprefix("--") for token in others}
    tokens = []
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name in given:
            continue
        if isinstance(value, bool):
            tokens.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            tokens.append(f"--{name}={json.dumps(value)}")
        elif value is not None:
            tokens.append(f"--{name}={value}")
    return tokens

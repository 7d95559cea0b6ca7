"""Checks of single values that a user gives, by name: each returns the value in its normal form or says what is wrong.

Knows no field and no combination of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from quire.errors import ValidationError


def check_boolean(name: str, value: object) -> None:
    """Raise ValidationError unless it is true or false."""
    if not isinstance(value, bool):
        raise ValidationError(f"{name} must be true or false, found {type(value).__name__}", name, value)


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raise ValidationError unless it is an integer within the bounds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValidationError(f"{name} must be an integer, found {type(value).__name__}", name, value)
    if value < least or (most is not None and value > most):
        bounds = f"at least {least}" if most is None else f"between {least} and {most}"
        raise ValidationError(f"{name} must be {bounds}", name, value)


def finite_number(name: str, value: object, least: float, most: float | None = None, open_low: bool = False) -> float:
    """The value as a float. Raises ValidationError unless it is a finite number within the bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValidationError(f"{name} must be a number, found {type(value).__name__}", name, value)
    if not math.isfinite(value):
        raise ValidationError(f"{name} must be finite", name, value)
    if value < least or (open_low and value == least) or (most is not None and value > most):
        low = f"greater than {least:g}" if open_low else f"at least {least:g}"
        high = "" if most is None else f" and at most {most:g}"
        raise ValidationError(f"{name} must be {low}{high}", name, value)
    return float(value)


def texts(name: str, value: object) -> tuple[str, ...]:
    """A string or several, none of them empty, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ValidationError(f"{name} must be a string or a list of strings", name, value)
    if not all(value):
        raise ValidationError(f"{name} must not contain an empty string", name, value)
    return tuple(value)


def token_ids(name: str, value: object, distinct: bool = True) -> tuple[int, ...]:
    """Token ids as a tuple; `distinct`: each one once."""
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ValidationError(f"{name} must be a list of token ids", name, value)
    ids = tuple(value)
    for token in ids:
        check_integer(name, token, 0)
    return tuple(dict.fromkeys(ids)) if distinct else ids


def token_rows(name: str, value: object) -> tuple[tuple[int, ...], ...] | None:
    """Rows of token ids, -1 where a row has none, all of one length; a list of ids alone is one row. None for nothing."""
    given = value.tolist() if hasattr(value, "tolist") else value  # an array
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise ValidationError(f"{name} must be token ids, or a list of token ids for each position", name)
    rows = list(given)
    if all(isinstance(row, int) for row in rows):
        rows = [rows]
    found = [tuple(row) if isinstance(row, Iterable) else (row,) for row in rows]
    width = max(map(len, found), default=0)
    for row in found:
        for token in row:
            check_integer(name, token, -1)
    return tuple(row + (-1,) * (width - len(row)) for row in found) if width else None


def biases(value: object) -> tuple[tuple[int, float], ...]:
    """(token id, bias) pairs, clamped to [-100, 100]; keys may be the strings of JSON."""
    if value is None:
        return ()
    pairs = value.items() if isinstance(value, Mapping) else value
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise ValidationError("logit_bias must map token ids to numbers", "logit_bias", value)
    found: dict[int, float] = {}
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValidationError("logit_bias must map token ids to numbers", "logit_bias", value)
        token, bias = pair
        if isinstance(token, str) and token.isascii() and token.isdigit():
            token = int(token)  # keys of JSON objects are always strings
        if isinstance(token, str):
            raise ValidationError(f"logit_bias has the key {token[:40]!r}, which is no token id", "logit_bias")
        check_integer("logit_bias", token, 0)
        found[token] = min(100.0, max(-100.0, finite_number("logit_bias", bias, -math.inf)))
    return tuple(found.items())


def check_extra_args(value: object) -> None:
    """Raise ValidationError unless it is an object whose integers fit in 64 bits."""
    if value is None:
        return
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValidationError("extra_args must be an object with names as keys", "extra_args", value)
    for key, item in value.items():
        if isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise ValidationError(f"extra_args[{key!r}] does not fit in 64 bits", "extra_args", item)

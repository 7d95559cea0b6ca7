"""Options: sorted into sections, converted, and refused with the nearest name."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from quire.config import EngineOptions, ServeOptions, engine_fields, fitted
from quire.errors import ConfigError


def test_flat_options_find_their_sections() -> None:
    options = EngineOptions.from_flat({"model": "m", "max_num_seqs": 4, "block_size": 32, "threads": 2})
    assert options.model.model == "m"
    assert options.schedule.max_num_seqs == 4
    assert options.cache.block_size == 32
    assert options.parallel.threads == 2


def test_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="max_model_length.*Did you mean 'max_model_len'"):
        EngineOptions.from_flat({"max_model_length": 10})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_model_len", "auto", -1),
        ("gpu_memory_utilization", 1, 1.0),
        ("served_model_name", "one", ("one",)),
        ("served_model_name", ["one", "two"], ("one", "two")),
        ("model", Path("/some/model"), "/some/model"),
        ("block_size", None, None),
        ("seed", None, 0),
        ("enable_prefix_caching", None, True),
        ("hf_overrides", {"a": 1}, {"a": 1}),
    ],
)
def test_values_are_fitted(name: str, value: object, expected: object) -> None:
    section = next(section for section, item in engine_fields() if item.name == name)
    options = EngineOptions.from_flat({name: value})
    assert getattr(getattr(options, section), name) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dtype", "float64"),
        ("max_num_seqs", "many"),
        ("max_num_seqs", True),
        ("enable_prefix_caching", 1),
        ("hf_overrides", "{}"),
        ("model", 7),
    ],
)
def test_wrong_values_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineOptions.from_flat({name: value})


def test_every_option_has_help_and_one_owner() -> None:
    names = [item.name for _, item in engine_fields()]
    assert len(names) == len(set(names))
    for item in [item for _, item in engine_fields()] + list(fields(ServeOptions)):
        assert item.metadata.get("help"), item.name


def test_sections_are_frozen() -> None:
    options = EngineOptions()
    for section in fields(EngineOptions):
        part = getattr(options, section.name)
        assert is_dataclass(part)
        with pytest.raises(AttributeError):
            setattr(part, fields(part)[0].name, None)


def test_fitted_understands_every_annotation() -> None:
    """The default of each option must pass its own check."""
    options = EngineOptions()
    for section, item in engine_fields():
        part = getattr(options, section)
        value = getattr(part, item.name)
        assert fitted(item.name, value, get_type_hints(type(part))[item.name]) == value

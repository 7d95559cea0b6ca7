"""Flags: every form in which a value may be written, and what is said about mistakes."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from quire.cli.flags import FlagParser, human_int
from quire.cli.options import SampleOptions, engine_options, engine_parser, section_of
from quire.config import EngineOptions, ServeOptions
from quire.errors import ConfigError


def options_of(*words: str) -> EngineOptions:
    return engine_options(engine_parser("quire test", "A test.").parse(words))


def complaint_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        options_of(*words)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [("4096", 4096), ("32k", 32_000), ("32K", 32_768), ("1.5m", 1_500_000), ("2M", 2 << 20), ("1g", 10**9), ("-1", -1)],
)
def test_human_integers(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "3x", "1.5", "0.1k5", "1e3"])
def test_what_is_no_integer(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="whole number"):
        human_int(text)


def test_underscores_dashes_and_equals_signs() -> None:
    for words in (["--max-model-len", "64"], ["--max_model_len", "64"], ["--max_model_len=64"], ["--max-model-len=64"]):
        assert options_of(*words).model.max_model_len == 64


def test_auto_length() -> None:
    assert options_of("--max-model-len", "auto").model.max_model_len == -1
    assert options_of("--max-model-len", "-1").model.max_model_len == -1


def test_booleans_have_both_forms() -> None:
    assert options_of("--no-enable-prefix-caching").cache.enable_prefix_caching is False
    assert options_of("--enable_prefix_caching").cache.enable_prefix_caching is True
    assert options_of().schedule.async_scheduling is None
    assert options_of("--async-scheduling").schedule.async_scheduling is True


def test_aliases() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2"):
        options_of("-tp", "2")
    assert options_of("-q", "int8").model.quantization == "int8"


def test_json_and_dotted_values() -> None:
    words = ["--hf-overrides.rope_parameters.factor", "2.5", "--hf_overrides.layer_types+=full", "--hf-overrides.a=b"]
    expected = {"rope_parameters": {"factor": 2.5}, "layer_types": ["full"], "a": "b"}
    assert options_of(*words).model.hf_overrides == expected
    assert options_of("--hf-overrides", '{"x": [1]}').model.hf_overrides == {"x": [1]}


def test_lists() -> None:
    assert options_of("--served-model-name", "a", "b").model.served_model_name == ("a", "b")
    assert options_of("--served-model-name", "a", "--served_model_name", "b").model.served_model_name == ("a", "b")


def test_a_model_that_a_flag_has_taken_for_its_value(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for model in ("Qwen/Qwen3-0.6B", str(tmp_path)):
        with pytest.raises(ConfigError, match="--served-model-name takes all words behind it.*before the flags"):
            options_of("--served-model-name", "a", model)
        assert options_of(model, "--served-model-name", "a", "b/c").model.served_model_name == ("a", "b/c")
    assert options_of("--served-model-name", "a", "b").model.model is None


def test_model_as_argument_or_flag() -> None:
    assert options_of("some/model").model.model == "some/model"
    assert options_of("--model", "some/model").model.model == "some/model"
    assert options_of().model.model is None


def test_config_file_gives_way_to_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text(
        "model: from-file\nmax_num_seqs: 1K\nseed: 3\nenable-prefix-caching: false\n"
        "served-model-name: [a, b]\nhf-overrides: {x: 1}\n"
    )
    options = options_of("--config", str(path), "--seed", "4", "--served-model-name", "c")
    assert options.model.model == "from-file"
    assert options.schedule.max_num_seqs == 1024
    assert options.model.seed == 4
    assert options.cache.enable_prefix_caching is False
    assert options.model.served_model_name == ("c",)
    assert options.model.hf_overrides == {"x": 1}


def test_unknown_key_in_a_config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flags.yaml"
    path.write_text("max-num-sequences: 4\n")
    assert "Did you mean --max-num-seqs?" in complaint_of(capsys, f"--config={path}")


def test_unreadable_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read" in complaint_of(capsys, "--config", "/no/such/file.yaml")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--max-model-lenght", "3"], "Did you mean --max-model-len?"),
        (["--attention-backend", "X"], "Leave it out"),
        (["--mem_fraction_static", "0.5"], "use --gpu-memory-utilization"),
        (["--dtype", "float64"], "invalid choice"),
        (["--max-num-seqs", "lots"], "whole number"),
        (["--hf-overrides", "[1]"], "not a JSON object"),
        (["--hf-overrides", "{"], "not JSON"),
        (["one", "two"], "Unexpected argument 'two'"),
    ],
)
def test_mistakes_are_explained(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = complaint_of(capsys, *words)
    assert part in text
    assert text.startswith("quire test: ")


def test_flags_without_effect_are_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    options = options_of("--enforce-eager", "--swap_space", "4", "--tokenizer-mode=auto", "some/model", "--seed", "3")
    assert (options.model.model, options.model.seed) == ("some/model", 3)
    assert "--enforce-eager has no effect" in caplog.text
    assert "--swap-space has no effect" in caplog.text


def test_sampling_flags_keep_only_what_was_given() -> None:
    parser = FlagParser("quire test", "A test.")
    parser.add_section(SampleOptions, "sampling")
    found = parser.parse(["--temperature", "0", "--stop", "a", "b", "--max-tokens", "1k"])
    chosen = section_of(SampleOptions, found).chosen()
    assert chosen == {"temperature": 0.0, "stop": ("a", "b"), "max_tokens": 1000}


def test_server_flags() -> None:
    parser = engine_parser("quire serve", "Serve.")
    parser.add_section(ServeOptions, "server")
    found = parser.parse(["m", "--port", "8123", "--api-key", "a", "--api-key", "b", "--host", "0.0.0.0"])
    options = section_of(ServeOptions, found)
    assert (options.port, options.api_key, options.host) == (8123, ("a", "b"), "0.0.0.0")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        options_of("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--max-model-len N" in text
    assert "usage: quire test [MODEL] [options]" in text

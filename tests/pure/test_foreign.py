"""Options of other engines: the same table for flags and for LLM, and none of them hides an option of quire."""

from __future__ import annotations

from dataclasses import fields

import pytest

from quire.cli.bench import LatencyOptions
from quire.cli.bench_serve import ServeBenchOptions
from quire.cli.flags import FlagParser
from quire.cli.options import SampleOptions, engine_options, engine_parser
from quire.cli.run_batch import BatchOptions
from quire.cli.verify import VerifyOptions
from quire.cli.workloads import WorkloadOptions
from quire.config import EngineOptions, ServeOptions, engine_fields
from quire.errors import ConfigError
from quire.foreign import FOREIGN, changes_nothing, instead_of
from quire.llm import LLM

OURS = {item.name for _, item in engine_fields()} | {item.name for item in fields(ServeOptions)}
SECTIONS = (BatchOptions, LatencyOptions, SampleOptions, ServeBenchOptions, VerifyOptions, WorkloadOptions)


def parsed(*words: str) -> EngineOptions:
    return engine_options(engine_parser("quire test", "A test.").parse(words))


def test_none_hides_an_option_of_quire() -> None:
    assert not (OURS | {item.name for section in SECTIONS for item in fields(section)}) & FOREIGN.keys()


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_refused_says_what_to_do_instead(name: str) -> None:
    named: list[str] = []

    def note(option: str) -> str:
        named.append(option)
        return option

    text = instead_of(name, note)
    assert set(named) <= OURS
    assert (FOREIGN[name].harmless is None) == (not text), "refused with reason, or taken always"
    assert not text or text.endswith(".")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["--enforce-eager"], {"enforce_eager": False}),
        (["--compilation-config.level", "3"], {"compilation_config": {"level": 3}}),
        (["--swap_space=4"], {"swap_space": 8}),
        (["--task", "generate"], {"task": "auto"}),
        (["--no-enable-lora"], {"enable_lora": False}),
        (["--cpu-offload-gb", "0"], {"cpu_offload_gb": 0.0}),
        (["--distributed-executor-backend", "mp"], {"distributed_executor_backend": None}),
        (["--limit-mm-per-prompt", "{}"], {"limit_mm_per_prompt": {}}),
    ],
)
def test_what_changes_nothing_is_taken(
    words: list[str], values: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    assert parsed(*words, "some/model", "--seed", "3").model.seed == 3
    assert "no effect" in caplog.text
    assert all(changes_nothing(name, value) for name, value in values.items())


@pytest.mark.parametrize(
    ("words", "name", "value", "flag", "keyword"),
    [
        (["--task", "embed"], "task", "embed", "generates text", "generates text"),
        (["--enable-lora"], "enable_lora", True, "merge them", "merge them"),
        (["--context_length", "64"], "context_length", 64, "use --max-model-len.", "use max_model_len."),
        (["--tokenizer-mode", "mistral"], "tokenizer_mode", "mistral", "files", "files"),
        (["--rope-scaling", '{"factor": 2}'], "rope_scaling", {"factor": 2}, "--hf-overrides", " hf_overrides"),
    ],
)
def test_what_would_change_something_is_refused_alike(
    words: list[str], name: str, value: object, flag: str, keyword: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        FlagParser("quire test", "A test.").parse(words)
    assert flag in capsys.readouterr().err
    with pytest.raises(ConfigError, match=name) as caught:
        LLM(**{name: value})
    assert keyword in str(caught.value)

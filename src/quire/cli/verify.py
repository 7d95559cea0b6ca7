"""quire verify MODEL: our logits beside those of Transformers, on the same prompts and weights.

Prints the differences and the first decoder layer that departs; exits with 1 past the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quire import env
from quire.cli.flags import FlagParser
from quire.cli.options import add_engine_flags, add_model_argument, engine_options, section_of
from quire.config import option, refuse_nonsense

BUILT_IN_PROMPTS = (
    "Once upon a time there was a miller who had three sons, a mill, a donkey and a cat.",
    "The quick brown fox jumps over the lazy dog. 0123456789 + 42 = ?",
    "def greet(name: str) -> str:\n    return f'Hello, {name}!'\n\nprint(greet('world'))\n",
    "Question: What is the capital of France?\nAnswer:",
)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """What is compared, and how far apart it may be."""

    prompt: tuple[str, ...] = option((), help="texts to compare on; built-in ones when not given")
    prompt_file: str | None = option(None, help="file of texts, one a line")
    chunk: int | None = option(None, help="compute our side in spans of so many positions", least=1)
    max_kl: float | None = option(None, help="largest mean KL divergence; 0.0001 in float32, else 0.02")
    min_top1: float | None = option(None, help="least share of equal most likely tokens; 0.999 in float32, else 0.95")

    def __post_init__(self) -> None:
        """Raise ConfigError for numbers that mean nothing."""
        refuse_nonsense(self)


@dataclass(frozen=True, slots=True)
class Report:
    """What came out. Differences of logits, KL in nats, the layers' relative differences in order."""

    model: str
    dtype: str
    path: str
    tier: str
    positions: int
    max_difference: float
    mean_difference: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    layers: tuple[float, ...]
    first_departing_layer: int | None
    kl_tolerance: float
    top1_tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both tolerances hold."""
        return self.mean_kl <= self.kl_tolerance and self.top1_agreement >= self.top1_tolerance


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser("quire verify", "Compare a model's logits with those of Transformers.", "[MODEL]")
    add_model_argument(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_section(VerifyOptions, "comparison")
    add_engine_flags(parser)
    found = parser.parse(argv)
    env.set_up_logging("warning")
    # Imported here: torch and transformers take seconds, and mistakes in flags should answer at once.
    from quire.cli.compare import compare

    wanted = section_of(VerifyOptions, found)
    report = compare(engine_options(found), wanted, texts_of(wanted))
    print(json.dumps(asdict(report) | {"passed": report.passed}, indent=2) if found.json else as_text(report))
    return 0 if report.passed else 1


def texts_of(wanted: VerifyOptions) -> tuple[str, ...]:
    """The prompts to compare on."""
    if wanted.prompt_file is not None:
        lines = Path(wanted.prompt_file).read_text(encoding="utf-8").splitlines()
        return (*wanted.prompt, *(line for line in lines if line.strip()))
    return wanted.prompt or BUILT_IN_PROMPTS


def as_text(report: Report) -> str:
    """The report for people."""
    if report.first_departing_layer is None:
        departs = f"none of {len(report.layers)}" if report.layers else "the layers could not be told apart"
    else:
        first = report.first_departing_layer
        departs = f"number {first}, by {report.layers[first]:.2%} of its norm"
    rows = [
        ("model", f"{report.model} in {report.dtype}, {report.path} path, tier {report.tier}"),
        ("positions", f"{report.positions:,}"),
        ("logits differ", f"at most {report.max_difference:.4g}, {report.mean_difference:.4g} in the mean"),
        (
            "KL divergence",
            f"{report.mean_kl:.3g} in the mean (tolerance {report.kl_tolerance:g}), at most {report.max_kl:.3g}",
        ),
        ("same top token", f"{report.top1_agreement:.2%} (tolerance {report.top1_tolerance:.2%})"),
        ("departing layer", departs),
        ("verdict", "equal within the tolerance" if report.passed else "DIFFERENT beyond the tolerance"),
    ]
    return "\n".join(f"{name:<16} {text}" for name, text in rows)

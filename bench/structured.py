"""What structured outputs cost: what masks add to a step, and the steps that forced tokens save, on the bundled model.

    python bench/structured.py [--rows 32] [--tokens 100] [--threads 1]
    python bench/structured.py --shape llama-3.2-1b --tokens 12 --repeats 2   # random weights, a made vocabulary

Masks are filled beside the model; what counts is the time for which the step works on them or waits for them, and how long
a step takes beside one of the same rows without a form. The bundled model is tiny, so this is the worst case: beside a
larger one masks cost what its vocabulary asks for. A shape gets the bundled tokenizer, with tokens made of two of its own
until there are as many as the shape wants.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from shapes import SHAPES, write_shape

import quire
from quire import LLM, SamplingParams, StructuredOutputsParams
from quire.grammar import Constraint, MaskFiller
from quire.worker.runner import Runner
from quire.worker.structured import StructuredOutputs

BUNDLED = Path(quire.__file__).parent / "bundled" / "model"
BUNDLED_SIZE = 4096  # of its vocabulary, with room behind the last token
FORMS: dict[str, dict[str, Any]] = {
    "schema": {
        "json": {
            "type": "object",
            "properties": {f"k{number}": {"type": "string", "maxLength": 40} for number in range(8)},
            "additionalProperties": False,
        }
    },
    "record": {
        "json": {
            "type": "object",
            "properties": {
                name: {"type": "integer", "maximum": 999, "minimum": 0}
                for name in ("street_number", "postal_code", "number_of_rooms", "year_of_construction")
            },
            "required": ["street_number", "postal_code", "number_of_rooms", "year_of_construction"],
            "additionalProperties": False,
        },
        "disable_any_whitespace": True,
    },
    "json_object": {"json_object": True},
    "regex": {"regex": "[a-z ]{400}"},
    "choice": {"choice": [f"the answer number {number}" for number in range(1000)]},
}


@dataclass
class Spent:
    """Seconds, and calls."""

    seconds: float = 0.0
    calls: int = 0


def watched(owner: type, names: tuple[str, ...]) -> Spent:
    """Count the time of these methods from now on."""
    spent = Spent()

    def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent.seconds += time.perf_counter() - began
                spent.calls += 1

        return run

    for name in names:
        setattr(owner, name, wrapped(getattr(owner, name)))
    return spent


def write_model(shape: str, folder: Path) -> Path:
    """A model of this shape without weights, whose tokenizer has as many tokens as the shape; its folder."""
    target = write_shape(shape, folder)
    shutil.copy(BUNDLED / "tokenizer_config.json", target)
    made = json.loads((BUNDLED / "tokenizer.json").read_text())
    vocabulary, merges = made["model"]["vocab"], made["model"]["merges"]
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    free = iter(range(BUNDLED_SIZE, SHAPES[shape]["vocab_size"]))
    for first, second in product(pieces, pieces):
        if first + second not in vocabulary:
            number = next(free, None)
            if number is None:
                break
            vocabulary[first + second] = number
            merges.append([first, second])
    (target / "tokenizer.json").write_text(json.dumps(made))
    return target


def ask(llm: LLM, form: dict[str, Any] | None, rows: int, tokens: int, endless: bool) -> float:
    """Seconds of a batch in one form, each row with a seed of its own; `endless` goes on behind the form's end."""
    held = None if form is None else StructuredOutputsParams(**form)
    params = [
        SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=endless, structured_outputs=held)
        for seed in range(rows)
    ]
    began = time.perf_counter()
    llm.generate(["Once upon a time"] * rows, params, use_tqdm=False)
    return time.perf_counter() - began


@dataclass
class Step:
    """A step of a batch in a form: milliseconds, those spent for masks, and those of a step without any form."""

    whole: float
    masks: float
    filling: float
    plain: float


def step_of(llm: LLM, form: dict[str, Any], given: argparse.Namespace, watching: tuple[Spent, Spent, Spent]) -> Step:
    """Medians of rounds, with and without the form in turns. The round before them fills caches."""
    steps, added, beside = watching
    rounds = []
    for _ in range(given.repeats + 1):
        taken = []
        for wanted in (None, form):
            for spent in watching:
                spent.seconds, spent.calls = 0.0, 0
            ask(llm, wanted, given.rows, given.tokens, endless=True)
            taken.append([1e3 * spent.seconds / steps.calls for spent in watching])
        rounds.append((*taken[1], taken[0][0]))
    return Step(*(median(column) for column in zip(*rounds[1:], strict=True)))


def forcing(llm: LLM, form: dict[str, Any], given: argparse.Namespace, steps: Spent) -> str:
    """What forced tokens bring, each output up to its end: what comes behind it is not forced, but nothing."""
    forced = Constraint.forced
    best, count = dict.fromkeys((True, False), float("inf")), {}
    for _ in range(given.repeats):
        for jumps in best:
            Constraint.forced = forced if jumps else lambda self: []  # type: ignore[method-assign]
            steps.calls = 0
            best[jumps] = min(best[jumps], ask(llm, form, given.rows, given.tokens, endless=False))
            count[jumps] = steps.calls
    Constraint.forced = forced  # type: ignore[method-assign]
    return f"{count[True]} steps for {count[False]}, {best[False] / best[True]:.2f} times as fast"


def main() -> None:
    """Print one line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights in place of the bundled model's")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--forms", nargs="+", choices=sorted(FORMS), default=list(FORMS))
    parser.add_argument("--masks-only", action="store_true", help="do not measure forced tokens")
    given = parser.parse_args()
    watching = (
        watched(Runner, ("run",)),
        watched(StructuredOutputs, ("begin", "apply", "guide")),
        watched(MaskFiller, ("fill",)),
    )
    options: dict[str, Any] = {"max_num_seqs": given.rows, "max_model_len": 512, "threads": given.threads}
    with tempfile.TemporaryDirectory() as folder:
        model = given.model
        if given.shape is not None:
            model = str(write_model(given.shape, Path(folder)))
            options |= {"load_format": "dummy", "kv_cache_memory_bytes": 1 << 30}
        with LLM(model, device="cpu", **options) as llm:
            for name in given.forms:
                step = step_of(llm, FORMS[name], given, watching)
                jumps = "" if given.masks_only else f"; forced tokens: {forcing(llm, FORMS[name], given, watching[0])}"
                print(
                    f"{name:12} step {step.whole:6.2f} ms, of it masks {step.masks:5.3f} ms = "
                    f"{step.masks / step.whole:4.1%} (filled beside it in {step.filling:5.3f} ms); "
                    f"without a form {step.plain:6.2f} ms, {step.whole / step.plain - 1:+.1%}{jumps}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

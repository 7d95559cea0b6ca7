"""What structured outputs cost: what masks add to a step, and the steps that forced tokens save, on the bundled model.

    python bench/structured.py [--rows 32] [--tokens 100] [--threads 1]

Masks are filled beside the model; what counts is the time for which the step works on them or waits for them. The bundled
model is tiny, so this is the worst case: masks cost the same beside a model a hundred times as large.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quire import LLM, SamplingParams
from quire.grammar import Constraint, MaskFiller
from quire.worker.runner import Runner
from quire.worker.structured import StructuredOutputs

FORMS = {
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


def ask(llm: LLM, form: dict[str, Any], rows: int, tokens: int, endless: bool) -> float:
    """Seconds of a batch in one form, each row with a seed of its own; `endless` goes on behind the form's end."""
    params = [
        SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=endless, structured_outputs=form)
        for seed in range(rows)
    ]
    began = time.perf_counter()
    llm.generate(["Once upon a time"] * rows, params, use_tqdm=False)
    return time.perf_counter() - began


def main() -> None:
    """Print one line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="of which the fastest counts, for forced tokens")
    given = parser.parse_args()
    steps = watched(Runner, ("run",))
    added = watched(StructuredOutputs, ("begin", "apply", "guide"))
    beside = watched(MaskFiller, ("fill",))
    forced = Constraint.forced
    with LLM(given.model, max_num_seqs=given.rows, max_model_len=512, threads=given.threads, device="cpu") as llm:
        for name, form in FORMS.items():
            ask(llm, form, given.rows, given.tokens, endless=True)  # the first time fills caches
            for spent in (steps, added, beside):
                spent.seconds, spent.calls = 0.0, 0
            ask(llm, form, given.rows, given.tokens, endless=True)
            step, wait, fill = (1e3 * spent.seconds / steps.calls for spent in (steps, added, beside))
            # Both ways in turns, and each output up to its end: what comes behind it is not forced, but nothing.
            best, count = dict.fromkeys((True, False), float("inf")), {}
            for _ in range(given.repeats):
                for jumps in best:
                    Constraint.forced = forced if jumps else lambda self: []  # type: ignore[method-assign]
                    steps.calls = 0
                    best[jumps] = min(best[jumps], ask(llm, form, given.rows, given.tokens, endless=False))
                    count[jumps] = steps.calls
            Constraint.forced = forced  # type: ignore[method-assign]
            print(
                f"{name:12} step {step:6.2f} ms, of it masks {wait:5.3f} ms = {wait / step:4.1%} "
                f"(filled beside it in {fill:5.3f} ms); forced tokens: {count[True]} steps for "
                f"{count[False]}, {best[False] / best[True]:.2f} times as fast"
            )


if __name__ == "__main__":
    main()

"""What structured outputs cost: CPU time of the masks beside that of the whole step, for batches of the bundled model.

    python bench/structured.py [--rows 32] [--tokens 100]

The bundled model is tiny, so this is the worst case: masks cost the same beside a model a hundred times as large.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch

from quire import LLM, SamplingParams
from quire.core.plan import StepPlan, StepResult
from quire.worker.batch import Rows
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
    "json_object": {"json_object": True},
    "regex": {"regex": "[a-z ]{400}"},
    "choice": {"choice": [f"the answer number {number}" for number in range(1000)]},
}


@dataclass
class Spent:
    """Seconds of CPU time."""

    masks: float = 0.0
    steps: float = 0.0
    count: int = 0


def watch(spent: Spent) -> None:
    """Count the time of both from now on."""
    apply, run = StructuredOutputs.apply, Runner.run

    def timed_apply(self: StructuredOutputs, logits: torch.Tensor, using: list[int], rows: Rows) -> None:
        began = time.process_time()
        apply(self, logits, using, rows)
        spent.masks += time.process_time() - began

    def timed_run(self: Runner, plan: StepPlan) -> StepResult:
        began = time.process_time()
        result = run(self, plan)
        spent.steps += time.process_time() - began
        spent.count += 1
        return result

    StructuredOutputs.apply = timed_apply  # type: ignore[method-assign]
    Runner.run = timed_run  # type: ignore[method-assign]


def main() -> None:
    """Print one line for each form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=100)
    given = parser.parse_args()
    spent = Spent()
    watch(spent)
    with LLM(max_num_seqs=given.rows, max_model_len=512, threads=1, device="cpu") as llm:
        for name, form in FORMS.items():
            params = [
                SamplingParams(max_tokens=given.tokens, seed=seed, ignore_eos=True, structured_outputs=form)
                for seed in range(given.rows)
            ]
            llm.generate(["Once upon a time"] * given.rows, params, use_tqdm=False)  # the first time fills caches
            spent.masks, spent.steps, spent.count = 0.0, 0.0, 0
            llm.generate(["Once upon a time"] * given.rows, params, use_tqdm=False)
            step, masks = (1e3 * seconds / spent.count for seconds in (spent.steps, spent.masks))
            print(f"{name:12} step {step:7.2f} ms, masks {masks:6.3f} ms = {masks / step:.1%}")


if __name__ == "__main__":
    main()

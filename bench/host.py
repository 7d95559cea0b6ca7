"""What a decode step costs beside its kernels, by part, with the model's forward in Python and as a program in alternation.

    python bench/host.py [--shape qwen3-0.6b] [--paths native transformers] [--batch 1] [--steps 96] [--quantization int8]

Random weights of a well-known shape, one engine in this process, `batch` requests that decode together. Every few steps
the model changes between the program and the forward that it was recorded from; both see the same steps otherwise. Medians
per step in microseconds. The native calls are timed inside the program; the forward in Python makes the same ones, so what
it costs beyond them is Python's. "text and rest" is the engine around scheduler and worker.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_shape

from quire import LLM, SamplingParams
from quire.models.programs.recorded import RecordedModel
from quire.worker import runner as runner_module

PROMPT = 16
TURN = 8  # steps before the model changes
PARTS = ("schedule", "gather", "forward", "native calls", "sample", "keep", "results", "apply", "step")


class Clock:
    """Adds up what timed functions take within a step."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}

    def watch(self, holder: Any, name: str, part: str) -> None:
        """Time holder.name from now on."""
        setattr(holder, name, self.timed(getattr(holder, name), part))

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = function(*args, **kwargs)
            self.now[part] = self.now.get(part, 0.0) + time.perf_counter() - start
            return found

        return call

    def take(self) -> dict[str, float]:
        """The seconds since the last call, by part."""
        found, self.now = self.now, {}
        return found


def measure(model: Path, path: str, batch: int, steps: int, quantization: str | None) -> dict[str, dict[str, float]]:
    """Median microseconds by part, for "python" and "program"."""
    llm = LLM(
        str(model), load_format="dummy", skip_tokenizer_init=True, model_impl=path, quantization=quantization,
        max_model_len=1024, max_num_seqs=batch, enable_prefix_caching=False,
    )  # fmt: skip
    engine = llm._engine
    core: Any = engine._core
    runner = core._executor._worker._runner
    recorded = runner._model
    if not isinstance(recorded, RecordedModel):
        raise SystemExit(f"{path}: its steps are not a program; the log says why")
    clock = Clock()
    for holder, name, part in (
        (core._scheduler, "schedule", "schedule"),
        (core._scheduler, "apply", "apply"),
        (runner_module, "gather", "gather"),
        (recorded, "forward", "forward"),
        (recorded.model, "forward", "forward"),
        (recorded.program, "_call", "native calls"),
        (runner, "_sample", "sample"),
        (runner, "_keep", "keep"),
        (runner, "_results", "results"),
    ):
        clock.watch(holder, name, part)
    # The program's own way around a step that is too large goes to the untimed forward.
    plain = recorded.model
    first = 2 + batch * PROMPT // 512  # steps until all have read their prompts
    params = SamplingParams(temperature=0.0, max_tokens=steps + first + 1, ignore_eos=True)
    prompts = [[7 + (index * 31 + place) % 500 for place in range(PROMPT)] for index in range(batch)]
    for request in llm._prepare(prompts, params, None, special=True):
        engine.submit(request)
    found: dict[str, list[dict[str, float]]] = {"python": [], "program": []}
    for _ in range(first):
        engine.step()
    for step in range(steps):
        kind = ("python", "program")[step // TURN % 2]
        runner._model = recorded if kind == "program" else plain
        clock.take()
        start = time.perf_counter()
        engine.step()
        taken = clock.take()
        taken["step"] = time.perf_counter() - start
        if step % TURN:  # the first after a change warms up
            found[kind].append(taken)
    runner_module.gather = gather
    llm.close()
    return {
        kind: {part: 1e6 * statistics.median(one.get(part, 0.0) for one in taken) for part in PARTS}
        for kind, taken in found.items()
    }


gather = runner_module.gather


def show(path: str, batch: int, found: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    python, program = found["python"], found["program"]
    native = program["native calls"]
    rows: list[tuple[str, float, float]]
    rows = [(part, python[part], program[part]) for part in ("schedule", "gather")]
    rows += [("forward: Python", python["forward"] - native, program["forward"] - native)]
    rows += [("forward: native calls", native, native)]
    rows += [(part, python[part], program[part]) for part in ("sample", "keep", "results", "apply")]
    outer = ("schedule", "gather", "forward", "sample", "keep", "results", "apply")
    before, after = (one["step"] - sum(one[part] for part in outer) for one in (python, program))
    rows += [("text and rest", before, after)]
    rows += [("step", python["step"], program["step"])]
    rows += [("step without native calls", python["step"] - native, program["step"] - native)]
    print(f"\n{path}, batch {batch}: microseconds per step")
    print(f"{'':28}{'in Python':>12}{'program':>12}")
    for name, before, after in rows:
        print(f"{name:28}{before:12.0f}{after:12.0f}")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=sorted(SHAPES))
    parser.add_argument("--paths", nargs="+", default=["native", "transformers"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--quantization", default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(options.shape, Path(folder))
        for batch in options.batch:
            for path in options.paths:
                found = measure(model, path, batch, options.steps, options.quantization)
                show(path, batch, found)
                results[f"{path}, batch {batch}"] = found
            if len(options.paths) == 2:
                one, two = (results[f"{path}, batch {batch}"]["program"]["step"] for path in options.paths)
                print(f"\nbatch {batch}: {options.paths[1]} takes {two / one:.3f} of {options.paths[0]}'s time")
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

"""What speculative decoding brings: acceptance and wall-clock speed-up over plain decoding, per method and batch size.

python bench/speculate.py --batch-sizes 1 32                     # the bundled model: retelling, summarising, prose
python bench/speculate.py --shape llama-3.2-1b --output-len 64   # random weights, a summary and an edit dictated to them
python bench/speculate.py --shape llama-3.2-1b --methods eagle medusa --forced   # heads of zeros: what guessing costs
python bench/speculate.py --methods medusa:FOLDER                # heads made by tools/train_heads.py

Without --forced the engine leaves off where guesses do not pay, as it does by itself. All engines are alive at once and
take turns, so that whatever else runs on the machine slows all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dictation import DICTATIONS
from empty_heads import write_heads
from shapes import SHAPES, write_shape

import quire
from quire import LLM, SamplingParams
from quire.engine.prompts import TokensPrompt
from quire.text.tokenizer import load_tokenizer

BUNDLED = Path(quire.__file__).parent / "bundled" / "model"
WORDS = (
    "mill",
    "blue",
    "London",
    "Clara",
    "river",
    "stone",
    "seven",
    "grey",
    "horse",
    "winter",
    "bread",
    "old",
    "lamp",
)
STORY = (
    "The old miller had three sons, and when he died he left the mill to the first, the horse to the second, and to the "
    "third nothing but a grey cat. The third son sat by the river and wept. "
)


@dataclass(frozen=True)
class Figure:
    """One method on one workload."""

    workload: str
    batch: int
    method: str
    tokens_per_second: float
    speedup: float
    accepted: float  # share of the guesses that were right
    tokens_per_step: float  # of one request


@dataclass(frozen=True)
class Job:
    """One request: its prompt, and what is dictated to it, both as token ids."""

    prompt: list[int]
    says: list[int] | None = None


def jobs_of(workload: str, count: int, dictating: bool) -> list[Job]:
    """Requests, each its own. All models get the bundled model's token ids."""
    rng = random.Random(5)
    tokenizer = load_tokenizer(str(BUNDLED))
    found = []
    for index in range(count):
        words = " ".join(rng.choice(WORDS) for _ in range(40))
        if workload in DICTATIONS and dictating:
            prompt, says = DICTATIONS[workload]
            found.append(Job(tokenizer.encode(f"{index}. {prompt}"), tokenizer.encode(says)))
        elif workload == "prose":
            found.append(Job(tokenizer.encode(f"Once upon a time there was a {words[:30]}")))
        else:
            ask = f"Say again: {words}." if workload == "retell" else f"Tell in short: {STORY}{words}."
            text = tokenizer.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True)
            found.append(Job(tokenizer.encode(text, add_special_tokens=False)))
    return found


def once(llm: LLM, jobs: list[Job], wish: dict[str, Any], turn: int) -> tuple[float, int]:
    """Seconds and tokens of one run. No turn knows what was said in another one."""
    params = [SamplingParams(**wish, extra_args={"says": job.says} if job.says else None) for job in jobs]
    began = time.perf_counter()
    prompts = [TokensPrompt(prompt_token_ids=job.prompt, cache_salt=f"turn {turn}") for job in jobs]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - began, sum(len(item.outputs[0].token_ids) for item in outputs)


def measure(
    llms: dict[str, LLM], workload: str, batch: int, output_len: int, temperature: float, repeats: int, dictating: bool
) -> list[Figure]:
    """Every method on one workload, medians of `repeats` rounds; a round before them warms up.

    A speed-up is that of a run beside the plain one of its round; rounds begin with another engine each.
    """
    wish = {"temperature": temperature, "max_tokens": output_len, "ignore_eos": True, "seed": 1, "detokenize": False}
    taken: dict[str, list[float]] = {name: [] for name in llms}
    names, tokens = list(llms), 0
    figures = []
    before = {name: llm._engine.stats() for name, llm in llms.items()}
    jobs = jobs_of(workload, batch, dictating)
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds, tokens = once(llms[name], jobs, wish, turn)
            if turn:
                taken[name].append(seconds)
    for name, llm in llms.items():
        earlier, last = before[name], llm._engine.stats()
        drafted = last.draft_tokens - earlier.draft_tokens
        accepted = last.accepted_tokens - earlier.accepted_tokens
        made = last.generated_tokens - earlier.generated_tokens
        figures.append(
            Figure(
                workload,
                batch,
                name,
                tokens / median(taken[name]),
                median(plain / own for plain, own in zip(taken["plain"], taken[name], strict=True)),
                accepted / drafted if drafted else 0.0,
                made / (made - accepted),
            )
        )
    return figures


def method_config(name: str) -> dict[str, object]:
    """The configuration of a method, as the command line names it."""
    method, _, folder = name.partition(":")
    return {"method": method, "model": folder} if folder else {"method": method}


def main() -> None:
    """Run all combinations, print a table, keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), help="a model with random weights in place of the bundled one"
    )
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--output-len", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--methods", nargs="+", help="method, or method:folder; without a word all that need no further folder"
    )
    parser.add_argument("--workloads", nargs="+", help="some of retell, summary, prose; with --shape summary, edit")
    parser.add_argument("--forced", action="store_true", help="guess even where it does not pay")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    found = parser.parse_args()
    wanted = found.methods or ["ngram", "suffix", *(["draft_model", "eagle"] if found.shape is None else [])]
    methods: dict[str, dict[str, object]] = {
        "plain": {},
        **{name.partition(":")[0]: method_config(name) for name in wanted},
    }
    options: dict[str, Any] = {"device": "cpu", "threads": found.threads, "max_model_len": 1024}
    options |= {"kv_cache_memory_bytes": 1 << 28}
    workloads = found.workloads or (["retell", "summary", "prose"] if found.shape is None else list(DICTATIONS))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        if found.shape is not None:
            options |= {"model": str(write_shape(found.shape, Path(folder)))}
            options |= {"load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 30}
            options |= {"logits_processors": ("dictation:dictated",)}
            for name in {"eagle", "medusa"} & methods.keys():
                methods[name] = {**methods[name], "model": str(write_heads(name, found.shape, Path(folder)))}
        llms = {
            name: LLM(**options, speculative_config={**config, "adaptive": not found.forced} if config else {})
            for name, config in methods.items()
        }
        print(
            f"{'workload':10}{'batch':>6}  {'method':14}{'tokens/s':>10}{'speed-up':>10}{'accepted':>10}{'per step':>10}"
        )
        for batch in found.batch_sizes:
            for workload in workloads:
                for item in measure(
                    llms, workload, batch, found.output_len, found.temperature, found.repeats, found.shape is not None
                ):
                    print(
                        f"{item.workload:10}{item.batch:6}  {item.method:14}{item.tokens_per_second:10.1f}"
                        f"{item.speedup:10.2f}{item.accepted:10.1%}{item.tokens_per_step:10.2f}"
                    )
                    figures.append(item)
        for llm in llms.values():
            llm.close()
    found.results.mkdir(exist_ok=True)
    name = f"speculate-{found.shape or 'bundled'}{'-forced' if found.forced else ''}.json"
    (found.results / name).write_text(json.dumps([asdict(item) for item in figures], indent=1))


if __name__ == "__main__":
    main()

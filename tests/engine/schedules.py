"""Random schedules for one mixed workload, to find that every request has exactly one answer, down to the bits.

What a schedule may change: step sizes, chunks, rows, pages (and so preemptions), the prefix cache, plans in flight, the
order of the line, arrivals, batch mates that come and are aborted, ways of guessing, threads, and restarts in which
everything but the journal is lost.

python tests/engine/schedules.py --count 50     # prints its seeds; --seed N --count 1 runs one of them again
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from quire import BeamSearchParams, SamplingParams
from quire.config import EngineOptions
from quire.core.params import RequestOutputKind, StructuredOutputsParams
from quire.core.plan import Event
from quire.core.request import CoreRequest
from quire.core.scheduler import Scheduler
from quire.core.stats import Stats
from quire.engine.beam_requests import best_tokens, round_of, scoring, search_of
from quire.engine.beams import BeamSearch, Scores
from quire.engine.core import EngineCore
from quire.engine.engine import Engine, Prepared
from quire.engine.executor import LocalExecutor
from quire.engine.journal import Journal
from quire.engine.outputs import RequestOutput
from quire.engine.prompts import Prompt, TokensPrompt
from quire.engine.start import Loaded, load

ROWS, PAGE = 16, 16
OPTIONS = {
    "device": "cpu",
    "threads": 1,
    "kv_cache_memory_bytes": 1 << 26,
    "max_model_len": 192,
    "max_num_seqs": ROWS,
    "block_size": PAGE,
    "max_num_batched_tokens": 1024,
}
GUESSING: dict[str, dict[str, object]] = {
    "nobody": {},
    "ngram": {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 5, "adaptive": False},
    "suffix": {"method": "suffix", "prompt_lookup_min": 1, "adaptive": False},
    "eagle": {"method": "eagle", "num_speculative_tokens": 3, "adaptive": False},
    "draft model": {"method": "draft_model", "num_speculative_tokens": 3, "adaptive": False},
}

RIVER = "The fox ran to the river. The cat ran to the river. The dog ran to the"
SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 8}, "colour": {"enum": ["red", "green"]}},
    "required": ["place", "colour"],
    "additionalProperties": False,
}
FORM = StructuredOutputsParams(json=SCHEMA)
WORDS = StructuredOutputsParams(regex="(the (cat|dog|river) ){4}")

# (prompt, wishes): every kind of choosing, alone and together.
WISHES: tuple[tuple[str, dict[str, object]], ...] = (
    (RIVER, {"temperature": 0.0}),
    (RIVER + " river. The", {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 3}),
    ("Once upon a time there was a", {"temperature": 1.0, "seed": 5, "logprobs": 0}),
    (RIVER + " sea. The", {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.4, "seed": 6}),
    (RIVER + " hill and", {"temperature": 0.7, "top_k": 8, "n": 3, "seed": 7, "logprobs": 1}),
    (
        "It was a dark night, and",
        {"temperature": 0.6, "min_p": 0.1, "bad_words": ["the"], "logit_bias": {17: 3.0}, "seed": 4},
    ),
    (RIVER + " mill.", {"temperature": 0.0, "stop": ["and", "was"], "include_stop_str_in_output": True}),
    ("A", {"temperature": 0.9, "min_tokens": 12, "stop_token_ids": [267, 281], "seed": 8, "presence_penalty": 0.2}),
    (RIVER * 3, {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 2}),
    ("The hare in the river is red. Answer in JSON.", {"temperature": 0.0, "structured_outputs": FORM}),
    ("The hare in the mill is green. In JSON:", {"temperature": 1.0, "structured_outputs": FORM, "seed": 9, "n": 2}),
    (RIVER, {"temperature": 0.9, "structured_outputs": WORDS, "seed": 10, "logprobs": 1}),
    ("red blue green " * 14, {"temperature": 0.0, "ignore_eos": True, "logprobs": 0}),
    (RIVER * 2, {"temperature": 0.5, "top_p": 0.7, "seed": 11, "allowed_token_ids": list(range(260, 1200))}),
)
SEARCHES = (
    ("The old man went to the", 3, None),
    (RIVER, 2, None),
    (RIVER, 3, {"regex": "[A-Z][a-z]{2,5}( [a-z]+){2,9}"}),
)


@dataclass(frozen=True)
class Schedule:
    """One way of running the workload, drawn by its seed."""

    seed: int
    guessing: str
    budget: int  # positions of a step
    chunk: int  # most positions of one prompt in a step, 0 without limit
    rows: int
    pages: int
    caching: bool
    in_flight: int
    policy: str
    threads: int
    restarts: tuple[int, ...]  # steps before which everything but the journal is lost
    mates: int
    spread: int  # steps over which requests arrive

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        """The schedule of a seed."""
        rng = random.Random(seed)
        rows = rng.choice((1, 2, 5, ROWS, ROWS))
        return cls(
            seed=seed,
            guessing=rng.choice(tuple(GUESSING)),
            budget=max(rows, rng.choice((3, 7, 16, 33, 64, 200, 1024, 1024))),
            chunk=rng.choice((0, 0, 0, 5, 17)),
            rows=rows,
            pages=rng.choice((11, 14, 20, 40, 400)),
            caching=rng.random() < 0.7,
            in_flight=rng.choice((1, 1, 2)),
            policy=rng.choice(("fcfs", "priority")),
            threads=rng.choice((1, 1, 1, 2)),
            restarts=tuple(sorted(rng.sample(range(1, 60), rng.choice((0, 0, 1, 2))))),
            mates=rng.choice((0, 0, 3, 8)),
            spread=rng.choice((1, 10, 40)),
        )


class Reborn:
    """A core whose engine dies before given steps: a new one goes on from the journal, as after a crash."""

    def __init__(self, make: Callable[[], EngineCore], deaths: Sequence[int]) -> None:
        self._make = make
        self._core = make()
        self._deaths = set(deaths)
        self._journal = Journal()
        self._steps = 0
        self._early: list[Event] = []  # requests that turned out to have ended at a restart
        self.gone: list[Stats] = []  # of the cores that died

    def add(self, request: CoreRequest) -> Event | None:
        event = self._core.add(request)
        if event is None:
            self._journal.open(request)
        return event

    def abort(self, request_id: str) -> Event | None:
        entry = self._journal.find(request_id)
        if entry is not None:
            self._journal.close(entry)
        return self._core.abort(request_id)

    def has_work(self) -> bool:
        return bool(self._early) or self._core.has_work()

    def step(self) -> list[Event]:
        self._steps += 1
        if self._steps in self._deaths:
            self._restart()
        early, self._early = self._early, []
        return [self._noted(event) for event in [*early, *self._core.step()]]

    def interrupt(self) -> None:
        pass

    def stats(self) -> Stats:
        return self._core.stats()

    def reset_prefix_cache(self) -> bool:
        return self._core.reset_prefix_cache()

    def close(self) -> None:
        pass

    def _restart(self) -> None:
        self.gone.append(self._core.stats())
        self._core = self._make()
        for entry in self._journal:
            entry.restart()
            event = self._core.add(replace(entry.request, generated=(*entry.request.generated, *entry.emitted)))
            if event is not None:
                self._early.append(event)

    def _noted(self, event: Event) -> Event:
        entry = self._journal.find(event.request_id)
        assert entry is not None, "an event of nobody"
        event = entry.take(event)
        if event.finish_reason is not None:
            self._journal.close(entry)
        return event


@dataclass
class _Search:
    """A beam search on its way: the requests of the present round, by id."""

    search: BeamSearch
    first: Prepared
    asked: list[str] = field(default_factory=list)
    scored: dict[str, Scores] = field(default_factory=dict)


class Workload:
    """The model under every way of guessing, loaded once each; run() and alone() give an answer for each request."""

    def __init__(self) -> None:
        self._loaded: dict[str, Loaded] = {}
        self.seen: Counter[str] = Counter()  # what happened in all runs

    def requests(self) -> dict[str, tuple[Prompt, SamplingParams]]:
        """By name. Every fourth goes on to the end of what it may say, whatever the model wants."""
        return {
            str(index): (prompt, _final(**{"max_tokens": 24 + index, "ignore_eos": index % 4 == 1, **wish}))
            for index, (prompt, wish) in enumerate(WISHES)
        }

    def alone(self) -> dict[str, object]:
        """Each request by itself, in an engine that does nothing else."""
        plain = Schedule(0, "nobody", 1024, 0, ROWS, 400, False, 1, "fcfs", 1, (), 0, 1)
        found: dict[str, object] = {}
        for name in [*self.requests(), *(f"beams {index}" for index in range(len(SEARCHES)))]:
            found |= self.run(plain, only=name)
        return found

    def run(self, schedule: Schedule, only: str | None = None) -> dict[str, object]:
        """The answers of all requests, or of one, under a schedule."""
        loaded = self._load(schedule.guessing)
        worker = loaded.executor._worker
        worker._ops.set_threads(schedule.threads)
        executor = LocalExecutor(worker, threaded=schedule.in_flight > 1)
        groups = tuple(replace(group, num_pages=schedule.pages) for group in loaded.scheduler.groups)
        options = replace(
            loaded.scheduler,
            groups=groups,
            max_num_seqs=schedule.rows,
            max_num_batched_tokens=schedule.budget,
            policy=schedule.policy,
            enable_prefix_caching=schedule.caching,
            long_prefill_token_threshold=schedule.chunk,
            max_in_flight=schedule.in_flight,
        )

        def make() -> EngineCore:
            executor.call("configure", groups, loaded.grammars)
            return EngineCore(Scheduler(options), executor, options.max_in_flight)

        core = Reborn(make, schedule.restarts)
        engine = Engine(core, loaded.tokenizer, loaded.settings, grammars=loaded.grammars)
        found = _Round(engine, schedule).play(self.requests(), only)
        if executor._pool is not None:
            executor._pool.shutdown()
        self._tally(schedule, [*core.gone, core.stats()])
        return found

    def close(self) -> None:
        """Give everything back."""
        for loaded in self._loaded.values():
            loaded.grammars.close()
            loaded.executor.close()

    def _load(self, guessing: str) -> Loaded:
        if guessing not in self._loaded:
            options = EngineOptions.from_flat({**OPTIONS, "speculative_config": GUESSING[guessing]})
            self._loaded[guessing] = load(options)
        return self._loaded[guessing]

    def _tally(self, schedule: Schedule, stats: Sequence[Stats]) -> None:
        self.seen["schedules"] += 1
        self.seen["restarts"] += len(stats) - 1
        for one in stats:
            self.seen["steps"] += one.steps
            self.seen["preemptions"] += one.preemptions
            self.seen["cached tokens"] += one.cache_hits
            self.seen["guesses right"] += one.accepted_tokens
            self.seen["guesses wrong"] += one.draft_tokens - one.accepted_tokens


class _Round:
    """One run: requests arrive, mates come and go, searches ask again, until all have their answers."""

    def __init__(self, engine: Engine, schedule: Schedule) -> None:
        self._engine = engine
        self._rng = random.Random(schedule.seed + 1)
        self._schedule = schedule
        self._done: dict[str, object] = {}
        self._searches: dict[str, _Search] = {}
        self._turn = 0

    def play(self, requests: dict[str, tuple[Prompt, SamplingParams]], only: str | None) -> dict[str, object]:
        """Answers by name."""
        names = [*requests, *(f"beams {index}" for index in range(len(SEARCHES)))]
        names = [name for name in names if only is None or name == only]
        self._rng.shuffle(names)
        due = {name: self._rng.randrange(self._schedule.spread) for name in names}
        mates = {f"mate {index}": self._rng.randrange(self._schedule.spread) for index in range(self._schedule.mates)}
        while len(self._done) < len(names):
            for name in [name for name in names if due.get(name) == self._turn]:
                if name.startswith("beams"):
                    self._begin(name)
                else:
                    self._engine.add(name, *requests[name], priority=self._rng.randrange(3))
            self._mates(mates)
            for output in self._engine.step():
                self._take(output)
            self._turn += 1
            assert self._turn < 20_000, "the schedule comes to no end"
        return self._done

    def _mates(self, mates: dict[str, int]) -> None:
        """Neighbours nobody asks about; half of them are sent away before they are done."""
        rng = self._rng
        for name, turn in mates.items():
            if turn == self._turn:
                ids = [rng.randrange(4, 4000) for _ in range(rng.randint(1, 60))]
                wish = _final(max_tokens=rng.randint(1, 40), ignore_eos=True, temperature=1.2)
                self._engine.add(name, TokensPrompt(prompt_token_ids=ids), wish)
            elif turn < self._turn and rng.random() < 0.02:
                self._engine.abort(name)

    def _take(self, output: RequestOutput) -> None:
        name = output.request_id
        assert all(item.finish_reason != "error" for item in output.outputs), output.outputs
        if name.startswith("beams"):
            self._score(name, output)
        elif not name.startswith("mate"):
            self._done[name] = (output.outputs, output.prompt_logprobs)

    def _begin(self, name: str) -> None:
        prompt, width, form = SEARCHES[int(name.split()[1])]
        params = BeamSearchParams(beam_width=width, max_tokens=7, structured_outputs=form)
        settings = self._engine.settings
        first = self._engine.prepare(name, prompt, scoring(params, settings))
        self._searches[name] = _Search(search_of(first, params, settings), first)
        self._ask(name)

    def _ask(self, name: str) -> None:
        """A request of one token for each beam."""
        found = self._searches[name]
        found.asked = [f"{name} {self._turn} {index}" for index in range(len(found.search.running))]
        found.scored = {}
        for request in round_of(found.first, found.search, found.asked):
            self._engine.submit(request)

    def _score(self, request_id: str, output: RequestOutput) -> None:
        name = " ".join(request_id.split()[:2])
        found = self._searches[name]
        found.scored[request_id] = best_tokens(output)
        if len(found.scored) < len(found.asked):
            return
        found.search.advance([found.scored[one] for one in found.asked])
        if found.search.running:
            self._ask(name)
        else:
            self._done[name] = found.search.sequences()


def _final(**wish: object) -> SamplingParams:
    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **wish)


def differences(expected: dict[str, object], found: dict[str, object]) -> list[str]:
    """Names of the requests with another answer."""
    return [name for name in expected if found[name] != expected[name]]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, help="the first one; drawn when not given")
    found = parser.parse_args()
    first = random.SystemRandom().randrange(1 << 30) if found.seed is None else found.seed
    workload, began = Workload(), time.monotonic()
    expected = workload.alone()
    workload.seen.clear()
    wrong = 0
    for seed in range(first, first + found.count):
        schedule = Schedule.draw(seed)
        other = differences(expected, workload.run(schedule))
        wrong += len(other)
        if other:
            print(f"{schedule}: another answer for {', '.join(other)}", flush=True)
    workload.close()
    print(f"seeds {first} to {first + found.count - 1}, {len(expected)} requests, {time.monotonic() - began:.0f} s:")
    print(f"{wrong} different answers; {', '.join(f'{value} {name}' for name, value in workload.seen.items())}")
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

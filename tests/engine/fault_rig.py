"""The whole server over a tiny model, in this process, for faults at every call: requests go in as ASGI, answers out.

Run as a program it tries every site, several calls of each: python tests/engine/fault_rig.py [--shard 3/10]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from faults import Faults, Site
from thread_child import ThreadChild
from tiny import write_tiny

from quire.config import EngineOptions, ServeOptions
from quire.engine.async_engine import AsyncEngine
from quire.engine.engine import Engine
from quire.engine.engine_process import Served, Tell
from quire.engine.metrics import Metrics
from quire.engine.start import Loaded
from quire.engine.start import load as load_parts
from quire.engine.supervisor import Patience, Supervisor
from quire.engine.wire import Tokenizing
from quire.serve.app import create_app
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service

SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False}
LONG = "Once upon a time a small fox lived near the river and counted the stars. "
LIMIT = 60.0  # seconds after which something hangs: a hundred times what it takes
COMMON = {"max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
TALK = {"messages": [{"role": "user", "content": "How many apples has Anna?"}]}

# Every kind of wish, so that every kind of step is taken; the last two are longer than a step and share a beginning.
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "The quick", **COMMON, "temperature": 0, "stream": True, "logprobs": 2}),
    ("/v1/completions", {"prompt": "One, two", **COMMON, "seed": 3, "n": 2, "top_p": 0.9, "top_k": 40, "min_p": 0.01}),
    ("/v1/completions", {"prompt": "fox", **COMMON, "temperature": 0, "echo": True, "logprobs": 1}),
    (
        "/v1/chat/completions",
        {**TALK, **COMMON, "seed": 5, "stream": True, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    ),
    (
        "/v1/chat/completions",
        {**TALK, "max_tokens": 14, "temperature": 0, "structured_outputs": {"json": SCHEMA}, "return_token_ids": True},
    ),
    (
        "/v1/completions",
        {"prompt": LONG * 2, **COMMON, "seed": 1, "min_tokens": 3, "bad_words": ["the"], "logit_bias": {"40": 2.0}},
    ),
    ("/v1/completions", {"prompt": LONG * 2 + "Then", **COMMON, "temperature": 0, "stop": ["zzzz"], "stream": True}),
]


@dataclass
class Outcome:
    """What a round of all requests came to."""

    answers: list[str]
    died: bool = False  # the whole server, which is to be made anew


@dataclass
class Tally:
    """What many rounds came to."""

    sites: int = 0
    faults: int = 0
    fired: int = 0
    unnoticed: int = 0  # nobody got anything else than without the fault
    one_failed: int = 0  # one request ended with an error
    restarts: int = 0
    hurt: list[str] = field(default_factory=list)  # faults that anybody else noticed

    def line(self) -> str:
        return (
            f"{self.sites} sites, {self.fired} of {self.faults} faults came about: {self.unnoticed} noticed by nobody, "
            f"{self.one_failed} by one "
            f"request, {self.restarts} restarts of the engine, bystanders hurt {len(self.hurt)}"
        )


class Rig:
    """One server. `start()` makes it, `round()` runs all requests and says what each of them got."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.faults = faults
        self._options = EngineOptions.from_flat(
            {
                "model": str(folder),
                "device": "cpu",
                "threads": 1,
                "max_num_seqs": 6,
                "max_model_len": 128,
                "max_num_batched_tokens": 24,
                "block_size": 16,
                "num_gpu_blocks_override": 14,
            }
        )
        self._loaded = load_parts(self._options)

    def _load(self, options: EngineOptions, tell: Tell) -> Served:
        """The model stays; pages, rows and everything that a request touches are new, as in a new process."""
        loaded: Loaded = self._loaded
        loaded.executor.call("configure", loaded.scheduler.groups, loaded.grammars)
        tell(Tokenizing(""))
        return Served(loaded.executor, loaded.scheduler, loaded.settings, loaded.grammars)

    def start(self) -> None:
        patience = Patience(spare_after=None, first_pause=0.001, longest_pause=0.01)
        self.core = Supervisor(self._options, lambda: ThreadChild(self._load), patience)
        self.core.start()
        loaded = self._loaded
        progress = Progress(Metrics("tiny", loaded.settings.max_model_len))
        assert loaded.tokenizer is not None
        engine = Engine(self.core, loaded.tokenizer, loaded.settings, progress, grammars=loaded.grammars)
        self.engine = AsyncEngine(engine)
        self.engine.start()
        self.service = Service(
            self.engine, ModelCard(("tiny",), loaded.settings.max_model_len), ServeOptions(), progress=progress
        )
        self.app = create_app(self.service)

    async def ask(self, path: str, body: dict[str, Any]) -> str:
        """What a client gets, without what is different each time."""
        sent = bytearray()
        status, ended = 0, False
        content = json.dumps(body).encode()
        messages = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, ended
            status = message.get("status", status)
            sent.extend(message.get("body", b""))
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("x", 80),
            "client": ("y", 1),
            "root_path": "",
        }
        try:
            await self.app(scope, receive, send)
        except Exception as error:  # the connection breaks: this client's own trouble
            return f"broken: {type(error).__name__}"
        if not ended:  # the HTTP server then says 500 by itself, or closes the connection within the answer
            return "broken: half an answer" if status else "broken: no answer"
        return f"{status} {told(bytes(sent))}"

    async def round(self) -> Outcome:
        """All requests at once. Nothing is left behind by them."""
        async with asyncio.timeout(LIMIT):
            answers = await asyncio.gather(*(self.ask(*request) for request in REQUESTS))
        self.faults.rest()  # what follows is asked by the test alone
        if not self.engine.is_running:
            return Outcome(list(answers), True)
        end = time.monotonic() + LIMIT
        while True:
            stats = self.core.stats()
            if not (stats.running or stats.waiting or len(self.core._journal) or self.service.live):
                break
            assert time.monotonic() < end, f"something is left: {stats}, {self.service.live}"
            gc.collect()  # a fault on the way into a closing generator leaves it to the collector
            await asyncio.sleep(0.002)
        assert stats.free_pages == stats.pages, f"pages are lost: {stats}"
        return Outcome(list(answers))

    async def close(self) -> None:
        await self.service.close()


def told(body: bytes) -> str:
    """Texts, ids, reasons and log-probabilities of an answer, whole or streamed."""
    chunks = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")] or [body]
    found: dict[Any, Any] = {}
    try:
        for chunk in map(json.loads, chunks):
            if "error" in chunk:
                return "error"
            for choice in chunk["choices"]:
                said = choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
                at = found.setdefault(choice["index"], ["", [], [], None])
                at[0] += said
                at[1] += choice.get("token_ids") or ()
                at[2] += (choice.get("logprobs") or {}).get("token_logprobs") or ()
                at[3] = choice["finish_reason"] or at[3]
    except (ValueError, KeyError):
        return f"unreadable: {body[:200]!r}"
    if body.startswith(b"data:") and not body.endswith(b"data: [DONE]\n\n"):
        return "cut off"
    return json.dumps(found)


def is_failure(answer: str) -> bool:
    """Whether a client was told that its request failed, in a way that it can see."""
    return answer.startswith("broken") or answer[:3] in ("499", "500", "503") or answer.endswith(" error")


def moments(calls: int) -> list[int]:
    """Which calls of a site are to fail: the first, one in the middle, the last."""
    return sorted({1, (calls + 1) // 2, calls})


async def try_faults(rig: Rig, chosen: Iterable[tuple[Site, int]], healthy: list[str], tally: Tally) -> None:
    """One round for each fault, compared with what the healthy server says."""
    for site, nth in chosen:
        before = rig.core.restarts
        rig.faults.aim(site, nth)
        problem = ""
        try:
            with rig.faults.watching():
                outcome = await rig.round()
            different = [index for index, answer in enumerate(outcome.answers) if answer != healthy[index]]
            if outcome.died:
                problem = "the server is dead"
            elif len(different) > 1:
                problem = f"{len(different)} requests were hurt"
            elif different and not is_failure(outcome.answers[different[0]]):
                problem = f"a wrong answer: {outcome.answers[different[0]][:300]}"
            elif different:
                tally.one_failed += 1
            else:
                tally.unnoticed += 1
        except (TimeoutError, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"[:300]
        tally.faults += 1
        tally.restarts += rig.core.restarts - before
        tally.fired += rig.faults.fired
        if tally.faults % 100 == 0:
            print(tally.line(), flush=True)
        rig.faults.aim(None)
        if problem:
            tally.hurt.append(f"{site}, call {nth}: {problem}")
            print(tally.hurt[-1], flush=True)
        await rig.close()  # Python takes the profile function off a thread in which it raised
        with rig.faults.watching():
            rig.start()


async def find_sites(rig: Rig) -> tuple[dict[Site, int], list[str]]:
    """Every site with its number of calls in a round, and the healthy answers."""
    rig.faults.aim(None)
    first = await rig.round()
    assert not any(is_failure(answer) for answer in first.answers), first.answers
    await rig.close()
    with rig.faults.watching():
        rig.start()
    calls: Counter[Site] = Counter()
    with rig.faults.watching():
        for _ in range(2):  # the second round finds prefixes in the cache
            rig.faults.aim(None)
            outcome = await rig.round()
            assert outcome.answers == first.answers, "rounds differ without a fault"
            calls |= rig.faults.calls
    return {site: calls[site] for site in sorted(calls)}, first.answers


async def main(shard: int, shards: int, only: str) -> int:
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults()
        rig = Rig(write_tiny(Path(folder)), faults)
        with faults.watching():
            rig.start()
        began = time.monotonic()
        sites, healthy = await find_sites(rig)
        took = (time.monotonic() - began) / 3
        # By its name, for which sites are found differs a little from run to run.
        picked = [site for site in sites if only in str(site) and crc32(str(site).encode()) % shards == shard - 1]
        chosen = [(site, nth) for site in picked for nth in moments(sites[site])]
        print(f"{len(sites)} sites, {len(chosen)} faults to try, {took:.2f} s a round", flush=True)
        tally = Tally(sites=len(picked))
        await try_faults(rig, chosen, healthy, tally)
        await rig.close()
        gc.collect()
    print(tally.line())
    return 1 if tally.hurt else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="the I-th of N parts of the sites")
    parser.add_argument("--only", default="", help="sites that have this in their names")
    given = parser.parse_args()
    sys.exit(asyncio.run(main(*map(int, given.shard.split("/")), given.only)))

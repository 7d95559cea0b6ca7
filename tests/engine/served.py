"""A real server on a real socket over an engine whose model is a function. Used by the server's tests.

The model says what the prompt tells it to: "say:hello;" before the last "|" makes it say hello and end. Without that it
says letters for ever. "crash;" makes it fail, "crash after N;" makes it fail at its Nth token.
"""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from quire.config import ServeOptions
from quire.core.options import SchedulerOptions
from quire.core.params import SamplingParams
from quire.core.plan import GroupSpec
from quire.core.scheduler import Scheduler
from quire.engine.async_engine import AsyncEngine
from quire.engine.core import EngineCore
from quire.engine.engine import Engine, EngineSettings
from quire.engine.executor import FakeExecutor
from quire.engine.metrics import Metrics
from quire.engine.observe import Observer
from quire.grammar import Grammars, Vocabulary
from quire.serve.app import create_app
from quire.serve.chunks import ShortWay
from quire.serve.progress import Progress
from quire.serve.service import ModelCard, Service
from quire.text import Tokenizer
from quire.text.library_tokenizer import of_library

sys.path.insert(0, str(Path(__file__).parent.parent))

from waiting import until

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message.role }}:{{ message.content }}<|end|>{% endfor %}"
    "{% if tools %}[{{ tools | length }} tools]{% endif %}{% if mood %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}<|turn|>assistant|{% endif %}"
)
MAX_MODEL_LEN = 512
HELLO = "say:hello;|"  # a prompt; the same as a conversation:
CHAT: list[dict[str, Any]] = [{"role": "user", "content": "say:hello;"}]


def byte_tokenizer() -> Tokenizer:
    """One token for each byte, <s> and </s>, and two tokens for turns. It puts <s> before a prompt, as many do."""
    from tokenizers.processors import TemplateProcessing

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>", "<|turn|>", "<|end|>")])
    rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", rust.token_to_id("<s>"))])
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    return Tokenizer(of_library(PreTrainedTokenizerFast(tokenizer_object=rust, **names)))


TOKENIZER = byte_tokenizer()


def parrot(tokens: tuple[int, ...]) -> int:
    """The model described above."""
    text = TOKENIZER.decode(tokens, skip_special_tokens=False)
    prompt, _, _ = text.rpartition("|")
    said = len(tokens) - len(TOKENIZER.encode(prompt + "|", add_special_tokens=False))
    crash = re.search(r"crash(?: after (\d+))?;", prompt)
    if crash and said >= int(crash[1] or 0):
        raise RuntimeError("boom at /secret/path/model.py")
    wanted = re.findall(r"say:(.*?);", prompt, re.DOTALL)
    if not wanted:
        return TOKENIZER.encode("abcdefghij"[said % 10], add_special_tokens=False)[0]
    reply = [*TOKENIZER.encode(wanted[-1], add_special_tokens=False), TOKENIZER.eos_token_id]
    return reply[min(said, len(reply) - 1)]


@dataclass
class Running:
    """A server that runs. `client` is the openai library's, `http` a bare one."""

    url: str
    service: Service
    executor: FakeExecutor
    metrics: Metrics
    client: openai.OpenAI
    http: httpx.Client

    def wait_idle(self) -> None:
        """Wait until the engine has nothing to do, or fail."""
        until(lambda: not (self.metrics.stats.running or self.metrics.stats.waiting or self.service.live))

    def figures(self) -> dict[str, float]:
        """What /metrics shows, by name and labels other than the model's and engine's."""
        found = {}
        for family in self.metrics.collect():
            for sample in family.samples:
                labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
                found[sample.name + "".join(f"{{{k}={v}}}" for k, v in labels.items())] = sample.value
        return found


@dataclass
class Setup:
    """What a test may choose."""

    options: ServeOptions = field(default_factory=ServeOptions)
    keys: Sequence[str] = ()
    delay: float = 0.0
    defaults: SamplingParams = field(default_factory=SamplingParams)
    settings: dict[str, Any] = field(default_factory=dict)
    max_num_seqs: int = 16
    most_tokens: int | None = None


def engine_of(setup: Setup, executor: FakeExecutor, metrics: Observer) -> Engine:
    """A real engine over the fake executor."""
    scheduler = Scheduler(
        SchedulerOptions(
            groups=(GroupSpec("full", 8, 2000),),
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            policy="fair",
        )
    )
    settings = EngineSettings(
        max_model_len=MAX_MODEL_LEN,
        vocab_size=TOKENIZER.vocab_size,
        eos_token_ids=(TOKENIZER.eos_token_id,),
        default_params=setup.defaults,
        fair=True,
        **setup.settings,
    )
    grammars = Grammars(lambda: Vocabulary(TOKENIZER, TOKENIZER.vocab_size, settings.eos_token_ids))
    return Engine(EngineCore(scheduler, executor), TOKENIZER, settings, metrics, grammars=grammars)


async def _until_stopped(server: uvicorn.Server, service: Service) -> None:
    try:
        await server.serve()
    finally:
        await service.close()


@contextmanager
def served(setup: Setup | None = None) -> Iterator[Running]:
    """Run a server in a thread while the block runs."""
    setup = setup or Setup()
    executor = FakeExecutor(parrot, delay=setup.delay)
    metrics = Metrics("parrot", MAX_MODEL_LEN)
    progress = Progress(metrics)
    engine = AsyncEngine(engine_of(setup, executor, progress))
    engine.start()
    card = ModelCard(
        ("parrot", "bird"),
        MAX_MODEL_LEN,
        defaults=setup.defaults,
        fingerprint="quire-test",
        most_tokens=setup.most_tokens,
    )
    service = Service(engine, card, setup.options, metrics.registry, progress=progress)
    config = uvicorn.Config(
        ShortWay(create_app(service, setup.keys)),
        port=0,
        log_level="error",
        lifespan="off",
        root_path=setup.options.root_path,
        h11_max_incomplete_event_size=setup.options.h11_max_incomplete_event_size,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(_until_stopped(server, service)), daemon=True)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    key = setup.keys[0] if setup.keys else "none"
    headers = {"Authorization": f"Bearer {key}"} if setup.keys else {}
    try:
        with (
            httpx.Client(base_url=url, headers=headers, timeout=60) as http,
            openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60) as client,
        ):
            yield Running(url, service, executor, metrics, client, http)
    finally:
        server.should_exit = True
        thread.join(60)


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a response, which has the right status and shape and says nothing of the inside."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == status
    assert error["message"] and not any(
        word in error["message"] for word in ("Traceback", "/work", "/src", "0x", ".py")
    )
    return error

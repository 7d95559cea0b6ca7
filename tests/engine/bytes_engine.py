"""An engine whose tokens are bytes and whose model is a function: everything but the model is real."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from quire.core.options import SchedulerOptions
from quire.core.plan import GroupSpec
from quire.core.scheduler import Scheduler
from quire.engine.core import EngineCore
from quire.engine.engine import Engine, EngineSettings
from quire.engine.executor import Executor, FakeExecutor, NextToken
from quire.engine.outputs import RequestOutput

EOS = 256
VOCAB = 258


class BytePieces:
    """Token id -> bytes."""

    strips = False
    whole: ClassVar[dict[int, str]] = {}  # every byte is looked at

    def __getitem__(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b"<eos>" if token_id == EOS else b"<other>"


class ByteTokenizer:
    """One token per byte, 256 ends a text, 257 is another special token."""

    eos_token_id = EOS
    bos_token_id = None
    vocab_size = VOCAB
    special_ids = frozenset({256, 257})
    added_tokens = {256: "<eos>", 257: "<other>"}
    pieces = BytePieces()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        shown = [i for i in token_ids if not (skip_special_tokens and i in self.special_ids)]
        return b"".join(self.pieces[i] for i in shown).decode(errors="replace")

    def token_string(self, token_id: int) -> str:
        return self.pieces[token_id].decode(errors="replace")


def speaker(text: str, prompt: str = "?", then: int = EOS) -> NextToken:
    """A model that answers any prompt of len(prompt) bytes with `text`, then with the token `then` for ever."""
    said, start = text.encode(), len(prompt.encode())

    def next_token(tokens: tuple[int, ...]) -> int:
        index = len(tokens) - start
        return said[index] if index < len(said) else then

    return next_token


def mixer(tokens: tuple[int, ...]) -> int:
    """A model whose next token depends on every token so far; it says letters."""
    value = 7
    for token in tokens:
        value = (value * 31 + token) % 1_000_003
    return 97 + value % 26


@dataclass
class Shape:
    """The engine's sizes; small, so that preemption and chunking happen."""

    num_pages: int = 200
    page_size: int = 4
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 32
    max_model_len: int = 200
    max_in_flight: int = 1
    prefix_caching: bool = True
    settings: dict[str, object] = field(default_factory=dict)


def byte_engine(model: NextToken | Executor, shape: Shape | None = None) -> Engine:
    """An Engine over a FakeExecutor with this model, or over a given executor."""
    shape = shape or Shape()
    executor = FakeExecutor(model, threaded=shape.max_in_flight > 1) if callable(model) else model
    scheduler = Scheduler(
        SchedulerOptions(
            groups=(GroupSpec("full", shape.page_size, shape.num_pages),),
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            max_model_len=shape.max_model_len,
            enable_prefix_caching=shape.prefix_caching,
            max_in_flight=shape.max_in_flight,
        )
    )
    settings = {"max_model_len": shape.max_model_len, "vocab_size": VOCAB, "eos_token_ids": (EOS,), **shape.settings}
    return Engine(EngineCore(scheduler, executor, shape.max_in_flight), ByteTokenizer(), EngineSettings(**settings))


def drain(engine: Engine, most: int = 10_000) -> list[RequestOutput]:
    """Step until there is nothing left to do."""
    outputs = []
    for _ in range(most):
        if not engine.has_work():
            return outputs
        outputs.extend(engine.step())
    raise AssertionError(f"the engine still has work after {most} steps")


def finals(outputs: Sequence[RequestOutput]) -> dict[str, RequestOutput]:
    """The last output of each request, which must come once."""
    found = {}
    for output in outputs:
        assert output.request_id not in found, "an output after the last one"
        if output.finished:
            found[output.request_id] = output
    return found

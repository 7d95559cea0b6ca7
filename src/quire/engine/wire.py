"""Messages between the API process and an engine process, and the socket that carries them: typed, bounded, no pickle.

Each message is a tagged struct in msgpack, behind four bytes of length, on a socket that the child inherits. Nothing
here knows who sends what when.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar

import msgspec

from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.params import PoolingParams, SamplingParams
from quire.core.picture import Picture
from quire.core.plan import Event, FinishReason, TokenLogprobs
from quire.core.request import CoreRequest
from quire.core.stats import Queue, Stats
from quire.engine.engine import EngineSettings
from quire.errors import EngineError

MOST_BYTES = 256 * 2**20  # of one message; a prompt of a million tokens takes five million
CHUNK = 256 * 2**10
_LENGTH = struct.Struct("<I")
_LIFE_BITS = 40  # of a ticket: what an API process can give out

CallName = Literal["reset_prefix_cache", "before"]

Incoming = TypeVar("Incoming")


# ---------------------------------------------------------------- to the engine process


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first message: what to load."""

    options: EngineOptions


class Add(msgspec.Struct, tag="add", frozen=True):
    """A CoreRequest. `ticket` names this life of the request: ids may be used again, tickets never are."""

    ticket: int
    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams | None  # one of the two is given
    pooling: PoolingParams | None
    seed: int
    priority: int = 0
    arrival: float = 0.0
    salt: bytes = b""
    adapter: int = 0
    generated: tuple[int, ...] = ()
    tenant: str = ""
    deadline: float | None = None
    encoder_tokens: int = 0


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """End a request; no event answers it."""

    ticket: int
    request_id: str


class Call(msgspec.Struct, tag="call", frozen=True):
    """Call a method of the core, one of those listed. An Answer with the same number comes back."""

    number: int
    name: CallName
    ticket: int = 0  # of the request in question
    request_id: str = ""


class Look(msgspec.Struct, tag="look", frozen=True):
    """Somebody looks at the pages: send pictures with the steps of the next seconds."""


ToEngine = Start | Add | Abort | Call | Look


# ---------------------------------------------------------------- from the engine process


class Phase(msgspec.Struct, tag="phase", frozen=True):
    """A phase of the start begins, or is over after so many seconds."""

    name: str
    seconds: float | None


class Tokenizing(msgspec.Struct, tag="tokenizing", frozen=True):
    """Where the tokenizer is, told early, so that the API process reads it while the model is loaded."""

    path: str
    trust_remote_code: bool = False
    revision: str | None = None


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The engine takes requests; what the API process must know of it."""

    scheduler: SchedulerOptions
    settings: EngineSettings
    stats: Stats


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine could not be started. `kind` is the name of an exception of quire.errors."""

    kind: str
    message: str


class WireEvent(msgspec.Struct, array_like=True, frozen=True):
    """An Event in full."""

    ticket: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    pooled: tuple[float, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    times: dict[str, float] = {}  # msgspec copies it


class Stepped(msgspec.Struct, tag="step", frozen=True):
    """What a step brought, or a few of them; sent now and then by an idle engine, too, to say that it lives."""

    taken: int  # Add messages taken in so far
    tokens: dict[int, tuple[int, ...]]  # by ticket, of events that say nothing else; they come before those in full
    events: list[WireEvent]
    stats: Stats
    picture: Picture | None = None  # now and then, while somebody looks


class Answer(msgspec.Struct, tag="answer", frozen=True):
    """What a Call returned."""

    number: int
    value: bool | Queue | None


FromEngine = Phase | Tokenizing | Ready | Failed | Stepped | Answer


# ---------------------------------------------------------------- conversions


def add_message(ticket: int, request: CoreRequest, generated: Sequence[int] = ()) -> Add:
    """The message for a request that has emitted `generated` so far. What only the text side needs stays here."""
    params = request.params
    sampling = pooling = None
    if isinstance(params, SamplingParams):
        sampling = replace(params, stop=(), bad_words=()) if params.stop or params.bad_words else params
    else:
        pooling = params
    return Add(
        ticket,
        request.request_id,
        request.prompt_token_ids,
        sampling,
        pooling,
        request.seed,
        request.priority,
        request.arrival,
        request.salt,
        request.adapter,
        (*request.generated, *generated),
        request.tenant,
        request.deadline,
        request.encoder_tokens,
    )


def core_id(ticket: int, request_id: str) -> str:
    """The id of a request inside of the engine process."""
    return f"{request_id}#{ticket}"


@lru_cache(maxsize=8192)  # asked for each token of a request
def ticket_of(found: str) -> int:
    """The ticket in an id made by core_id."""
    return int(found.rpartition("#")[2])


def first_ticket(life: int) -> int:
    """Where an API process, the server's `life`-th, begins to count its tickets: no two processes give the same."""
    return life << _LIFE_BITS


def life_of(ticket: int) -> int:
    """The API process that gave a ticket."""
    return ticket >> _LIFE_BITS


def named(picture: Picture) -> Picture:
    """A picture whose requests have the ids that they have outside of the engine process."""
    requests = tuple(replace(found, request_id=found.request_id.rpartition("#")[0]) for found in picture.requests)
    return replace(picture, requests=requests)


def core_request(add: Add) -> CoreRequest:
    """The request that the scheduler of the engine process gets."""
    params = add.sampling if add.sampling is not None else add.pooling
    if params is None:
        raise EngineError(f"the request {add.request_id!r} came without parameters")
    return CoreRequest(
        core_id(add.ticket, add.request_id),
        add.prompt_token_ids,
        params,
        add.seed,
        add.priority,
        add.arrival,
        add.salt,
        add.adapter,
        add.generated,
        add.tenant,
        add.deadline,
        add.encoder_tokens,
    )


def brings_only_tokens(event: Event) -> bool:
    """Whether an event says nothing but tokens; the numbers at its end do not count then."""
    return bool(event.tokens) and not event.times and not any(event[2:8])


def step_message(taken: int, events: Sequence[Event], stats: Stats, picture: Picture | None = None) -> Stepped:
    """The message for events, of one step or of several; a request's tokens of several steps are joined."""
    tokens: dict[int, tuple[int, ...]] = {}
    full: list[WireEvent] = []
    in_full: set[int] = set()
    for event in events:
        ticket = ticket_of(event.request_id)
        if brings_only_tokens(event) and ticket not in in_full:
            known = tokens.get(ticket)
            tokens[ticket] = event.tokens if known is None else known + event.tokens
        else:
            full.append(WireEvent(ticket, *event[1:-1], dict(event.times)))
            in_full.add(ticket)
    return Stepped(taken, tokens, full, stats, picture)


def event_of(request_id: str, found: WireEvent) -> Event:
    """The event of the request with this id."""
    return Event(
        request_id,
        found.tokens,
        found.logprobs,
        found.prompt_logprobs,
        found.pooled,
        found.finish_reason,
        found.stop_reason,
        found.error,
        found.cached_tokens,
        found.preemptions,
        found.times,
    )


# ---------------------------------------------------------------- the socket


def wait_for(readers: Sequence[int], writers: Sequence[int], seconds: float | None) -> set[int]:
    """Descriptors that are ready, or closed at the other end, within a time; None: wait for ever.

    Descriptors may be of any number, unlike those that select takes: a server has one per connection.
    """
    poll = select.poll()
    for descriptor in readers:
        poll.register(descriptor, select.POLLIN)
    for descriptor in writers:
        poll.register(descriptor, select.POLLIN | select.POLLOUT if descriptor in readers else select.POLLOUT)
    return {descriptor for descriptor, _ in poll.poll(None if seconds is None else math.ceil(seconds * 1000))}


class Connection(Generic[Incoming]):
    """One end of a socket pair. Never waits, except in flush(); one thread uses it.

    `ended` is set when the other end is closed; what arrived before that is still handed out.
    """

    def __init__(self, end: socket.socket, incoming: Any) -> None:
        end.setblocking(False)
        self._socket = end
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Incoming] = msgspec.msgpack.Decoder(incoming)
        self._arrived = bytearray()
        self._leaving = bytearray()
        self.ended = False

    def fileno(self) -> int:
        """For select."""
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for room in the socket."""
        return bool(self._leaving) and not self.ended

    def encode(self, message: object) -> bytes:
        """The bytes of a message, length included. Raises EngineError for one that is too large."""
        body = self._encoder.encode(message)
        if len(body) > MOST_BYTES:
            raise EngineError(f"a message of {len(body)} bytes is larger than the {MOST_BYTES} that may be sent")
        return _LENGTH.pack(len(body)) + body

    def send(self, message: object) -> None:
        """Send, or keep for later what does not fit into the socket now."""
        self.send_encoded(self.encode(message))

    def send_encoded(self, message: bytes) -> None:
        """Send what encode() made."""
        self._leaving += message
        self.push()

    def push(self) -> None:
        """Send as much of what was kept as goes without waiting."""
        while self.has_unsent:
            try:
                sent = self._socket.send(memoryview(self._leaving)[:CHUNK])
            except BlockingIOError:
                return
            except OSError:  # nobody reads any more; what was sent from there before can still be received
                self._leaving.clear()
                return
            del self._leaving[:sent]

    def flush(self) -> None:
        """Wait until everything is sent or the other end is closed."""
        self.push()
        while self.has_unsent:
            wait_for([], [self.fileno()], None)
            self.push()

    def receive(self) -> list[Incoming]:
        """All messages that are here. Raises EngineError for a length that is too large."""
        while not self.ended:
            try:
                data = self._socket.recv(CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self.ended = True
            self._arrived += data
            if len(data) < CHUNK // 2:
                break
        return self._cut()

    def _cut(self) -> list[Incoming]:
        found: list[Incoming] = []
        at, view = 0, memoryview(self._arrived)
        with view:
            while len(view) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(view, at)
                if length > MOST_BYTES:
                    raise EngineError(f"a message of {length} bytes is larger than the {MOST_BYTES} that may come")
                end = at + _LENGTH.size + length
                if end > len(view):
                    break
                found.append(self._decoder.decode(view[at + _LENGTH.size : end]))
                at = end
        del self._arrived[:at]
        return found

    def close(self) -> None:
        """Close this end."""
        self.ended = True
        with contextlib.suppress(OSError):
            self._socket.close()

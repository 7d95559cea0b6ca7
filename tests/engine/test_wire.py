"""Messages survive the socket whole, in any pieces; what is too large or malformed is refused."""

from __future__ import annotations

import socket
import struct
import threading

import msgspec
import pytest

from quire.config import EngineOptions
from quire.core.options import SchedulerOptions
from quire.core.params import PoolingParams, RequestOutputKind, SamplingParams
from quire.core.plan import Event, GroupSpec, TokenLogprobs
from quire.core.request import CoreRequest
from quire.core.stats import Stats
from quire.core.structured import StructuredOutputsParams
from quire.engine import wire
from quire.engine.engine import EngineSettings
from quire.errors import EngineError

WISHES = SamplingParams(
    temperature=0.5,
    seed=-(2**63),
    stop=["x"],
    logit_bias={3: 1.5},
    allowed_token_ids=[1, 2],
    bad_words=["bad"],
    repetition_detection={"max_pattern_size": 3},
    output_kind=RequestOutputKind.DELTA,
    extra_args={"a": [1, {"b": None}]},
).resolved(max_tokens=5, eos_token_ids=(7,), bad_words_token_ids=[(1, 2)])


def pair() -> tuple[wire.Connection, wire.Connection]:
    ours, theirs = socket.socketpair()
    return wire.Connection(ours, wire.FromEngine), wire.Connection(theirs, wire.ToEngine)


def test_a_request_arrives_as_it_was() -> None:
    ours, theirs = pair()
    request = CoreRequest("id#1", (1, 2, 3), WISHES, -5, 2, 1.5, b"salt", 1, (9,), "tenant", 3.5, 4)
    ours.send(wire.add_message(12, request, [10, 11]))
    ours.send(wire.add_message(13, CoreRequest("p", (1,), PoolingParams(task="embed"), 0)))
    first, second = theirs.receive()
    found = wire.core_request(first)
    assert found.request_id == "id#1#12" and wire.ticket_of(found.request_id) == 12
    assert found.generated == (9, 10, 11) and found.salt == b"salt" and found.deadline == 3.5
    assert found.params.stop == () and found.params.bad_words == ()  # the text side's own
    assert found.params.bad_words_token_ids == ((1, 2),) and found.params.logit_bias == ((3, 1.5),)
    assert found.params.output_kind is RequestOutputKind.DELTA and found.params.extra_args == WISHES.extra_args
    assert found.params.repetition_detection == WISHES.repetition_detection
    assert wire.core_request(second).params == PoolingParams(task="embed")
    form = SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}))
    ours.send(wire.add_message(14, CoreRequest("form", (1,), form, 0)))
    assert wire.core_request(theirs.receive()[0]).params == form


def test_events_arrive_as_they_were() -> None:
    ours, theirs = pair()
    entry = TokenLogprobs((4, 5), (-0.5, float("-inf")), (1, 2))
    events = [
        Event("a#1", (4,)),
        Event("b#2", (4, 5), (entry,), (entry,), None, "stop", 5, None, 3, 1, {"arrival": 1.0}),
        Event("c#3", finish_reason="error", error="why"),
        Event("d#4", pooled=(1.0, 2.5), finish_reason="stop"),
        Event("e#5", (6,), cached_tokens=7, times={"first_token": 2.0}),
    ]
    stats = Stats(running=2, pages=(3,), finished={"stop": 1})
    theirs.send(wire.step_message(6, events, stats))
    (found,) = ours.receive()
    assert found.taken == 6 and found.stats == stats and found.tokens == {1: (4,)}
    again = [wire.event_of(name, event) for name, event in zip(["b#2", "c#3", "d#4", "e#5"], found.events, strict=True)]
    assert again == events[1:]


def test_tokens_of_several_steps_are_joined_and_keep_their_order() -> None:
    ours, theirs = pair()
    first = Event("b#2", (7,), times={"first_token": 2.0})
    theirs.send(wire.step_message(0, [Event("a#1", (4,)), first, Event("a#1", (5, 6)), Event("b#2", (8,))], Stats()))
    (found,) = ours.receive()
    assert found.tokens == {1: (4, 5, 6)}
    assert [event.tokens for event in found.events] == [(7,), (8,)], "what follows an event in full may not overtake it"


def test_the_other_messages() -> None:
    ours, theirs = pair()
    options = EngineOptions.from_flat({"model": "m", "hf_overrides": {"a": 1}, "served_model_name": ("x", "y")})
    down = [wire.Start(options), wire.Abort(1, "a"), wire.Call(2, "reset_prefix_cache")]
    scheduler = SchedulerOptions((GroupSpec("window", 8, 10, 5),), 4, 16, 32)
    up = [
        wire.Phase("x", 1.0),
        wire.Tokenizing("folder"),
        wire.Ready(scheduler, EngineSettings(32, 100, default_params=WISHES), Stats()),
        wire.Failed("ConfigError", "why"),
        wire.Answer(2, True),
    ]
    for message in down:
        ours.send(message)
    for message in up:
        theirs.send(message)
    assert theirs.receive() == down and ours.receive() == up


def test_pieces_and_large_messages() -> None:
    ours, theirs = pair()
    request = CoreRequest("long", tuple(range(500_000)), SamplingParams(), 0)
    sender = threading.Thread(target=lambda: (ours.send(wire.add_message(1, request)), ours.flush()))
    sender.start()
    found: list[object] = []
    while not found:
        found = theirs.receive()
    sender.join()
    assert found[0].prompt_token_ids == request.prompt_token_ids and not ours.has_unsent


def test_an_end_is_noticed_after_the_last_message() -> None:
    ours, theirs = pair()
    theirs.send(wire.Phase("last", 0.0))
    theirs.close()
    ours.send(wire.Abort(1, "a"))  # nobody reads it, and nothing happens
    assert not ours.has_unsent and not ours.ended
    assert ours.receive() == [wire.Phase("last", 0.0)]
    ours.receive()
    assert ours.ended
    ours.send(wire.Abort(1, "a"))
    assert not ours.has_unsent


def test_what_is_too_large_or_unknown_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    connection = wire.Connection(theirs, wire.ToEngine)
    ours.sendall(struct.pack("<I", wire.MOST_BYTES + 1) + b"x")
    with pytest.raises(EngineError, match="larger than"):
        connection.receive()
    for message in ({"type": "call", "number": 1, "name": "__reduce__"}, {"type": "exec"}, ["add"], {"type": "add"}):
        ours, theirs = socket.socketpair()
        body = msgspec.msgpack.encode(message)
        ours.sendall(struct.pack("<I", len(body)) + body)
        with pytest.raises(msgspec.ValidationError):
            wire.Connection(theirs, wire.ToEngine).receive()
    monkeypatch.setattr(wire, "MOST_BYTES", 100)
    with pytest.raises(EngineError, match="larger than"):
        connection.send(wire.Phase("x" * 200, 0.0))

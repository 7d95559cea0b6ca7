"""Hundreds of clients that leave at random moments: nothing of them stays. Ten thousand: `make soak`."""

from __future__ import annotations

import json
import logging
import socket

import pytest
from served import Setup, served
from storms import storm

from waiting import until

pytestmark = pytest.mark.slow


def test_nothing_stays_of_clients_that_leave(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "quire")  # some of the requests make the model fail
    left = storm(200)
    assert not [record.message for record in caplog.records if record.name == "asyncio"], "nobody writes to the gone"
    with capsys.disabled():
        print("\n" + left.line())
    assert left.tasks <= 0 and left.descriptors <= 0


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_a_slow_reader_gets_its_whole_stream(version: bytes) -> None:
    """More than fits into the buffers, in chunks or, for clients of old, up to the connection's end."""
    body = json.dumps({"prompt": "x|", "n": 4, "max_tokens": 480, "stream": True, "logprobs": 5}).encode()
    with served(Setup(max_num_seqs=16)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with connection:
            connection.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            head = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n"
            connection.sendall(head % (version, len(body)) + b"Content-Type: application/json\r\n\r\n" + body)
            until(lambda: server.metrics.stats.running == 0 and server.metrics.stats.finished.get("length") == 4)
            answer = bytearray()
            while data := connection.recv(65536):
                answer += data
        head, _, rest = bytes(answer).partition(b"\r\n\r\n")
        assert (b"chunked" in head.lower()) is (version == b"1.1")
        if version == b"1.1":
            plain = bytearray()
            while (size := int(rest.partition(b"\r\n")[0], 16)) > 0:
                start = rest.index(b"\r\n") + 2
                plain += rest[start : start + size]
                rest = rest[start + size + 2 :]
            rest = bytes(plain)
        events = [json.loads(line[6:]) for line in rest.split(b"\n\n") if line.startswith(b"data: {")]
        said = [choice["text"] for event in events for choice in event["choices"]]
        assert len("".join(said)) == 4 * 480 and rest.endswith(b"data: [DONE]\n\n")

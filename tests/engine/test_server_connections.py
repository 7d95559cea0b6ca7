"""Connections: who owes the rest of a request is left; sockets of several processes at one address; room for many."""

from __future__ import annotations

import asyncio
import itertools
import resource
import select
import socket
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve import connection, listen
from waiting import when

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
CLOSE = b"Connection: close\r\n\r\n"
LONGEST = 60.0


def test_who_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "OWED_SECONDS", 0.3)
    go_on = asyncio.Event()
    reached = asyncio.Event()

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            reached.set()
            await go_on.wait()
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                headers = [(b"content-length", b"%d" % len(body))]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return

    async def answer(port: int, *parts: bytes) -> bytes:
        """What comes before the server closes the connection. All but the first part are sent one by one meanwhile."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(parts[0])
        found = asyncio.create_task(reader.read())
        for part in parts[1:]:
            if not found.done():
                writer.write(part)
                await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(LONGEST):
                return await found
        except ConnectionError:  # it was written to after it had been closed
            return b""
        finally:
            writer.close()

    async def main() -> None:
        config = uvicorn.Config(app, port=0, http=connection.Connection, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        waits = asyncio.create_task(answer(port, HEAD.replace(b"/", b"/slow", 1) + CLOSE))
        await reached.wait()
        for owed in (b"", HEAD, POST + b"\r\nab"):
            assert await answer(port, owed) == b""
        drops = itertools.repeat(b"a", 100_000)
        assert await answer(port, HEAD + b"X-Long: ", *drops) == b"", "a byte now and then is no request"
        for whole in (HEAD + CLOSE, POST + CLOSE + b"abcd"):
            assert (await answer(port, whole)).startswith(b"HTTP/1.1 200")
        assert not waits.done()
        go_on.set()
        assert (await waits).startswith(b"HTTP/1.1 200"), "an answer may take as long as it wants"
        server.should_exit = True
        await running

    asyncio.run(main())


def test_connections_leave_files_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (listen.KEPT_FILES + 300, 4096))
    assert listen.most_connections() == 300
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 4096))
    assert listen.most_connections() == 10, "some of few"
    monkeypatch.setattr(connection, "most_connections", lambda: 2)

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def status(port: int, head: bytes = HEAD + CLOSE) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(LONGEST):
            writer.write(head)
            found = await reader.readline()
        writer.close()
        return int(found.split()[1])

    async def main() -> None:
        config = uvicorn.Config(app, port=0, http=connection.Connection, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        await when(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await when(lambda: len(server.server_state.connections) == 2)
        assert await status(port, b"") == 503
        for _, writer in idle:
            writer.close()
        await when(lambda: not server.server_state.connections)
        assert await status(port) == 200
        server.should_exit = True
        await serving

    asyncio.run(main())


def test_room_for_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as the system allows, and no less than there was."""
    taken: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: taken.append(limits))
    for limits in ((1024, 4096), (1024, resource.RLIM_INFINITY), (4096, 4096), (resource.RLIM_INFINITY, -1)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        listen.make_room()
    assert taken == [(4096, 4096), (listen.MOST_FILES, resource.RLIM_INFINITY)]


def test_each_process_has_a_socket_at_the_one_address() -> None:
    """Every connection waits at one of them; nobody else can have the address, even who took it at the same moment."""
    first = listen.bind(ServeOptions(port=0))
    port = first.getsockname()[1]
    late = listen.bind(ServeOptions(port=port))  # neither of the two listens yet
    found = listen.one_for_each(first, 3)
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(9)]
    try:
        assert len({one.fileno() for one in found}) == 3 and {one.getsockname()[1] for one in found} == {port}
        with pytest.raises(ConfigError, match=f"Cannot listen on 127.0.0.1:{port}: "):
            listen.one_for_each(late, 2)
        with pytest.raises(ConfigError, match="Cannot listen"):
            listen.bind(ServeOptions(port=port))
        for _ in clients:
            ready, _, _ = select.select(found, [], [], LONGEST)
            ready[0].accept()[0].close()
        assert not select.select(found, [], [], 0)[0]
    finally:
        for one in (*found, *clients, late):
            one.close()


def test_a_unix_socket_is_shared(tmp_path: Path) -> None:
    with listen.bind(ServeOptions(uds=str(tmp_path / "quire.sock"))) as listener:
        assert listen.one_for_each(listener, 3) == [listener] * 3

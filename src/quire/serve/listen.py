"""Where a server listens: its address is taken, and its certificate looked at, before the model is loaded.

Knows the options of the server; imports no web framework.
"""

from __future__ import annotations

import re
import resource
import socket
import ssl
import sys
from pathlib import Path

from quire.config import ServeOptions
from quire.errors import ConfigError, ValidationError, reason
from quire.serve.auth import check_bind, read_keys
from quire.text.answer_format import check_formats
from quire.text.chat import check_template_kwargs, own_variables

BACKLOG = 2048  # connections that may wait to be taken
TAKEN = 8  # of them at a time, so that there are never many whose number nobody has looked at yet
MOST_FILES = 65_536  # open at once, where the system sets no bound
KEPT_FILES = 96  # of those allowed: for the next engine process, templates, connections that are refused


class Listener(socket.socket):
    """A socket on which BACKLOG connections may wait, however few asyncio, which asks for both at once, takes at a time."""

    def listen(self, backlog: int = BACKLOG, /) -> None:
        """As described; again changes nothing."""
        super().listen(BACKLOG)


def checked_keys(options: ServeOptions) -> tuple[str, ...]:
    """The API keys, where the options can work; what is wrong with them is said before anything is started."""
    keys = read_keys(options)
    check_tls(options)
    check_formats(options.tool_call_parser, options.reasoning_parser)
    try:
        check_template_kwargs(own_variables(options.default_chat_template_kwargs))
    except ValidationError as error:
        raise ConfigError(f"--default-chat-template-kwargs: {error.message}") from error
    if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", options.metrics_prefix):
        raise ConfigError("--metrics-prefix must be a word of letters, digits and _, such as quire or vllm.")
    if options.uds is None:
        check_bind(options.host, keys, options.allow_insecure)
    return keys


def check_tls(options: ServeOptions) -> None:
    """Raise ConfigError for https options that cannot work, before the model is loaded."""
    if options.ssl_certfile is None:
        if options.ssl_keyfile or options.ssl_ca_certs:
            raise ConfigError("--ssl-keyfile and --ssl-ca-certs need --ssl-certfile, the server's certificate.")
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
        if options.ssl_ca_certs is not None:
            context.load_verify_locations(options.ssl_ca_certs)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"The certificate or key for https cannot be used: {error}. Check --ssl-certfile, --ssl-keyfile and "
            "--ssl-ca-certs: PEM files, and a key that fits the certificate."
        ) from error
    if options.ssl_cert_reqs not in (0, 1, 2):
        raise ConfigError("--ssl-cert-reqs is 0 (no client certificates), 1 (checked when sent) or 2 (needed).")


def bind(options: ServeOptions) -> socket.socket:
    """The socket to listen on, taken but not yet listening. Raises ConfigError when it cannot be had."""
    address: str | tuple[str, int]
    if options.uds is not None:
        family, address = socket.AF_UNIX, options.uds
        _remove_stale(options.uds)
    else:
        is_v6 = ":" in options.host
        family = socket.AF_INET6 if is_v6 else socket.AF_INET
        address = (options.host.strip("[]"), options.port)
    # Named, for asyncio sends without delay (TCP_NODELAY) only where it reads TCP: else a first token waits 40 ms.
    protocol = 0 if options.uds is not None else socket.IPPROTO_TCP
    listener = Listener(family, socket.SOCK_STREAM, protocol)
    try:
        if options.uds is None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _cannot_listen(address, error) from error
    return listener


def one_for_each(listener: socket.socket, count: int) -> list[socket.socket]:
    """Listening sockets at one address for so many processes; `listener`, as bind() made it, is the first.

    Each has a queue of its own and the system spreads connections over them by a hash, so that no process takes a burst
    that was meant for all. Where the system cannot (Unix sockets, others than Linux) all share the one queue. Raises
    ConfigError when somebody else has begun to listen there.
    """
    address = listener.getsockname()
    try:
        listener.listen()  # before the port may be shared: so that of two servers one is refused
    except OSError as error:
        raise _cannot_listen(address, error) from error
    if listener.family == socket.AF_UNIX or sys.platform != "linux":
        return [listener] * count
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    found = [listener]
    for _ in range(count - 1):
        another = Listener(listener.family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        another.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        another.bind(address)
        another.listen()
        found.append(another)
    return found


def _cannot_listen(address: str | tuple[str | int, ...], error: Exception) -> ConfigError:
    """`address`: as sockets have it, a path or host and port."""
    if isinstance(address, str):
        shown, other = address, "path with --uds"
    else:
        shown, other = f"{address[0]}:{address[1]}", "address with --host and --port (0 takes a free one)"
    return ConfigError(f"Cannot listen on {shown}: {reason(error)}. Choose another {other}, or stop what uses it.")


def make_room() -> None:
    """Let this process, and those that it starts, have as many open files as the system allows: shells allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_connections() -> int:
    """How many this process may have at a time, so that files are left for what else it must open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else max(soft // 4, soft - KEPT_FILES)


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more."""
    if not Path(path).is_socket():
        return
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        Path(path).unlink()
    except OSError:
        pass  # bind says what is wrong
    finally:
        probe.close()


def address_of(options: ServeOptions, listener: socket.socket) -> str:
    """Where clients find the server, as curl wants it."""
    if options.uds is not None:
        return f"--unix-socket {options.uds} http://localhost"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    scheme = "https" if options.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

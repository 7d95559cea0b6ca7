"""Who may come in: the outermost layer of the server, and the rule about public addresses.

Default deny: with keys set, every path needs one but those of PUBLIC. The path is taken from the connection's scope, never
from anything that a header can change.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from quire.errors import ConfigError
from quire.serve.errors import Failure

# Asked by load balancers and by monitoring, which seldom carry keys; they tell nothing of any request's content.
PUBLIC = frozenset(("/health", "/ping", "/version", "/metrics"))


class KeyCheck:
    """ASGI layer that lets through only requests with a key in `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or answer 401."""
        if scope["type"] == "lifespan" or self._is_public(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            failure = Failure(
                401,
                "AuthenticationError",
                "A valid API key is needed: send the header 'Authorization: Bearer KEY'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await failure.response()(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root + "/"):  # the same rule by which the router finds the route
            path = path[len(root) :]
        return scope["type"] == "http" and path in PUBLIC

    def _has_key(self, scope: Scope) -> bool:
        found = False
        for name, value in scope["headers"]:
            if name != b"authorization":
                continue
            scheme, _, given = value.partition(b" ")
            if scheme.lower() == b"bearer":
                for key in self._keys:  # all of them, so that the time tells nothing
                    found |= hmac.compare_digest(given.strip(), key)
        return found


def check_bind(host: str, keys: Sequence[str], allow_insecure: bool) -> None:
    """Refuse to offer the model to a network without a key, unless that is what the user wants. Raises ConfigError."""
    if keys or allow_insecure or is_loopback(host):
        return
    raise ConfigError(
        f"The host {host} can be reached from other machines, and no API key is set. Set one with --api-key or the "
        "environment variable QUIRE_API_KEY, listen on 127.0.0.1, or pass --allow-insecure if everybody may use this "
        "server."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""Who may come in: API keys, the layer that asks for them, and the rule about public addresses.

Default deny: with keys set, every path needs one but those of PUBLIC. The path is taken from the connection's scope, never
from anything that a header can change. A key's hash names the tenant, whose cached prompts are its own.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from quire import env
from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve import web
from quire.serve.errors import Failure

# Asked by load balancers and by monitoring, which seldom carry keys, and the files of the page, which asks for a key;
# they tell nothing of any request's content.
PUBLIC = frozenset(("/health", "/livez", "/readyz", "/ping", "/version", "/metrics", *web.FILES))


TENANT = "quire.tenant"  # where the scope of a request says whose it is

logger = logging.getLogger(__name__)


def read_keys(options: ServeOptions) -> tuple[str, ...]:
    """All keys of the flags and of the key file; without any, those of the environment. Raises ConfigError."""
    found = [*options.api_key, *(_keys_of(options.api_key_file) if options.api_key_file is not None else ())]
    keys = tuple(dict.fromkeys(found or env.api_keys()))
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("An API key is empty or has spaces or other characters that no header can carry.")
    return keys


def _keys_of(path: str) -> list[str]:
    """The lines of a key file; empty ones and those that begin with # are left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        shared = Path(path).stat().st_mode & 0o007
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The key file {path} cannot be read: {error}. Give a text file with one key a line."
        ) from error
    if shared:
        logger.warning("the key file %s can be used by every user of this machine; chmod 600 would be better", path)
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:  # an empty file must not open the server to everybody
        raise ConfigError(f"The key file {path} holds no key. Write one key a line.")
    return keys


def tenant_name(key: str) -> str:
    """What a key's owner is called inside: nobody can find the key from it."""
    return hashlib.sha256(b"quire tenant " + key.encode()).hexdigest()[:32]


def tenant_of(scope: MutableMapping[str, Any]) -> str:
    """The tenant of a request; empty on a server without keys."""
    return scope.get(TENANT, "")


class KeyCheck:
    """ASGI layer that lets through only requests with a key: `Authorization: Bearer KEY`, or `x-api-key: KEY`."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [(key.encode(), tenant_name(key)) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, with the tenant's name in the scope, or answer 401."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        tenant = self._tenant(scope)
        if tenant is not None or self._is_public(scope):
            await self._app({**scope, TENANT: tenant or ""}, receive, send)
        elif scope["type"] == "http":
            failure = Failure(
                401,
                "AuthenticationError",
                "A valid API key is needed: send the header 'Authorization: Bearer KEY'.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await failure.response(scope["path"])(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _is_public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        if root and path.startswith(root + "/"):  # the same rule by which the router finds the route
            path = path[len(root) :]
        return scope["type"] == "http" and path in PUBLIC

    def _tenant(self, scope: Scope) -> str | None:
        """Whose key came with the request, None for nobody's."""
        found = None
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, given = value.partition(b" ")
                if scheme.lower() != b"bearer":
                    continue
            elif name == b"x-api-key":
                given = value
            else:
                continue
            for key, tenant in self._keys:  # all of them, so that the time tells nothing
                if hmac.compare_digest(given.strip(), key):
                    found = tenant
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

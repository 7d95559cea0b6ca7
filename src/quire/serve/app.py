"""create_app: the routes and the layers around them, outermost last. Knows no model and starts nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence

from fastapi import FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import quire
from quire.config import ServeOptions
from quire.errors import ConfigError
from quire.serve import admin, chats, completions, errors, kept_responses, messages, page, requests, responses
from quire.serve.auth import KeyCheck
from quire.serve.document import ERRORS, Limits, described
from quire.serve.middleware import BodyLimit, ErrorShield, HeaderLimit, RequestIds, SameRoute
from quire.serve.service import Service
from quire.serve.sse import ClientLeft
from quire.serve.traffic import Traffic, TrafficLayer


def create_app(service: Service, keys: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application over a started AsyncEngine. `keys`: API keys; none lets everybody in."""
    options = service.options
    app = FastAPI(title="quire", version=quire.__version__, redirect_slashes=False)
    app.state.service = service
    modules = (completions, chats, responses, kept_responses, messages, requests, admin, page)
    for module in modules:
        app.include_router(module.router, responses=ERRORS)
    app.state.paths = [getattr(route, "path", "") for module in modules for route in module.router.routes]
    settings = service.engine.engine.settings
    logprobs = settings.vocab_size if settings.max_logprobs < 0 else settings.max_logprobs
    limits = Limits(service.card.names, settings.vocab_size, logprobs)
    app.openapi = described(app, limits, bool(keys))  # type: ignore[method-assign]  # as FastAPI's documentation has it
    errors.install(app)
    app.add_exception_handler(ClientLeft, _left)
    app.add_middleware(ErrorShield)
    app.add_middleware(BodyLimit, most=options.max_request_bytes)
    if service.registry is not None:
        traffic = Traffic()
        service.registry.register(traffic)
        service.counted.append(traffic)
        app.add_middleware(TrafficLayer, traffic=traffic)
    app.add_middleware(SameRoute)  # outside of the layer that asks which route was taken
    app.add_middleware(RequestIds)
    if keys:
        app.add_middleware(KeyCheck, keys=keys)
    app.add_middleware(HeaderLimit, most=options.h11_max_header_count)
    if options.allowed_origins:
        _add_cors(app, options)
    return app


def _add_cors(app: FastAPI, options: ServeOptions) -> None:
    """Answer browsers that ask whether a page may call this server: they ask without a key."""
    origins = _listed(options.allowed_origins, "allowed_origins")
    if options.allow_credentials and "*" in origins:
        raise ConfigError(
            "--allow-credentials with --allowed-origins * would let any page act for whoever looks at it. Name the "
            "origins."
        )
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=_listed(options.allowed_methods, "allowed_methods"),
        allow_headers=_listed(options.allowed_headers, "allowed_headers"),
        allow_credentials=options.allow_credentials,
    )


def _listed(values: Sequence[str], name: str) -> list[str]:
    """The words of a flag; one that is a JSON list, as other servers want it, stands for its items."""
    found: list[str] = []
    for value in values:
        if not value.startswith("["):
            found.append(value)
            continue
        try:
            items = json.loads(value)
        except ValueError as error:
            raise ConfigError(f"{name} has {value!r}, which is not a JSON list.") from error
        found += [str(item) for item in items]
    return found


async def _left(_: Request, __: Exception) -> Response:
    """Nobody reads this answer; 499 is how proxies write it down."""
    return Response(status_code=499)

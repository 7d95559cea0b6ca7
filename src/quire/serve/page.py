"""The page at / and the live picture that it shows. The files of web/ are plain modules and need no key; what they ask
for does. Knows nothing of what they look like.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from quire.core.picture import FIRST_OWNER, Picture, PictureRequest
from quire.errors import NotFoundError
from quire.serve import web
from quire.serve.anywhere import topic
from quire.serve.auth import tenant_of
from quire.serve.service import Service

router = APIRouter()

HEADERS = {
    # Nothing from elsewhere, nothing written into the page, and no other page around it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """A chat, and a live picture of the engine."""
    return _file(request, web.FILES["/"])


@router.get("/web/{name}", include_in_schema=False)
async def page_file(name: str, request: Request) -> Response:
    """A file that the page is made of."""
    path = web.FILES.get(f"/web/{name}")
    if path is None:
        raise NotFoundError("The page has no such file.")
    return _file(request, path)


def _file(request: Request, path: Path) -> Response:
    content = path.read_bytes()
    headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=f"{web.TYPES[path.suffix]}; charset=utf-8")


@router.get("/v1/live")
async def live_picture(request: Request) -> dict[str, Any]:
    """What the engine is doing: counters, requests, and whose each page of the cache is.

    `groups[].runs` holds [mark, count] pairs: 0 blank, 1 cached, 2 shared, 3 + i of the i-th request. Requests of other
    keys are counted, and their ids are not told.
    """
    service: Service = request.app.state.service
    picture = await service.engine.call(service.engine.engine.picture)
    stats = service.progress.stats
    return {
        "object": "live",
        "model": service.card.names[0],
        "max_model_len": service.card.max_model_len,
        "state": await service.state(),
        "restarts": stats.restarts,
        "running": stats.running,
        "waiting": stats.waiting,
        "steps": stats.steps,
        "generated_tokens": stats.generated_tokens,
        "computed_tokens": stats.computed_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "cached_tokens": stats.cached_tokens,
        "preemptions": stats.preemptions,
        "drafted_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        **_pages(picture, await _names(service, tenant_of(request.scope))),
    }


async def _names(service: Service, tenant: str) -> dict[str, str]:
    """The tenant's requests by their ids in the engine, those of other API processes, too."""
    found = await engine_names(service, "", tenant)
    if service.neighbours is not None:
        for names in await service.neighbours.ask_all(engine_names.__name__, "", tenant):
            found |= names
    return found


@topic
async def engine_names(service: Service, _: str, tenant: str) -> dict[str, str]:
    """The same of this process."""
    return {engine_id: found.id for found in service.live if found.tenant == tenant for engine_id in found.engine_ids}


def _pages(picture: Picture | None, names: dict[str, str]) -> dict[str, Any]:
    if picture is None:
        return {"first_owner": FIRST_OWNER, "groups": [], "requests": [], "ceiling": None}
    return {
        "first_owner": FIRST_OWNER,
        "groups": [{"page_size": group.page_size, "runs": group.runs} for group in picture.groups],
        "requests": [_request(found, names) for found in picture.requests],
        "ceiling": None if picture.ceiling is None else asdict(picture.ceiling),
    }


def _request(found: PictureRequest, names: dict[str, str]) -> dict[str, Any]:
    return {
        # Of a request with several outputs, each has an id of its own: a number, then the request's.
        "id": names.get(found.request_id) or names.get(found.request_id.partition("_")[2]),
        "state": "running" if found.is_running else "waiting",
        "prompt_tokens": found.prompt,
        "cached_tokens": found.cached,
        "tokens": found.tokens,
        "computed": found.computed,
        "limit": found.limit,
    }

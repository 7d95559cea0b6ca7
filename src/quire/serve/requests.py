"""/v1/requests/{id}: what a request is doing and why it waits, and ending it. Each tenant sees only its own."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from fastapi import APIRouter, Request

from quire.errors import NotFoundError, RequestFailedError
from quire.serve.anywhere import anywhere, topic
from quire.serve.auth import tenant_of
from quire.serve.live import LiveRequest
from quire.serve.service import Service

router = APIRouter()

CONFIRM_SECONDS = 10.0
PLACE_SECONDS = 5.0


@router.get("/v1/requests/{request_id}")
async def describe_request(request_id: str, request: Request) -> dict[str, Any]:
    """What a running request does: its state, its place in the queue, why it waits, and its tokens so far."""
    return await anywhere(describe, request.app.state.service, request_id, tenant_of(request.scope))


@router.delete("/v1/requests/{request_id}")
async def cancel_request(request_id: str, request: Request) -> dict[str, Any]:
    """End a request. The answer comes when it has ended; whoever waits for it gets finish_reason "abort"."""
    return await anywhere(cancel, request.app.state.service, request_id, tenant_of(request.scope))


@topic
async def describe(service: Service, request_id: str, tenant: str) -> dict[str, Any]:
    """What one of this process's requests does."""
    found = _find(service, request_id, tenant)
    place = None
    if found.first_output is None:
        with contextlib.suppress(TimeoutError):  # an engine in the middle of a long step answers later
            async with asyncio.timeout(PLACE_SECONDS):
                place = await service.engine.place(found.engine_ids)
    return service.live.describe(found, service.progress.stats, place)


@topic
async def cancel(service: Service, request_id: str, tenant: str) -> dict[str, Any]:
    """End one of this process's requests."""
    found = _find(service, request_id, tenant)
    await service.engine.abort(found.engine_ids)
    deadline = time.monotonic() + CONFIRM_SECONDS
    while not found.over:
        if time.monotonic() > deadline:
            raise RequestFailedError("The request was told to end and has not ended yet. Ask again with GET.")
        await asyncio.sleep(0.005)
    return {"id": found.id, "object": "request", "cancelled": True, "output_tokens": found.output_tokens}


def _find(service: Service, request_id: str, tenant: str) -> LiveRequest:
    found = service.live.find(request_id, tenant)
    if found is None:
        raise NotFoundError("No such request is being answered. It may have ended.", "request_id")
    return found

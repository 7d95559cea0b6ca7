"""/v1/responses/{id}: what can be done with an answer that is kept: read it and its input, follow, cancel or forget it.

Whichever API process keeps it. Making one is in responses.py.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from quire.errors import ValidationError
from quire.serve.anywhere import anywhere, topic
from quire.serve.caller import caller_of
from quire.serve.errors import Failure
from quire.serve.middleware import JsonRoute
from quire.serve.service import Service
from quire.serve.sse import Emit, EventStyle, event, json_response, stream

router = APIRouter(route_class=JsonRoute)

NEWS_SECONDS = 5.0  # that a question for the next event waits for it
MOST_ITEMS = 100  # of an input in one answer


def _failed(failure: Failure) -> bytes:
    """An error before there was a response; later ones are events of the response."""
    return b"event: error\n" + event(
        {"type": "error", "code": str(failure.status), "message": failure.message, "param": failure.param}
    )


STYLE = EventStyle(last=b"", failed=_failed)


@router.get("/v1/responses/{response_id}")
async def retrieve_response(
    response_id: str,
    request: Request,
    stream_it: Annotated[bool, Query(alias="stream")] = False,
    starting_after: int = -1,
) -> Response:
    """A kept response as it is now, or, with `stream`, its events after the one of that number."""
    service, tenant = request.app.state.service, caller_of(request).tenant
    if not stream_it:
        found = await anywhere(kept_response, service, response_id, tenant)
        return json_response(found["body"])
    events = partial(follow, service, response_id, starting_after + 1, tenant)
    return await stream(request, events, STYLE, service.options.sse_keep_alive_interval)


@router.get("/v1/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str, request: Request, limit: int = 20, order: str = "desc", after: str | None = None
) -> dict[str, Any]:
    """The items of a kept response's own input, the latest first unless `order` is asc, page by page."""
    if not 1 <= limit <= MOST_ITEMS:
        raise ValidationError(f"limit must be 1 to {MOST_ITEMS}.", "limit")
    if order not in ("asc", "desc"):
        raise ValidationError("order must be asc or desc.", "order")
    found = await anywhere(kept_response, request.app.state.service, response_id, caller_of(request).tenant)
    items: list[dict[str, Any]] = found["items"] if order == "asc" else found["items"][::-1]
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise ValidationError("There is no item with this id.", "after")
    start = 0 if after is None else ids.index(after) + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


@router.delete("/v1/responses/{response_id}")
async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
    """Forget a kept response."""
    return await anywhere(forget_response, request.app.state.service, response_id, caller_of(request).tenant)


@router.post("/v1/responses/{response_id}/cancel")
async def cancel_response(response_id: str, request: Request) -> Response:
    """End a response that runs in the background; one that has ended stays as it is."""
    found = await anywhere(end_response, request.app.state.service, response_id, caller_of(request).tenant)
    return json_response(found)


async def follow(service: Service, response_id: str, number: int, tenant: str, send: Emit) -> None:
    """The events of a response from this number on, as they come, until it is over."""
    begun, runs = False, True
    while runs:
        found = await anywhere(later_events, service, f"{response_id} {number}", tenant)
        runs = found["runs"]
        if not (begun or runs or found["events"]):
            raise ValidationError("The response has ended with this event.", "starting_after")
        begun = True
        number += len(found["events"])
        for content in found["events"]:
            send(content)


@topic
async def kept_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """A response that this process keeps, its input, and the conversation that led to it."""
    stored = service.store.get(response_id, tenant)
    return {"body": stored.body, "items": stored.items, "messages": stored.messages}


@topic
async def later_events(service: Service, place: str, tenant: str) -> dict[str, Any]:
    """Events of a response that this process keeps; `place`: its id, and the number of the first one wanted.

    Without any yet it waits for a while.
    """
    response_id, _, number = place.rpartition(" ")
    stored = service.store.get(response_id, tenant)
    if stored.events is None:
        raise ValidationError("Only a response that was created with background and stream can be streamed.", "stream")
    events = await stored.events_from(max(0, int(number)), NEWS_SECONDS)
    return {"events": events, "runs": stored.runs}


@topic
async def forget_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """Forget a response that this process keeps."""
    service.store.remove(response_id, tenant)
    return {"id": response_id, "object": "response", "deleted": True}


@topic
async def end_response(service: Service, response_id: str, tenant: str) -> dict[str, Any]:
    """End a response that this process makes in the background, and return it."""
    stored = service.store.get(response_id, tenant)
    if stored.body["background"] is not True:
        raise ValidationError("Only a response that was created with background can be cancelled.", "response_id")
    if stored.task is not None and stored.runs:
        stored.task.cancel()
        await asyncio.gather(stored.task, return_exceptions=True)
        if stored.body["status"] == "queued":  # it had not begun, so it could not say so itself
            stored.body = stored.body | {"status": "cancelled"}
    return service.store.get(response_id, tenant).body

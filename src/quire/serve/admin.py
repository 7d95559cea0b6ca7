"""The routes that generate nothing: health, version, metrics, models, and tokens to and from text."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.responses import JSONResponse, Response

import quire
from quire.engine.async_engine import LONG_TEXT
from quire.errors import NotFoundError, ValidationError
from quire.serve.errors import Failure
from quire.serve.middleware import JsonRoute
from quire.serve.protocol import DetokenizeRequest, TokenizeRequest
from quire.serve.service import ModelCard, Service
from quire.text import ChatOptions

router = APIRouter(route_class=JsonRoute)

_NAMES = re.compile(rb"^(# (?:HELP|TYPE) )?quire:", re.MULTILINE)


@router.get("/health")
async def health(request: Request) -> Response:
    """200 while requests can be served; 503 when the engine has stopped or stands still, or the server drains."""
    service: Service = request.app.state.service
    state = await service.state()
    if state == "ready":
        return Response()
    return Failure(503, "ServiceUnavailableError", f"The server is {state}.").response()


@router.get("/livez")
async def livez(request: Request) -> Response:
    """200 unless the process should be started anew: the engine has stopped, or does nothing although it has work."""
    service: Service = request.app.state.service
    state = await service.state()
    return JSONResponse({"status": state} | service.progress.report(), 503 if state in ("stopped", "stalled") else 200)


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """200 while new requests should be sent here."""
    service: Service = request.app.state.service
    state = await service.state()
    return JSONResponse({"status": state} | service.progress.report(), 200 if state == "ready" else 503)


@router.get("/ping")
@router.post("/ping")
async def ping(request: Request) -> Response:
    """The same as /health."""
    return await health(request)


@router.get("/version")
async def version() -> dict[str, str]:
    """quire's version."""
    return {"version": quire.__version__}


@router.get("/load")
async def load(request: Request) -> dict[str, int]:
    """Requests that are being answered."""
    service: Service = request.app.state.service
    if service.neighbours is None:
        return {"server_load": len(service.live)}
    service.note_counts()
    return {"server_load": (await service.neighbours.sum()).load}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    service: Service = request.app.state.service
    if service.registry is None:
        raise NotFoundError("This server keeps no metrics (disable_log_stats).")
    registry = service.registry
    if service.neighbours is not None:
        service.note_counts()
        found = (await service.neighbours.sum()).tallies
        registry = CollectorRegistry()
        for collector in service.counted:
            registry.register(collector.showing(found))
    text = with_prefix(generate_latest(registry), service.options.metrics_prefix)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def with_prefix(text: bytes, prefix: str) -> bytes:
    """Metrics in Prometheus' text form, with quire's own once more under names that begin with another prefix."""
    if prefix == "quire":
        return text
    own = b"".join(line for line in text.splitlines(keepends=True) if _NAMES.match(line))
    return text + _NAMES.sub(rb"\1" + prefix.encode() + b":", own)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """Every name under which the model is served."""
    card = request.app.state.service.card
    return {"object": "list", "data": [_model(card, name) for name in card.names]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    """One name of the model."""
    service: Service = request.app.state.service
    service.check_model(name)
    return _model(service.card, name)


def _model(card: ModelCard, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": card.created,
        "owned_by": "quire",
        "root": card.root or name,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [
            {
                "id": f"modelperm-{name}",
                "object": "model_permission",
                "created": card.created,
                "allow_create_engine": False,
                "allow_sampling": True,
                "allow_logprobs": True,
                "allow_search_indices": False,
                "allow_view": True,
                "allow_fine_tuning": False,
                "organization": "*",
                "group": None,
                "is_blocking": False,
            }
        ],
    }


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a prompt or of a conversation."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check()
    tokenizer = service.tokenizer
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
    else:
        options = ChatOptions(
            tools=body.tools or None,
            add_generation_prompt=body.generation_prompt,
            continue_final_message=bool(body.continue_final_message),
            template=body.chat_template,
            template_kwargs=body.chat_template_kwargs or {},
        )
        text, special = await service.render(body.messages or [], options), bool(body.add_special_tokens)
    ids = await service.ids_of(text, special)
    return {
        "count": len(ids),
        "max_model_len": service.card.max_model_len,
        "tokens": ids,
        "token_strs": [tokenizer.token_string(token) for token in ids] if body.return_token_strs else None,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> JSONResponse:
    """The text of token ids, special tokens included."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    body.check_extra()
    largest, tokenizer = max(body.tokens, default=0), service.tokenizer
    if largest >= tokenizer.vocab_size:
        raise ValidationError(
            f"Token id {largest} is out of vocabulary; ids go from 0 to {tokenizer.vocab_size - 1}.", "tokens"
        )
    if len(body.tokens) > LONG_TEXT:  # in a thread, so that streams and health go on meanwhile
        return JSONResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, False)})
    return JSONResponse({"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)})

"""Service: what all routes share, and the way from a request's prompts to a stream of the engine's outputs.

Knows the AsyncEngine; knows no route and no shape of an answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry

from quire.config import ServeOptions
from quire.core.params import SamplingParams
from quire.engine.admission import LATE
from quire.engine.async_engine import LONG_TEXT, AsyncEngine, together
from quire.engine.beam_requests import Wishes, beam_output
from quire.engine.beams import BeamSearchParams
from quire.engine.engine import Prepared
from quire.engine.metrics import Counted
from quire.engine.outputs import CompletionOutput, RequestOutput
from quire.engine.prompts import TextPrompt, TokensPrompt
from quire.engine.suspects import QUARANTINED
from quire.errors import (
    EngineDeadError,
    NotFoundError,
    OverloadedError,
    RequestFailedError,
    TimeOverError,
    ValidationError,
)
from quire.serve.account import Account
from quire.serve.caller import Caller
from quire.serve.forms import by_its_field
from quire.serve.live import Live, LiveRequest
from quire.serve.neighbours import Neighbours
from quire.serve.progress import Progress
from quire.serve.protocol import GenerationRequest
from quire.serve.renderer import RenderPool
from quire.serve.store import Store
from quire.serve.tracing import Tracing
from quire.text import ChatOptions, Tokenizer, prompt_text
from quire.text.answer_format import thinking_marks
from quire.text.chat import render_job

logger = logging.getLogger(__name__)

RENDERERS = 2  # processes that render templates, for the server's own and for clients'
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model as clients see it. The first name is the one reported."""

    names: tuple[str, ...]
    max_model_len: int
    root: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    defaults: SamplingParams = field(default_factory=SamplingParams)  # for fields that requests leave out
    fingerprint: str = ""
    most_tokens: int | None = None  # that the operator allows for one output

    def limit(self, wanted: int | None) -> int | None:
        """The most tokens to generate where a client wants so many; None: as many as the context holds."""
        if self.most_tokens is None:
            return wanted
        return self.most_tokens if wanted is None else min(wanted, self.most_tokens)


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt of a request, ready for the engine."""

    prompt: TextPrompt | TokensPrompt
    tokens: int | None  # None when the engine counts them


NOBODY = Caller()
TakeOutput = Callable[[RequestOutput], None]
Take = Callable[[int, RequestOutput], None]  # the index of the prompt, and its output


@dataclass(slots=True)
class Service:
    """The engine, the model's card and the options; `live` holds the requests that are being answered."""

    engine: AsyncEngine
    card: ModelCard
    options: ServeOptions
    registry: CollectorRegistry | None = None
    progress: Progress = field(default_factory=Progress)
    live: Live = field(default_factory=Live)
    draining: bool = False
    log_arrivals: bool = False
    tracing: Tracing | None = None
    takes_priority: bool = True  # whether the scheduler heeds it
    counted: list[Counted] = field(default_factory=list)  # the collectors of `registry`
    neighbours: Neighbours | None = None  # where there are several API processes
    store: Store = field(init=False)
    server_templates: RenderPool = field(init=False)
    client_templates: RenderPool = field(init=False)  # their own, so that they cannot hold up the server's

    def __post_init__(self) -> None:
        """Make the store and the pools, whose processes start when first needed."""
        self.store = Store(self.options.max_stored_responses)
        self.server_templates = RenderPool(RENDERERS, self.options.template_timeout)
        self.client_templates = RenderPool(RENDERERS, self.options.template_timeout)

    async def close(self) -> None:
        """End what runs in the background, the engine, and the processes that render templates."""
        await self.store.close()
        await self.server_templates.close()
        await self.client_templates.close()
        await self.engine.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)

    def note_counts(self) -> None:
        """Tell the other API processes what this one has counted."""
        if self.neighbours is not None:
            self.neighbours.note(self.counted, len(self.live))

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ValidationError where the engine runs without one."""
        found = self.engine.tokenizer
        if found is None:
            raise ValidationError("This server runs without a tokenizer; send prompts as token ids.", "prompt")
        return found

    @property
    def marks_thoughts(self) -> bool:
        """Whether it is known how the model marks its thoughts."""
        return thinking_marks(self.tokenizer, self.options.reasoning_parser) is not None

    def with_marks(self, params: SamplingParams) -> SamplingParams:
        """The parameters with the marks of thoughts that the option names, where a request limits its thoughts."""
        parser = self.options.reasoning_parser
        if params.thinking_token_budget is None or parser is None:
            return params
        return replace(params, thinking=thinking_marks(self.tokenizer, parser))

    def check_model(self, name: str | None) -> None:
        """Raise NotFoundError for a model that is not served."""
        if name and name not in self.card.names:
            names = ", ".join(f"`{known}`" for known in self.card.names)
            raise NotFoundError(f"The model `{name[:200]}` does not exist. Served here: {names}.", "model")

    def check_priority(self, priority: int | None) -> None:
        """Raise ValidationError for a priority that would have no effect."""
        if priority and not self.takes_priority:
            raise ValidationError(
                "priority needs a server with --scheduling-policy fair or priority; this one serves first come, first "
                "served.",
                "priority",
            )

    async def check_ready(self) -> None:
        """Raise when no request can be taken now."""
        if self.draining:
            raise OverloadedError("The server is shutting down.", retry_after=5)
        await self.engine.check_health()

    async def state(self) -> str:
        """ready, draining, stalled or stopped. Stalled: there is work and the engine does nothing for too long."""
        try:
            await self.engine.check_health()
        except EngineDeadError:
            return "stopped"
        if self.progress.silent_for(self.live.busy_since) > self.options.stall_timeout:
            return "stalled"
        return "draining" if self.draining else "ready"

    async def render(self, messages: Sequence[Any], options: ChatOptions) -> str:
        """The prompt text of a conversation. The one place that decides about templates of clients."""
        is_clients = options.template is not None
        if is_clients and not self.options.trust_request_chat_template:
            raise ValidationError(
                "chat_template is not accepted from clients. Start the server with the option chat_template, or with "
                "trust_request_chat_template if you trust all who may call it.",
                "chat_template",
            )
        variables = {**self.options.default_chat_template_kwargs, **options.template_kwargs}
        tokenizer, options = self.tokenizer, replace(options, template_kwargs=variables)
        if tokenizer.renders_itself and not is_clients:  # its own code, which came with the model
            return await asyncio.to_thread(prompt_text, tokenizer, messages, options)
        if sum(len(str(message)) for message in messages) > LONG_TEXT:
            job = await asyncio.to_thread(render_job, tokenizer, messages, options)
        else:
            job = render_job(tokenizer, messages, options)
        return await (self.client_templates if is_clients else self.server_templates).render(job)

    async def encode(
        self, text: str, body: GenerationRequest, special: bool, room: int, in_thread: bool = False
    ) -> Job:
        """A text prompt as token ids, cut as the body wants. `room`: tokens that the output needs at least."""
        if self.engine.tokenizer is None and body.truncate_prompt_tokens is None:
            return Job({"prompt": text}, None)
        tokenizer, limit = self.tokenizer, self.card.max_model_len
        if body.truncate_prompt_tokens is None and len(text) > limit * max(tokenizer.longest_token, 16):
            raise ValidationError(
                f"The prompt has {len(text)} characters, more than {limit} tokens can hold, which is the model's "
                "maximum length.",
                "prompt",
            )
        ids = self.cut(await self.ids_of(text, special, in_thread), body, room)
        return Job({"prompt": text, "prompt_token_ids": ids}, len(ids))

    async def ids_of(self, text: str, special: bool, in_thread: bool = False) -> list[int]:
        """A text as token ids. A long one is read in a thread, so that streams and health go on meanwhile."""
        if in_thread or len(text) > LONG_TEXT:
            return await asyncio.to_thread(self.tokenizer.encode, text, special)
        return self.tokenizer.encode(text, special)

    def job_of_ids(self, ids: list[int], body: GenerationRequest, room: int) -> Job:
        """A prompt of token ids."""
        ids = self.cut(ids, body, room)
        return Job({"prompt_token_ids": ids}, len(ids))

    def cut(self, ids: list[int], body: GenerationRequest, room: int) -> list[int]:
        """The prompt within truncate_prompt_tokens; -1 means what fits beside the output."""
        most = body.truncate_prompt_tokens
        if most is None:
            return ids
        limit = self.card.max_model_len
        if most > limit:
            raise ValidationError(
                f"truncate_prompt_tokens is larger than the model's maximum length of {limit}.",
                "truncate_prompt_tokens",
            )
        most = max(1, limit - room) if most == -1 else most
        return ids[:most] if body.truncation_side == "right" else ids[-most:]

    async def answer(
        self,
        request_id: str,
        jobs: Sequence[Job],
        params: SamplingParams,
        body: GenerationRequest,
        special: bool,
        take: Take,
        caller: Caller = NOBODY,
        account: Account | None = None,
    ) -> None:
        """Call take() with (index of the prompt, output) as they come, until all is said. Cancelling it aborts what still
        runs, and so does a take() that raises, which raises here.

        `caller`: whose request it is; a tenant finds only its own cached prompts, unless they are shared. A completion
        that failed raises RequestFailedError, and the reason is only logged; one whose time is over raises
        TimeOverError. `account` is kept, for who wants to tell it.
        """
        self.check_priority(body.priority)
        await self.check_ready()
        account = Account() if account is None else account
        account.open(request_id, caller, self.progress)
        known = sum(job.tokens or 0 for job in jobs)
        live = LiveRequest(request_id, caller.tenant, len(jobs), known)
        if self.log_arrivals:
            self._log_arrival(request_id, jobs, known, params)
        self.live.add(live)
        try:
            salt = cache_salt("" if self.options.share_prefix_cache else caller.tenant, body.cache_salt)
            wishes = Wishes(
                body.priority or 0, special, caller.tenant, caller.timeout if body.timeout is None else body.timeout
            )
            beams = body.beams(params, self.card.max_model_len)
            salted = [_salted(job, salt) for job in jobs]
            told = [partial(_told, take, index, account, live) for index in range(len(jobs))]
            if beams is None:  # all are looked at before one is begun, so that a mistake in the last is told in time
                ready = [await self._ready(live, index, job, params, wishes) for index, job in enumerate(salted)]
                await together(map(partial(self._one, live), ready, told))
            else:
                search = partial(self._search, live, beams, wishes)
                await together(map(search, range(len(jobs)), salted, told))
        except BaseException as error:
            account.fail(error)
            if isinstance(error, ValidationError):
                raise by_its_field(error, body.form_field) from None
            raise
        finally:
            live.over = True
            account.close()
            if self.tracing is not None:
                self.tracing.note(account, params)
            if logger.isEnabledFor(logging.INFO):
                logger.info("%s", account.line(), extra={"request": account.record()})

    def told(self, body: GenerationRequest, account: Account) -> dict[str, Any]:
        """The part of `usage` that is quire's own: the request's account, where it is wanted."""
        wanted = self.options.enable_request_account or body.include_account
        return {"quire": account.usage()} if wanted else {}

    def _log_arrival(self, request_id: str, jobs: Sequence[Job], known: int, params: SamplingParams) -> None:
        most = self.options.max_log_len
        shown = "".join(f", prompt {str(job.prompt.get('prompt'))[:most]!r}" for job in jobs[:8]) if most > 0 else ""
        logger.info("%s arrived: %d prompts, %d tokens in, %s%s", request_id, len(jobs), known, params, shown)

    async def _ready(self, live: LiveRequest, index: int, job: Job, params: SamplingParams, wishes: Wishes) -> Prepared:
        """One prompt ready for the engine, several tokens at a time where that is wanted. Raises what is wrong with it."""
        engine_id = f"{live.id}-{index}-{uuid.uuid4().hex[:8]}"
        if params.stream_interval is None and self.options.stream_interval > 1:
            params = replace(params, stream_interval=self.options.stream_interval)
        live.engine_ids.add(engine_id)
        return await self.engine.prepare(
            job.prompt, params, engine_id, wishes.priority, wishes.special, wishes.tenant, wishes.timeout
        )

    async def _one(self, live: LiveRequest, ready: Prepared, take: TakeOutput) -> None:
        """The outputs of one prompt."""
        try:
            await self.engine.deliver(ready, take)
        finally:
            live.engine_ids.discard(ready.request_id)

    async def _search(
        self, live: LiveRequest, beams: BeamSearchParams, wishes: Wishes, index: int, job: Job, take: TakeOutput
    ) -> None:
        """The one output of a beam search over one prompt."""
        name = f"{live.id}-{index}-{uuid.uuid4().hex[:8]}"
        ids = [f"{name}-{beam}" for beam in range(beams.beam_width)]
        live.engine_ids.update(ids)
        try:
            take(await beam_output(self.engine, job.prompt, beams, ids, wishes))
        finally:
            live.engine_ids.difference_update(ids)


def _told(take: Take, index: int, account: Account, live: LiveRequest, output: RequestOutput) -> None:
    """An output came: count it, and pass it on."""
    account.note(output)
    live.note(account.output_tokens)
    for completion in output.outputs:
        if completion.finish_reason == "error":
            raise _failure_of(output.request_id, completion)
    take(index, output)


def _failure_of(request_id: str, completion: CompletionOutput) -> RequestFailedError | TimeOverError:
    """What the client is told of a completion that failed."""
    logger.error("request %s failed while running: %s", request_id, completion.error)
    if completion.error == LATE:
        return TimeOverError(LATE, "timeout")
    if completion.error == QUARANTINED:
        return RequestFailedError(QUARANTINED)
    return RequestFailedError("This request failed while it was running. The server's log says why.")


def new_id(prefix: str, header: str | None, field_value: str | None) -> str:
    """The id of a response: the client's own, from the header X-Request-Id or the field, where it is usable."""
    for given in (header, field_value):
        if given and _ID.fullmatch(given):
            return f"{prefix}-{given}"
    return f"{prefix}-{uuid.uuid4().hex}"


def fingerprint(version: str, *parts: object) -> str:
    """What system_fingerprint says: the version, and a hash of what else decides the numbers."""
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).hexdigest()
    return f"quire-{version}-{digest[:8]}"


def cache_salt(tenant: str, chosen: str | None) -> str:
    """What decides who finds whose cached prompts: the tenant, and what the client chose, which has no slash."""
    return f"{tenant}/{chosen or ''}" if tenant else chosen or ""


def _salted(job: Job, salt: str) -> Job:
    if salt:
        job.prompt["cache_salt"] = salt
    return job

"""CoreRequest: what the engine hands over. Request: the same in the scheduler's care, with its tokens and progress.

Only the Scheduler, with its PageTables, writes a Request. Nothing here decides anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.core.params import PoolingParams, SamplingParams
from quire.core.stop import StopRules

GONE = 1 << 62  # an epoch later than any step: whatever is still in flight for the request is dropped
NOWHERE = -1


@dataclass(frozen=True, slots=True)
class CoreRequest:
    """One generation (or one vector) to make.

    `salt` stands for everything but the tokens that the pages' content depends on: model, adapter, media, tenant.
    `generated` are tokens emitted before a restart: the request goes on after them. `encoder_tokens` is the number of
    encoder positions of its cross-attention pages. `tenant` and `deadline` are there for orders of the waiting line.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams | PoolingParams
    seed: int
    priority: int = 0  # lower is more urgent
    arrival: float = 0.0
    salt: bytes = b""
    adapter: int = 0
    generated: tuple[int, ...] = ()
    tenant: str = ""
    deadline: float | None = None
    encoder_tokens: int = 0


@dataclass(slots=True)
class Table:
    """The pages of one request in one group; entries before `first` have left the window and are null."""

    pages: list[int] = field(default_factory=list)
    first: int = 0
    granted: int = 0  # entries that the worker has been told of
    published: int = 0  # entries whose names have been given to the pool, as far as it wanted them
    snapshot: int = 0  # state groups: the page that receives a copy of the state in the step being computed


@dataclass(slots=True, eq=False)
class Request:
    """One generation in the scheduler's care.

    Positions, from the front:  0 .. computed | in flight .. planned | still to do .. known
    `known` counts the tokens whose values are here, plus the one that each sampling span in flight will bring, so a
    request that is up to date has planned == known - 1 before, and planned == known after, its step is planned.
    """

    given: CoreRequest
    key: tuple[float, ...]  # its place in line: smaller goes first and is preempted last
    tokens: list[int]
    rules: StopRules
    limit: int  # as in rules
    watched: frozenset[int]  # as in rules
    watch_from: int  # from this number of tokens on, every token may end the request
    tables: list[Table]
    names: list[list[bytes]] = field(default_factory=list)  # per page size, of its full pages, made when first needed
    generation: int = NOWHERE  # which key made the names
    known: int = 0
    computed: int = 0
    planned: int = 0
    in_flight: int = 0
    slot: int = NOWHERE
    epoch: int = GONE  # the step that admitted it; results of earlier steps are of an earlier life
    room: int = 0  # spans that begin before it, one position long, need nothing from the page tables
    publish_at: int = 0  # computed positions at which another page is full and gets its name
    quiet_until: int = 0  # before so many computed positions, a token that is not watched is only appended
    snapshot_at: int = NOWHERE  # position at which the recurrent state is to be copied for later requests
    drafts: tuple[int, ...] = ()
    drafting: bool = False  # the worker proposes drafts for it, so it is not planned ahead of a sample
    logprobs_sent: int = 0  # prompt log-probabilities handed out so far, which a recomputation must not repeat
    cached_tokens: int = NOWHERE  # positions found in the prefix cache when it was first admitted
    charged: int = 0  # tokens that its tenant has been charged for; 0 until it first runs
    preemptions: int = 0
    scheduled: float | None = None
    first_token: float | None = None

"""SchedulerOptions: how steps are filled, and which requests can never run under them.

Checked once when the scheduler is made. Nothing here knows the state of any request.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.core.params import SamplingParams
from quire.core.plan import GroupSpec
from quire.core.queue import ORDERS
from quire.core.request import CoreRequest
from quire.errors import CapacityError, ConfigError, ValidationError


@dataclass(frozen=True, slots=True)
class SchedulerOptions:
    """How steps are filled. Token counts are positions computed.

    `max_in_flight` is the number of plans that may be submitted and not yet applied: with 2 the next step is planned
    while one runs. Without `chunked_prefill` a request's tokens are computed in one span, which rules out prefix hits
    and drafts, and needs a budget of max_model_len.
    """

    groups: tuple[GroupSpec, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    max_in_flight: int = 1

    def __post_init__(self) -> None:
        """Raise ConfigError for options that cannot work."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_in_flight"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.policy not in ORDERS:
            raise ConfigError(f"The scheduling policy {self.policy!r} is unknown. Known: {', '.join(ORDERS)}")
        if not self.chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"Without chunked prefill a whole prompt is one step: max_num_batched_tokens "
                f"({self.max_num_batched_tokens}) must be at least max_model_len ({self.max_model_len})"
            )
        for group in self.groups:
            if group.kind == "window" and (group.window is None or group.window < 1):
                raise ConfigError(f"A window group needs a window of at least 1, found {group.window}")
            if group.page_size < 1 or group.num_pages < 2:
                raise ConfigError(
                    f"A {group.kind} group of {group.num_pages} pages of {group.page_size} positions holds nothing: "
                    "it needs a page besides the null page"
                )

    def refuse_length(self, request: CoreRequest) -> None:
        """Raise ValidationError for a prompt that is empty or leaves no room for output."""
        length, longest = len(request.prompt_token_ids), self.max_model_len
        if not length:
            raise ValidationError("The prompt has no tokens; give at least one", "prompt")
        if length > longest or (length == longest and isinstance(request.params, SamplingParams)):
            raise ValidationError(
                f"The prompt of {length} tokens leaves no room for output: the maximum model length is {longest}. "
                "Shorten the prompt, or start the engine with a larger max_model_len",
                "prompt",
            )

    def refuse_pages(self, request: CoreRequest, limit: int, least: list[int]) -> None:
        """Raise CapacityError if some group has fewer pages than `least`, what `limit` tokens need to run alone."""
        for group, needed in zip(self.groups, least, strict=True):
            if needed > group.num_pages - 1:
                raise CapacityError(
                    f"Request {request.request_id!r} may grow to {limit} tokens, which takes {needed} pages of "
                    f"{group.page_size} positions; the whole cache has {group.num_pages - 1}. "
                    "Ask for fewer tokens (a shorter prompt, a smaller max_tokens), or give the cache more memory."
                )

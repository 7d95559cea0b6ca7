"""Journal: what is needed to go on with each live request in another engine process. Pure data, in the API process.

As large as the live requests' prompts and outputs, and no larger: an entry goes when its request ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field

from quire.core.plan import NO_TIMES, Event
from quire.core.request import CoreRequest


@dataclass(slots=True, eq=False)
class Entry:
    """One live request: as it was made, and what came of it so far."""

    ticket: int
    request: CoreRequest
    emitted: array[int] = field(default_factory=lambda: array("I"))
    prompt_logprobs: int = 0  # handed out so far
    cached_tokens: int = 0  # as told with the first token
    deaths: int = 0  # of engines, since its last token; see suspects.py
    blame: int = 0  # those of them in which it was computed
    kills_alone: int = 0  # kills among these, while nobody else was computed
    restarts: int = 0  # times it was given to another engine
    repeated: int = 0  # prompt log-probabilities that will come again, since its restart

    def take(self, event: Event) -> Event:
        """Note what an event brings. Returns it without what was handed out before a restart."""
        if event.prompt_logprobs:
            again = min(self.repeated, len(event.prompt_logprobs))
            self.repeated -= again
            if again:
                event = event._replace(prompt_logprobs=event.prompt_logprobs[again:])
            self.prompt_logprobs += len(event.prompt_logprobs)
        if event.times:
            if self.restarts and self.emitted:  # the first token came long ago, from another engine
                times = event.times if event.finish_reason is not None else NO_TIMES
                event = event._replace(times=times, cached_tokens=self.cached_tokens)
            else:
                self.cached_tokens = event.cached_tokens
        if event.tokens:
            if self.deaths:
                self.clear()
            self.emitted.extend(event.tokens)  # behind all that may raise: what is noted here is told
        return event

    def clear(self) -> None:
        """No death is held against the request any more."""
        self.deaths = self.blame = self.kills_alone = 0

    def restart(self) -> None:
        """Note that the request begins again, behind what it has emitted."""
        self.restarts += 1
        self.repeated = 0 if self.emitted else self.prompt_logprobs


class Journal:
    """All live requests by ticket, the oldest ticket first."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._tickets: dict[str, int] = {}
        self._last = 0

    def __len__(self) -> int:
        """Live requests."""
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        """Entries, the oldest ticket first."""
        return iter(list(self._entries.values()))

    def __contains__(self, request_id: str) -> bool:
        """Whether a request with this id is alive."""
        return request_id in self._tickets

    def open(self, request: CoreRequest) -> Entry:
        """Write down a new request. Its id must not be in use."""
        assert request.request_id not in self._tickets, "the caller has looked"
        entry = Entry(0, request)
        self._issue(entry)
        return entry

    def renew(self, entry: Entry) -> None:
        """Give a live request another ticket: what the engine still says about the old one does not count."""
        del self._entries[entry.ticket]
        self._issue(entry)

    def _issue(self, entry: Entry) -> None:
        self._last += 1
        entry.ticket = self._last
        self._entries[entry.ticket] = entry
        self._tickets[entry.request.request_id] = entry.ticket

    def get(self, ticket: int) -> Entry | None:
        """The entry of a ticket; None when the request has ended."""
        return self._entries.get(ticket)

    def find(self, request_id: str) -> Entry | None:
        """The entry of the live request with this id."""
        ticket = self._tickets.get(request_id)
        return None if ticket is None else self._entries[ticket]

    def close(self, entry: Entry) -> None:
        """The request has ended."""
        del self._entries[entry.ticket]
        del self._tickets[entry.request.request_id]

"""Totals: the figures of engine processes that follow each other, as of one engine. Plain numbers."""

from __future__ import annotations

from dataclasses import fields, replace

from quire.core.stats import Stats

GAUGES = {
    *("running", "waiting", "waiting_tokens", "queues", "in_flight", "pages", "free_pages", "named_pages", "finished"),
}
COUNTERS = tuple(field.name for field in fields(Stats) if field.name not in GAUGES)


class Totals:
    """Counters go on over a death; gauges are those of the present process."""

    def __init__(self) -> None:
        self._buried = Stats()
        self._present = Stats()

    @property
    def stats(self) -> Stats:
        """The latest figures, as the caller's own object."""
        before, now = self._buried, self._present
        found = replace(now, finished=dict(now.finished))
        if before.steps:
            for name in COUNTERS:
                setattr(found, name, getattr(before, name) + getattr(now, name))
            for reason, count in before.finished.items():
                found.finished[reason] = found.finished.get(reason, 0) + count
        return found

    def take(self, stats: Stats) -> None:
        """The latest figures of the present process."""
        self._present = stats

    def bury(self) -> None:
        """The present process is dead: its requests and plans are nobody's, its pages are free."""
        self._buried = self.stats
        pages = self._present.pages
        self._present = Stats(pages=pages, free_pages=pages, named_pages=(0,) * len(pages))

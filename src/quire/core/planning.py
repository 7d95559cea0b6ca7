"""What the scheduler keeps about plans: the one in the making, and those whose results are still to come.

Records only; the scheduler fills and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.core.plan import Admission, PageCopy, PageGrant, Span, StepPlan
from quire.core.request import Request


@dataclass(slots=True)
class Sketch:
    """The plan in the making; `rows` are the requests of `spans`, in the same order."""

    left: int  # positions of the budget not yet spent
    admitted: list[Admission] = field(default_factory=list)
    grants: list[PageGrant] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    rows: list[Request] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that was handed out and whose result has not come back."""

    plan: StepPlan
    rows: list[Request]

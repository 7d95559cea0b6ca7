"""100,000 simulated requests through the real scheduler, and proof that the simulation notices when it is broken."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import simulation
from simulation import SimulationFailure, simulate

from quire.core import landing, queue, scheduler
from quire.core.pages import PageNames, PagePool
from quire.core.request import Request
from quire.core.tables import PageTables, PositionPages, StatePage

REQUESTS = 100_000
BLOCKS = 10


@pytest.mark.slow
def test_every_request_gets_what_it_would_have_had_alone() -> None:
    """In as many processes as there are processors."""
    seeds = [1_000_000 * (block + 1) for block in range(BLOCKS)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as processes:
        blocks = list(processes.map(simulate, seeds, [REQUESTS // BLOCKS] * BLOCKS))
    for seen in blocks:
        assert seen["requests"] >= REQUESTS // BLOCKS
        for name, least in {
            "preemptions": 50,
            "cached tokens": 5000,
            "drafts accepted": 500,
            "drafts rejected": 500,
            "aborts in flight": 300,
            "restarts": 50,
            "error": 100,
            "resets": 20,
        }.items():
            assert seen[name] >= least, f"only {seen[name]} {name}: the scenarios do not try enough"


def test_places_that_change_hands_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tenants make way for each other at the smallest lead, and nobody's tokens change."""
    ways: list[Request] = []
    step_down = queue.WaitingLine.step_down

    def noted(self: queue.WaitingLine, request: Request) -> None:
        ways.append(request)
        step_down(self, request)

    monkeypatch.setattr(queue, "LEAD", 8.0)
    monkeypatch.setattr(queue.WaitingLine, "step_down", noted)
    for seed in range(1000, 1015):
        simulation.Simulation(seed).run()
    assert len(ways) > 50


def test_a_seed_is_the_same_scenario_every_time() -> None:
    assert simulation.Simulation(77).run() == simulation.Simulation(77).run()


def test_a_failure_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation.Simulation, "_loop", lambda self: self.live["nobody"])
    with pytest.raises(SimulationFailure, match=r"simulation\.py --seed 5"):
        simulation.Simulation(5).run()


def hit_the_last_token(request: Request) -> int:
    return len(request.tokens)


def share_without_counting(self: PagePool, page: int) -> None:
    self._kept.pop(page, None)
    self._owners[page] = 1


def follow_tokens_alone(self: PageNames, previous: bytes, token_ids: list[int]) -> bytes:
    return repr(token_ids).encode()


def no_salt(self: PageNames, salt: bytes) -> bytes:
    return b"root"


def see_a_page_less(self: PositionPages, position: int) -> int:
    return 0 if self._window is None else max(0, position - self._window + 1) // self.page_size + 1


def room_for_one_more(self: PositionPages, table: object) -> int:
    return (len(table.pages) + 1) * self.page_size


def restore_nothing(self: PageTables, request: Request) -> list[object]:
    for group, table in zip(self.groups, request.tables, strict=True):
        if table.snapshot:
            group.pool.give_back((table.snapshot,))
            table.snapshot = 0
    return []


def forget_nothing(self: PageTables) -> None:
    pass


def find_any_state(self: StatePage, names: list[bytes], length: int) -> int:
    return length // self.page_size * self.page_size if self.pool.named else 0


def accept_every_draft(request: Request, span: object, tokens: tuple[int, ...], totals: object) -> object:
    stop = original_append(request, span, tokens, totals)
    if span.drafts:
        request.computed = request.planned = span.start + span.count
    return stop


original_append = landing.append

MUTANTS = [
    (scheduler, "longest_hit", hit_the_last_token),
    (PagePool, "share", share_without_counting),
    (PagePool, "_forget", lambda self, page: None),
    (PageNames, "follow", follow_tokens_alone),
    (PageNames, "root", no_salt),
    (PositionPages, "_first", see_a_page_less),
    (PositionPages, "room", room_for_one_more),
    (PageTables, "restore", restore_nothing),
    (PageTables, "forget", forget_nothing),
    (StatePage, "hit", find_any_state),
    (scheduler, "append", accept_every_draft),
]


@pytest.mark.parametrize(("owner", "name", "broken"), MUTANTS, ids=[f"{m[1]}-{m[2].__name__}" for m in MUTANTS])
def test_the_simulation_notices_a_broken_scheduler(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, broken: object
) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(SimulationFailure):
        simulate(first_seed=1, requests=6000)

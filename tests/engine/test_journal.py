"""The journal hands out everything once, over any number of restarts; the search for the guilty ends and spares others."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from quire.core.params import SamplingParams
from quire.core.plan import Event, TokenLogprobs
from quire.core.request import CoreRequest
from quire.core.stats import Stats
from quire.engine.blackbox import MOST_TICKETS, BlackBox, new_file
from quire.engine.journal import Entry, Journal
from quire.engine.suspects import Cause, Suspects
from quire.engine.totals import Totals


def request(name: str) -> CoreRequest:
    return CoreRequest(name, (1, 2, 3), SamplingParams(), 0)


def logprobs(*tokens: int) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs((token,), (-1.0,), (1,)) for token in tokens)


def test_entries_live_as_long_as_their_requests() -> None:
    journal = Journal()
    first, second = journal.open(request("a")), journal.open(request("b"))
    assert len(journal) == 2 and "a" in journal and [entry.ticket for entry in journal] == [1, 2]
    assert journal.find("b") is second and journal.get(first.ticket) is first
    journal.close(first)
    assert "a" not in journal and journal.find("a") is None and journal.get(first.ticket) is None
    assert journal.open(request("a")).ticket == 3  # the id is free, the ticket is not


def test_prompt_logprobs_come_once() -> None:
    entry = Journal().open(request("a"))
    assert entry.take(Event("a", prompt_logprobs=logprobs(2))).prompt_logprobs == logprobs(2)
    for _ in range(2):  # died in the middle of the prompt, twice
        entry.restart()
        assert entry.take(Event("a", prompt_logprobs=logprobs(2))).prompt_logprobs == ()
    found = entry.take(Event("a", (7,), prompt_logprobs=logprobs(3), times={"first_token": 1.0}, cached_tokens=2))
    assert found.prompt_logprobs == logprobs(3) and found.times and entry.emitted.tolist() == [7]
    entry.restart()
    again = entry.take(Event("a", (8,), times={"first_token": 5.0}, cached_tokens=3))
    assert again.tokens == (8,) and not again.times and again.cached_tokens == 2
    last = entry.take(Event("a", (9,), finish_reason="length", times={"finished": 6.0}, cached_tokens=3))
    assert last.times == {"finished": 6.0} and last.cached_tokens == 2 and entry.emitted.tolist() == [7, 8, 9]


def test_a_token_clears_of_suspicion() -> None:
    journal = Journal()
    entries = [journal.open(request(name)) for name in "abc"]
    suspects = Suspects(journal)
    for _ in range(10):
        assert suspects.died(tickets(entries), Cause.SHORTAGE) is None and not suspects.searching
        for entry in entries:
            entry.take(Event(entry.request.request_id, (1,)))
    assert suspects.died([], Cause.CRASH) is None and suspects.died([99], Cause.CRASH) is None


def opened(journal: Journal, count: int, emitted: int = 1) -> list[Entry]:
    entries = [journal.open(request(str(len(journal)))) for _ in range(count)]
    for entry in entries:
        entry.emitted.extend([1] * emitted)
    return entries


def tickets(entries: Sequence[Entry]) -> list[int]:
    return [entry.ticket for entry in entries]


def test_one_crash_is_enough_to_try_who_was_computed() -> None:
    """Each by itself; who dies then is the one."""
    journal = Journal()
    entries, suspects = opened(journal, 4), Suspects(journal)
    assert suspects.died(tickets(entries[:3]), Cause.CRASH) is None
    assert list(map(suspects.may_run, entries)) == [True, False, False, False]
    assert not suspects.acquit(entries[2]), "it was not its turn"
    assert suspects.acquit(entries[0]) and list(map(suspects.may_run, entries)) == [False, True, False, False]
    assert suspects.died([], Cause.CRASH) is None and suspects.died([99], Cause.CRASH) is None
    assert suspects.died(tickets(entries[1:2]), Cause.CRASH) is entries[1]
    assert suspects.acquit(entries[1]) and suspects.acquit(entries[2])
    assert not suspects.searching and all(map(suspects.may_run, entries))


def test_kills_from_outside_let_the_late_go_first() -> None:
    """All together, for nobody is suspected; only where they are killed once more by themselves they are tried."""
    journal = Journal()
    entries, suspects = opened(journal, 4), Suspects(journal)
    waiting = opened(journal, 1, emitted=0)
    suspects.died(tickets(entries), Cause.SHORTAGE)
    assert not suspects.searching
    entries[0].take(Event(entries[0].request.request_id, (1,)))
    suspects.died(tickets(entries[:2]), Cause.SHORTAGE)
    assert suspects.on_trial == entries[1:] and waiting[0] not in suspects.on_trial
    suspects.died(tickets(entries[1:]), Cause.SHORTAGE)
    assert suspects.on_trial == entries[1:2]
    for _ in range(2):
        assert suspects.died(tickets(entries[1:2]), Cause.SHORTAGE) is None
    assert suspects.died(tickets(entries[1:2]), Cause.SHORTAGE) is entries[1]
    assert not any(entry.deaths or entry.blame or entry.kills_alone for entry in entries)


def test_a_lone_request_is_ended_by_its_second_crash() -> None:
    journal = Journal()
    [entry], suspects = opened(journal, 1), Suspects(journal)
    assert suspects.died([entry.ticket], Cause.CRASH) is None
    assert suspects.died([entry.ticket], Cause.CRASH) is entry


def test_somebodys_kills_are_taken_for_chance_for_long() -> None:
    """A long prompt without any company is killed by hand, or by whoever tries what a server can bear."""
    journal = Journal()
    [entry], suspects = opened(journal, 1, emitted=0), Suspects(journal)
    for _ in range(Cause.KILL - 1):
        assert suspects.died([entry.ticket], Cause.KILL) is None and suspects.may_run(entry)
    assert suspects.died([entry.ticket], Cause.KILL) is entry


def test_who_never_got_a_token_is_tried_first() -> None:
    journal = Journal()
    entries, suspects = opened(journal, 64), Suspects(journal)
    entries += opened(journal, 1, emitted=0)
    suspects.died(tickets(entries), Cause.CRASH)
    assert suspects.on_trial == entries[64:]
    assert suspects.died(tickets(entries[64:]), Cause.CRASH) is entries[64]


def test_an_eighth_of_the_suspects_is_tried_at_a_time() -> None:
    journal = Journal()
    entries, suspects = opened(journal, 64), Suspects(journal)
    suspects.died(tickets(entries), Cause.CRASH)
    for entry in entries[:8]:
        suspects.acquit(entry)
    assert suspects.on_trial == entries[8:16]
    assert suspects.died(tickets(entries[10:16]), Cause.CRASH) is None, "two of them have not been computed"
    assert suspects.on_trial == entries[10:11]
    assert suspects.died(tickets(entries[10:11]), Cause.CRASH) is entries[10]


def test_another_ticket_keeps_the_request() -> None:
    journal = Journal()
    first, second = opened(journal, 2)
    before = first.ticket
    journal.renew(first)
    assert journal.get(before) is None and journal.get(first.ticket) is first is journal.find("0")
    assert list(journal) == [second, first]
    journal.close(first)
    assert "0" not in journal and len(journal) == 1


@pytest.mark.parametrize(("cause", "most_deaths"), [(Cause.CRASH, 4), (Cause.SHORTAGE, 8), (Cause.KILL, 18)])
@pytest.mark.parametrize("seed", range(30))
def test_the_guilty_are_found_and_nobody_else(seed: int, cause: Cause, most_deaths: int) -> None:
    draw = random.Random(seed)
    journal = Journal()
    entries = [journal.open(request(str(index))) for index in range(draw.randint(1, 70))]
    guilty = {entry.ticket for entry in draw.sample(entries, min(len(entries), draw.randint(1, 3)))}
    suspects, deaths, most = Suspects(journal), 0, draw.randint(1, 70)
    convicted = set()
    while guilty - convicted:
        running = [entry for entry in entries if journal.get(entry.ticket) is entry and suspects.may_run(entry)]
        assert running, "everybody waits"
        batch = running[:most]  # as many as there are rows
        if any(entry.ticket in guilty for entry in batch):
            deaths += 1
            culprit = suspects.died(tickets(batch), cause)
            if culprit is not None:
                convicted.add(culprit.ticket)
                journal.close(culprit)
                suspects.acquit(culprit)
        else:
            for entry in batch:
                entry.take(Event(entry.request.request_id, (1,)))
                if len(batch) == most or draw.random() < 0.8:
                    journal.close(entry)  # it has ended
                suspects.acquit(entry)
    assert convicted == guilty
    # Together (of kills three times), an eighth of up to 70, an eighth of that one, alone as often as convicts.
    assert deaths <= len(guilty) * most_deaths


@pytest.mark.parametrize("seed", range(20))
def test_kills_at_random_convict_nobody(seed: int) -> None:
    """Nobody is guilty; kills come so fast that most requests are suspected again and again."""
    draw = random.Random(seed)
    journal = Journal()
    entries = [journal.open(request(str(index))) for index in range(64)]
    suspects = Suspects(journal)
    for _ in range(200):
        running = [entry for entry in journal if suspects.may_run(entry)]
        assert running
        if draw.random() < 0.1:
            assert suspects.died(tickets(running), Cause.SHORTAGE) is None
            continue
        for entry in draw.sample(running, (len(running) + 1) // 2):
            entry.take(Event(entry.request.request_id, (1,)))
            suspects.acquit(entry)
    for _ in range(100):
        for entry in list(journal):
            if suspects.may_run(entry):
                suspects.acquit(entry)
    assert all(suspects.may_run(entry) for entry in entries) and not suspects.searching


def test_the_black_box_outlives_a_writer() -> None:
    file = new_file()
    writer, reader = BlackBox(file), BlackBox(file)
    assert reader.in_flight() == []
    writer.note(6, [5, 2**40])
    writer.note(7, [5, 9])
    assert sorted(reader.in_flight()) == [5, 9, 2**40]
    writer.clear(6)
    assert sorted(reader.in_flight()) == [5, 9]
    writer.note(11, list(range(MOST_TICKETS + 10)))
    assert len(reader.in_flight()) == MOST_TICKETS
    writer.close()
    reader.close()


def test_counters_go_on_and_gauges_do_not() -> None:
    totals = Totals()
    totals.take(Stats(running=3, steps=10, generated_tokens=30, pages=(8,), free_pages=(2,), finished={"stop": 1}))
    totals.bury()
    assert totals.stats.running == 0 and totals.stats.free_pages == (8,) and totals.stats.generated_tokens == 30
    totals.take(Stats(running=1, steps=5, generated_tokens=7, pages=(8,), free_pages=(7,), finished={"stop": 2}))
    found = totals.stats
    assert (found.running, found.steps, found.generated_tokens) == (1, 15, 37)
    assert found.free_pages == (7,) and found.finished == {"stop": 3}

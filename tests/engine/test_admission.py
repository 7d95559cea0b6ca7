"""AdmissionControl: the measured pace, what it says about waiting, who is refused. And deadlines, through the Engine."""

from __future__ import annotations

import pytest
from bytes_engine import Shape, byte_engine, drain, finals, mixer

from quire.core.params import SamplingParams
from quire.core.stats import Queue, Stats
from quire.engine.admission import LATE, AdmissionControl, Limits
from quire.engine.engine import Engine
from quire.errors import DeadlineError, OverloadedError, ValidationError

LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def measured(limits: Limits, pace: float = 100.0) -> AdmissionControl:
    """A control that has seen an engine compute `pace` positions per second for ten seconds."""
    found = AdmissionControl(limits)
    for second in range(11):
        found.note(Stats(running=4, computed_tokens=int(pace * second)), float(second))
    assert found.pace == pytest.approx(pace)
    return found


def test_the_wait_is_the_queues_work_over_the_pace() -> None:
    admission = measured(Limits())
    # Ten requests have made 200 tokens: 20 each. Four wait with 60 tokens of prompts: 60 + 4 * 20, and one more turn.
    stats = Stats(
        running=2, waiting=4, waiting_tokens=60, generated_tokens=200, finished={"stop": 8}, queues={"": Queue(4, 60)}
    )
    assert admission.wait(stats) == pytest.approx((60 + 4 * 20 + 20) / 100)
    assert admission.wait_behind(stats, Queue(1, 10)) == pytest.approx((10 + 2 * 20) / 100)
    assert admission.wait(Stats(running=2)) == 0.0


def test_idle_time_does_not_count() -> None:
    admission = measured(Limits())
    admission.note(Stats(computed_tokens=1000), 11.0)
    admission.note(Stats(running=1, computed_tokens=1000), 500.0)
    admission.note(Stats(running=1, computed_tokens=1100), 501.0)
    assert admission.pace == pytest.approx(100.0)


def test_a_tenant_waits_for_its_own_queue_and_as_much_of_the_others() -> None:
    admission = measured(Limits(fair=True))
    stats = Stats(waiting=101, waiting_tokens=10100, queues={"flood": Queue(100, 10000), "small": Queue(1, 100)})
    assert admission.wait(stats, "flood") == pytest.approx(10100 / 100)
    assert admission.wait(stats, "small") == pytest.approx(200 / 100)
    assert admission.wait(stats, "new") == 0.0


def test_a_full_queue_says_when_to_come_back() -> None:
    admission = measured(Limits(requests=4))
    stats = Stats(waiting=4, waiting_tokens=1000, queues={"": Queue(4, 1000)})
    with pytest.raises(OverloadedError, match="4 requests wait already") as refused:
        admission.check(stats, 10)
    assert refused.value.retry_after == pytest.approx(10.0) and refused.value.status == 503
    admission.check(Stats(waiting=3, queues={"": Queue(3, 1000)}), 10)
    tokens = measured(Limits(tokens=1005))
    with pytest.raises(OverloadedError, match="1000 prompt tokens"):
        tokens.check(stats, 10)
    tokens.check(stats, 5)


def test_a_flood_does_not_take_the_queue_from_others() -> None:
    """Each tenant may have its part of a full queue."""
    admission = measured(Limits(requests=10, fair=True))
    flooded = Stats(waiting=10, waiting_tokens=100, queues={"flood": Queue(10, 100)})
    admission.check(flooded, 10, "other")
    with pytest.raises(OverloadedError):
        admission.check(flooded, 10, "flood")
    both = Stats(waiting=15, waiting_tokens=150, queues={"flood": Queue(10, 100), "other": Queue(5, 50)})
    with pytest.raises(OverloadedError):
        admission.check(both, 10, "other")


def test_too_little_time_is_refused_at_once() -> None:
    admission = measured(Limits())
    stats = Stats(waiting=4, waiting_tokens=1000, queues={"": Queue(4, 1000)})
    with pytest.raises(DeadlineError, match="4 requests wait, and its turn would come after about 10.1 s") as refused:
        admission.check(stats, 10, seconds_left=4.0)
    assert refused.value.status == 429 and refused.value.retry_after == pytest.approx(6.1)
    admission.check(stats, 10, seconds_left=11.0)
    AdmissionControl(Limits()).check(stats, 10, seconds_left=0.1)  # nothing is known yet


class Clock:
    """A clock that the test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def clocked() -> tuple[Engine, Clock]:
    clock = Clock()
    engine = byte_engine(mixer, Shape(max_num_seqs=1))
    engine._clock = clock
    return engine, clock


def test_a_request_ends_when_its_time_is_over() -> None:
    engine, clock = clocked()
    engine.submit(engine.prepare("late", "hello", LONG, timeout=2.0))
    engine.submit(engine.prepare("waits", "hello", LONG, timeout=1.0))
    engine.submit(engine.prepare("patient", "hello", LONG, timeout=50.0))
    outputs = []
    for _ in range(10):
        outputs += engine.step()
    assert not finals(outputs)
    clock.now += 1.5
    ended = finals(engine.step())
    assert list(ended) == ["waits"] and ended["waits"].outputs[0].error == LATE
    clock.now += 1.0
    ended = finals(engine.step())
    assert list(ended) == ["late"]
    last = ended["late"].outputs[0]
    assert last.finish_reason == "error" and last.error == LATE and len(last.token_ids) >= 10
    assert engine.stats().running == 0
    assert finals(drain(engine))["patient"].outputs[0].finish_reason == "length"
    stats = engine.stats()
    assert stats.free_pages == stats.pages, "pages are free again"


def test_in_time_means_as_if_there_was_no_limit() -> None:
    engine, clock = clocked()
    engine.submit(engine.prepare("a", "hello", LONG, timeout=2.0))
    assert finals(drain(engine))["a"].outputs[0].finish_reason == "length"
    engine.submit(engine.prepare("a", "hello", LONG))  # the same id again, without a limit
    engine.step()
    clock.now += 10.0
    assert finals(drain(engine))["a"].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_times(timeout: float) -> None:
    engine, _ = clocked()
    with pytest.raises(ValidationError, match="timeout must be"):
        engine.prepare("a", "hello", LONG, timeout=timeout)


def test_places_in_the_queue() -> None:
    engine, _ = clocked()
    for name in ("first", "second", "third"):
        engine.submit(engine.prepare(name, "hello", LONG))
    engine.step()
    assert engine.place("first") is None and engine.place("nobody") is None
    second, third = engine.place("second"), engine.place("third")
    assert second is not None and second.number == 1 and second.wait is None
    assert third is not None and third.number == 2

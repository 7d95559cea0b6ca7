"""The Runner with toy models: plans carried out, caches addressed, and failures that stay with their request."""

from __future__ import annotations

import pytest
import torch

from quire.core.options import SchedulerOptions
from quire.core.params import SamplingParams
from quire.core.plan import Admission, GroupSpec, PageCopy, PageGrant, Span, StepPlan, StepResult
from quire.core.request import CoreRequest
from quire.core.scheduler import Scheduler
from quire.engine.core import EngineCore
from quire.engine.executor import LocalExecutor
from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.layers.batch import Batch
from quire.layers.spec import LayerSpec, ModelLayout, StateSpec
from quire.worker.device import Device
from quire.worker.kvstore import KVStore
from quire.worker.runner import Runner
from quire.worker.sampler import Sampler
from quire.worker.slots import Slots

VOCAB = 60
POISON = 59
SIZE = 997
STATE = LayerSpec("mixer", kind="state", states=(StateSpec("sum", (1,), torch.float32),))
FULL = LayerSpec("attention", heads=1, kv_heads=1, key_dim=4, value_dim=4)
WINDOW = LayerSpec("local", heads=1, kv_heads=1, key_dim=4, value_dim=4, window=6, group=1)
OPS = ops_of(reference)


def follow(state: int, token: int) -> int:
    return (state * 31 + token + 1) % SIZE


class Toy:
    """Says what a number that follows all tokens so far tells it; with `layer` FULL it sums over pages instead.

    The number lives in a recurrent state. The poison token makes forward raise, after states have moved on.
    """

    hf_config = None

    def __init__(self, *layers: LayerSpec) -> None:
        self.layout = ModelLayout(layers, VOCAB, 4, "native")
        self.calls = 0

    def forward(self, batch: Batch) -> torch.Tensor:
        self.calls += 1
        hidden = torch.zeros(len(batch.token_ids), dtype=torch.int64)
        for index, layer in enumerate(self.layout.layers):
            hidden += self._mix(batch, index) if layer.kind == "state" else self._attend(batch, index, layer)
        if (batch.token_ids == POISON).any():
            raise FloatingPointError("poison")
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        # The poison itself is never said.
        logits[torch.arange(len(logits)), hidden[batch.logit_rows] % POISON] = 5.0
        return logits

    def _mix(self, batch: Batch, index: int) -> torch.Tensor:
        out = []
        for s in range(len(batch.rows_host)):
            page = int(batch.groups[0].tables[s, 0])
            first, end = batch.starts_host[s], batch.starts_host[s + 1]
            state = int(batch.caches[index][0][page]) if batch.positions[first] else 0
            for token in batch.token_ids[first:end].tolist():
                state = follow(state, token)
                out.append(state)
            batch.caches[index][0][page] = state
        return torch.tensor(out)

    def _attend(self, batch: Batch, index: int, layer: LayerSpec) -> torch.Tensor:
        """Mean of the tokens seen, through the real ops."""
        group = batch.groups[layer.group]
        value = batch.token_ids.float()[:, None, None].expand(-1, 1, 4)
        OPS.write_cache(batch.caches[index], torch.zeros_like(value), value, group.slots)
        query = torch.zeros_like(value)
        mean = OPS.attention(
            query, batch.caches[index], group.tables, batch.starts, batch.lengths, 1.0, window=layer.window
        )
        return (mean[:, 0, 0] * 7).round().long()

    def release(self, slot: int) -> None:
        pass


def toy_groups(*layers: LayerSpec) -> tuple[GroupSpec, ...]:
    made = []
    for layer in layers:
        kind = "state" if layer.kind == "state" else "window" if layer.window else "full"
        made.append(GroupSpec(kind, 1 if kind == "state" else 4, 40, layer.window))
    return tuple(made)


def make_runner(model: Toy) -> Runner:
    device = Device("cpu")
    groups = toy_groups(*model.layout.layers)
    slots = Slots(8, 64, groups, device)
    store = KVStore(model.layout, groups, torch.float32, OPS, device)
    return Runner(model, slots, store, Sampler(slots, OPS, device, "raw_logprobs"), device, max_tokens=8)


class ToyWorker:
    """What a LocalExecutor needs of a worker."""

    def __init__(self, model: Toy) -> None:
        self._runner = make_runner(model)

    def run(self, plan: StepPlan) -> StepResult:
        return self._runner.run(plan)

    def close(self) -> None:
        pass


def generate(model: Toy, prompts: dict[str, list[int]], tokens: int = 9) -> dict[str, list[int] | str]:
    """Tokens of each request, or the text of its error."""
    options = SchedulerOptions(toy_groups(*model.layout.layers), 8, 8, 64)
    core = EngineCore(Scheduler(options), LocalExecutor(ToyWorker(model)))
    params = SamplingParams(temperature=0.0, max_tokens=tokens)
    for request_id, prompt in prompts.items():
        core.add(CoreRequest(request_id, tuple(prompt), params, seed=1))
    found: dict[str, list[int] | str] = {request_id: [] for request_id in prompts}
    while core.has_work():
        for event in core.step():
            found[event.request_id] = event.error or [*found[event.request_id], *event.tokens]
    core.close()
    return found


PROMPTS = {"a": list(range(1, 14)), "b": [5], "c": [9, 9, 9, 8, 8], "d": list(range(30, 50))}
MODELS = {
    "state": (STATE,),
    "full": (FULL,),
    "full and window": (FULL, WINDOW),
    "state and full": (STATE, LayerSpec("late", heads=1, kv_heads=1, key_dim=4, value_dim=4, group=1)),
}


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
def test_together_as_alone(layers):
    together = generate(Toy(*layers), PROMPTS)
    for request_id, prompt in PROMPTS.items():
        assert generate(Toy(*layers), {request_id: prompt})[request_id] == together[request_id]


def test_the_state_model_says_what_it_should():
    state, said = 0, []
    for token in PROMPTS["c"]:
        state = follow(state, token)
    for _ in range(9):
        said.append(state % POISON)
        state = follow(state, said[-1])
    assert generate(Toy(STATE), PROMPTS)["c"] == said


@pytest.mark.parametrize("layers", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("place", [0, 6, 11])
def test_a_request_that_breaks_the_model_breaks_alone(layers, place):
    healthy = generate(Toy(*layers), PROMPTS)
    bad = [3] * 12
    bad[place] = POISON
    found = generate(Toy(*layers), {**PROMPTS, "bad": bad})
    assert "poison" in found.pop("bad")
    assert found == healthy


def test_state_behind_a_window_cannot_be_computed_again_and_says_so():
    class Once(Toy):
        def forward(self, batch: Batch) -> torch.Tensor:
            logits = super().forward(batch)
            if self.calls == 20:
                raise FloatingPointError("once")
            return logits

    layers = (STATE, LayerSpec("local", heads=1, kv_heads=1, key_dim=4, value_dim=4, window=6, group=1))
    found = generate(Once(*layers), {"a": PROMPTS["a"]}, tokens=30)
    assert "left its window" in found["a"]


def test_a_passing_failure_is_not_noticed_by_a_model_with_state():
    class Once(Toy):
        def forward(self, batch: Batch) -> torch.Tensor:
            logits = super().forward(batch)
            if self.calls == 6:
                raise FloatingPointError("once")
            return logits

    assert generate(Once(STATE), PROMPTS) == generate(Toy(STATE), PROMPTS)


def test_a_sampling_step_that_raises_fails_its_row_only(monkeypatch):
    model = Toy(STATE)
    runner = make_runner(model)
    wishes = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.0, logit_bias={4: 1.0})]
    plan = StepPlan(
        0,
        admitted=tuple(Admission(slot, f"r{slot}", (1, 2), 2, wish, 0) for slot, wish in enumerate(wishes)),
        grants=(PageGrant(0, 0, 0, (1,)), PageGrant(1, 0, 0, (2,))),
        spans=(Span(0, 0, 2, True), Span(1, 0, 2, True)),
    )
    step = next(item for item in runner._sampler._steps if type(item).__name__ == "LogitBias")
    monkeypatch.setattr(step, "apply", lambda *_: 1 / 0)
    good, bad = runner.run(plan).spans
    assert good.tokens and good.error is None
    assert "ZeroDivisionError" in bad.error and not bad.tokens


def test_an_admission_that_raises_fails_its_request_only(monkeypatch):
    runner = make_runner(Toy(STATE))
    step = runner._sampler._steps[0]
    monkeypatch.setattr(step, "admit", lambda new, params: 1 / 0 if new.slot == 1 else False)
    wish = SamplingParams(temperature=0.0)
    plan = StepPlan(
        0,
        admitted=tuple(Admission(slot, f"r{slot}", (1, 2), 2, wish, 0) for slot in (0, 1)),
        grants=(PageGrant(0, 0, 0, (1,)), PageGrant(1, 0, 0, (2,))),
        spans=(Span(0, 0, 2, True), Span(1, 0, 2, True)),
    )
    good, bad = runner.run(plan).spans
    assert good.tokens and "ZeroDivisionError" in bad.error
    # The row is healthy again for whoever comes next.
    monkeypatch.undo()
    later = StepPlan(
        1,
        released=(1,),
        admitted=(Admission(1, "r2", (1, 2), 2, wish, 0),),
        grants=(PageGrant(1, 0, 0, (2,)),),
        spans=(Span(1, 0, 2, True),),
    )
    assert runner.run(later).spans[0].tokens == good.tokens


def test_page_copies_reach_every_layer_of_their_group():
    model = Toy(STATE, LayerSpec("more", kind="state", states=(StateSpec("sum", (1,), torch.float32),)))
    device, groups = Device("cpu"), (GroupSpec("state", 1, 5),)
    store = KVStore(model.layout, groups, torch.float32, OPS, device)
    for cache in store.caches:
        cache[0][1] = 7.0
    store.copy((PageCopy(0, 1, 2), PageCopy(0, 2, 3)))
    assert [cache[0].flatten().tolist() for cache in store.caches] == [[0, 7, 7, 7, 0]] * 2


def test_layers_that_share_have_one_cache():
    layout = ModelLayout((FULL, LayerSpec("reader", heads=1, shares=0)), VOCAB, 4, "native")
    store = KVStore(layout, (GroupSpec("full", 4, 3),), torch.float32, OPS, Device("cpu"))
    assert store.caches[1] is store.caches[0]


def test_logits_only_for_rows_that_are_wanted_and_prompt_logprobs_in_pieces():
    model = Toy(STATE)
    runner = make_runner(model)
    wish = SamplingParams(temperature=0.0, prompt_logprobs=0)
    first = StepPlan(
        0,
        admitted=(
            Admission(0, "a", (1, 2, 3, 4, 5), 5, wish, 0),
            Admission(1, "b", (6, 7, 8), 3, SamplingParams(temperature=0.0), 0),
        ),
        grants=(PageGrant(0, 0, 0, (1,)), PageGrant(1, 0, 0, (2,))),
        spans=(Span(0, 0, 3, False), Span(1, 0, 3, True)),
    )
    asking, other = runner.run(first).spans
    assert [entry.token_ids for entry in asking.prompt_logprobs] == [(2,), (3,), (4,)] and not asking.tokens
    assert other.tokens and not other.prompt_logprobs
    last = runner.run(StepPlan(1, spans=(Span(1, 3, 1, True), Span(0, 3, 2, True)))).spans[1]
    assert [entry.token_ids for entry in last.prompt_logprobs] == [(5,)]
    assert len(last.tokens) == 1

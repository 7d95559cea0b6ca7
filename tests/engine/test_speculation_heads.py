"""Heads that go on from a model's own hidden states: Medusa, EAGLE, MTP. Their formats, and that they change no answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from guesses import noted_guesses
from safetensors.torch import load_file, save_file
from test_speculation import BUNDLED, SETTINGS, TEXT, WAYS, ask, plain, told  # noqa: F401  plain is a fixture
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.config import EngineOptions
from quire.core.plan import Admission, GroupSpec, PageCopy, PageGrant, Span, StepPlan
from quire.errors import QuireError
from quire.kernels.table import load_ops
from quire.layers.spec import LayerSpec, ModelLayout
from quire.models.build import build_model
from quire.models.speculation.medusa import MedusaHeads
from quire.models.speculation.nextlayer import NextLayer
from quire.resolve import resolve
from quire.worker import draft_pages, worker
from quire.worker.device import Device
from quire.worker.draft_pages import DraftPages
from quire.worker.governor import Governor
from quire.worker.kvstore import KVStore
from quire.worker.slots import Slots

GOING_ON = {"method": "eagle", "num_speculative_tokens": 3, "adaptive": False}
TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Each kind of heads for the bundled model, as a speculative_config: made here, the EAGLE head comes along."""
    import train_heads  # it imports transformers, for seconds

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("heads")
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()
    texts = train_heads.own_texts(BUNDLED / "model", 60)
    train_heads.save_medusa(train_heads.medusa_heads(target, texts, 3), folder / "medusa")
    train_heads.NextLayerTrainer(target, 64, mtp=True).save(folder / "mtp")
    return {
        "eagle": GOING_ON,
        "medusa": {**GOING_ON, "method": "medusa", "model": str(folder / "medusa")},
        "mtp": {**GOING_ON, "method": "mtp", "model": str(folder / "mtp")},
    }


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["eagle", "medusa", "mtp"])
def test_the_same_answers_with_heads(plain: list[object], heads: dict[str, dict[str, object]], kind: str, way: str):  # noqa: F811
    with LLM(**{**SETTINGS, **WAYS[way]}, speculative_config=heads[kind]) as llm:
        assert told(ask(llm)) == plain
        stats = llm._engine.stats()
    assert stats.draft_tokens > 100
    # Of the untrained mtp layer no guess need be right. 13 to 14 % were seen for eagle; other kernels may say other texts.
    assert stats.accepted_tokens >= {"eagle": 0.08, "medusa": 0.02, "mtp": 0}[kind] * stats.draft_tokens
    assert stats.preemptions > 0 or way != "preempted"


def test_the_same_answers_while_guesses_are_on_trial(plain: list[object]):  # noqa: F811
    """Steps with and without the model's states, one after the other."""
    with LLM(**SETTINGS, speculative_config={**GOING_ON, "adaptive": True}) as llm:
        for _ in range(4):
            assert told(ask(llm)) == plain
        stats = llm._engine.stats()
    assert 0 < stats.draft_tokens < 0.5 * stats.generated_tokens


@pytest.fixture(scope="module")
def plain_through_the_library() -> Iterator[list[object]]:
    with LLM(**SETTINGS, model_impl="transformers") as llm:
        yield told(ask(llm))


@pytest.mark.parametrize("kind", ["eagle", "medusa", "mtp"])
def test_the_same_answers_through_the_library(
    plain_through_the_library: list[object], heads: dict[str, dict[str, object]], kind: str
):
    """With a model that runs through the Transformers library the heads guess as well as with a native one."""
    with LLM(**SETTINGS, model_impl="transformers", speculative_config=heads[kind]) as llm:
        assert told(ask(llm)) == plain_through_the_library
        stats = llm._engine.stats()
    assert stats.accepted_tokens >= {"eagle": 0.08, "medusa": 0.02, "mtp": 0}[kind] * stats.draft_tokens
    assert stats.draft_tokens > 100


@pytest.mark.parametrize("way", WAYS)
def test_guesses_do_not_depend_on_what_lies_in_fresh_memory(way: str, monkeypatch: pytest.MonkeyPatch):
    """Whatever the head's pages hold at first, the same guesses are made: n answers, hits and preemptions included."""
    said = [guesses_over(content, way, monkeypatch) for content in (0.0, float("nan"), 9.0)]
    assert said[0] == said[1] == said[2]
    assert sum(map(len, said[0])) > 300


def guesses_over(content: float, way: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the same requests twice, in the order of the steps, with `content` in all of the head's pages at first."""

    class Spoilt(KVStore):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            for cache in self.caches:
                cache.data.fill_(content)

    with monkeypatch.context() as patch:
        patch.setattr(draft_pages, "KVStore", Spoilt)
        made = noted_guesses(patch)
        with LLM(**{**SETTINGS, **WAYS[way]}, speculative_config=GOING_ON) as llm:
            ask(llm)
            ask(llm)
    return [guess for _, guess in made]


class Late(Governor):
    """Leaves rows alone for their first steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def wanted(self, rows: int) -> bool:
        return self.open()

    def open(self) -> bool:
        return self.steps > 20

    def note(self, rows: Sequence[int], tokens: Sequence[float], seconds: float, blind: bool = False) -> None:
        self.steps += 1


@pytest.mark.parametrize("kind", ["eagle", "medusa"])
def test_rows_that_were_left_alone_are_guessed_for_again(
    heads: dict[str, dict[str, object]], kind: str, monkeypatch: pytest.MonkeyPatch
):
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    with LLM(**SETTINGS) as llm:
        expected = llm.generate(TEXT, params, use_tqdm=False)[0].outputs[0].token_ids
    monkeypatch.setattr(worker, "Governor", Late)
    with LLM(**SETTINGS, speculative_config={**heads[kind], "adaptive": True}) as llm:
        assert llm.generate(TEXT, params, use_tqdm=False)[0].outputs[0].token_ids == expected
        stats = llm._engine.stats()
    assert stats.draft_tokens > 60
    assert stats.accepted_tokens > {"eagle": 0.15, "medusa": 0.03}[kind] * stats.draft_tokens


def test_pages_that_were_filled_without_the_head_are_known():
    slots = Slots(2, 60, [GroupSpec("full", 16, 9)], Device("cpu"))
    layout = ModelLayout((LayerSpec("head", heads=1, kv_heads=1, key_dim=8, value_dim=8),), 60, 8, "native")
    pages = DraftPages(layout, slots, 3, torch.float32, load_ops("cpu"), Device("cpu"))
    first, second = np.array([0]), np.array([1])
    pages.begin(plan_of(PageGrant(0, 0, 0, (2, 5)), PageGrant(1, 0, 0, (3,))))
    pages.note(np.array([0, 1]), np.array([0, 0]), np.array([20, 3]))
    assert pages.filled(0, 20) and pages.filled(1, 3) and not pages.filled(1, 4)
    assert pages.filled(0, 16) and not pages.filled(0, 21)
    pages.begin(plan_of(PageGrant(0, 0, 2, (4,)), start=20))
    pages.note(first, np.array([32]), np.array([36]))
    assert not pages.filled(0, 33), "what a page missed once it misses"
    # A whole page of row 0, and a copy of one that it has begun.
    pages.begin(plan_of(PageGrant(1, 0, 0, (2, 6)), start=20))
    assert not pages.filled(1, 20), "nothing is there before the copy"
    pages.copy([PageCopy(0, 5, 6)])
    assert pages.filled(1, 20) and not pages.filled(1, 21)
    pages.note(second, np.array([20]), np.array([32]))
    assert pages.filled(1, 32)
    pages.begin(plan_of(PageGrant(1, 0, 0, (5, 6)), start=0))
    assert not pages.filled(1, 1), "another request has these pages now"


def plan_of(*grants: PageGrant, start: int = 0) -> StepPlan:
    """A step that grants pages to rows which go on from `start`."""
    return StepPlan(0, grants=grants, spans=tuple(Span(grant.slot, start, 1, True) for grant in grants))


def test_guesses_are_those_of_the_plain_head(monkeypatch: pytest.MonkeyPatch):
    """Every guess for chunked, preempted and drafted rows, beside the head computed over the whole text at once."""
    import train_heads

    made = noted_guesses(monkeypatch)
    ways = {"max_num_batched_tokens": 13, "num_gpu_blocks_override": 11, "enable_prefix_caching": False}
    with LLM(**{**SETTINGS, **ways}, dtype="float32", speculative_config=GOING_ON) as llm:
        params = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
        llm.generate([f"{TEXT} {end}" for end in ("river. The", "hill and", "river, and the", "sea.")], params)
        assert llm._engine.stats().preemptions > 0
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()
    head = train_heads.NextLayerTrainer(target, 352, mtp=False)
    head.load_state_dict(plain_names(load_file(BUNDLED / "eagle" / "model.safetensors")))
    guessed = [(text, guess) for text, guess in made if guess]
    assert len(guessed) > 60
    for text, guess in guessed[::3]:
        for margin in plain_margins(target, head, text, guess):
            assert margin < 1e-2, "another token is the better guess"


def plain_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of the trainer."""
    return {name if name.startswith("fc") else f"body.{name}": tensor.float() for name, tensor in tensors.items()}


@torch.no_grad()
def plain_margins(
    target: torch.nn.Module, head: torch.nn.Module, text: list[int], guess: tuple[int, ...]
) -> list[float]:
    """How far each guess's score is below the best one's, with everything computed again for each of them."""
    states = target.model(torch.tensor([text[:-1]])).last_hidden_state
    found, known = [], list(text)
    for token in guess:
        made = head(target.get_input_embeddings()(torch.tensor([known[1:]])), states)
        scores = target.get_output_embeddings()(made[0, -1])
        found.append(float(scores.max() - scores[token]))
        states, known = torch.cat((states, made[:, -1:]), dim=1), [*known, token]
    return found


def test_a_medusa_head_is_what_its_format_says(heads: dict[str, dict[str, object]]):
    tensors = load_file(Path(heads["medusa"]["model"]) / "medusa_lm_head.safetensors")
    torch.manual_seed(1)
    tensors = {name: 0.1 * torch.randn_like(tensor) for name, tensor in tensors.items()}
    folder = Path(heads["medusa"]["model"]).with_name("other")
    folder.mkdir()
    (folder / "config.json").write_text('{"medusa_num_heads": 5, "medusa_num_layers": 1}')  # wrong, as published ones
    torch.save({f"medusa_head.{name}": tensor for name, tensor in tensors.items()}, folder / "medusa_lm_head.pt")
    config = {**heads["medusa"], "model": str(folder)}
    resolved = resolve(EngineOptions.from_flat({**SETTINGS, "speculative_config": config}))
    where, layout = torch.device("cpu"), resolved.layout
    found = MedusaHeads(resolved.draft.files, layout, torch.float32, where, load_ops("cpu"))
    states = torch.randn(5, layout.hidden_size)
    assert found.count == 3
    for head in range(3):
        part = {name.removeprefix(f"{head}."): value.float() for name, value in tensors.items() if name[0] == str(head)}
        block = F.linear(states, part["0.linear.weight"], part["0.linear.bias"])
        expected = F.linear(states + F.silu(block), part["1.weight"])
        torch.testing.assert_close(found.forward(states, head), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_a_next_layer_is_what_was_trained(heads: dict[str, dict[str, object]], kind: str, tmp_path: Path):
    """Over a whole text at once, beside the module that tools/train_heads.py trains."""
    import train_heads

    torch.manual_seed(3)
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()
    trainer = train_heads.NextLayerTrainer(target, 96, mtp=kind == "mtp")
    trainer.save(tmp_path / kind)
    if kind == "mtp":  # two further layers, which are passed over
        [file] = (tmp_path / kind).glob("*.safetensors")
        tensors = load_file(file)
        for name in [name for name in tensors if name.startswith("mtp.layers.0.")]:
            for number in "12":
                tensors[name.replace(".0.", f".{number}.", 1)] = torch.zeros_like(tensors[name])
        save_file(tensors, file, metadata={"format": "pt"})
    trainer = trainer.to(torch.bfloat16).float()  # as it was saved
    options = {**SETTINGS, "dtype": "float32", "speculative_config": {**heads[kind], "model": str(tmp_path / kind)}}
    resolved = resolve(EngineOptions.from_flat(options))
    where, ops = torch.device("cpu"), load_ops("cpu")
    model = build_model(resolved.files, resolved.options.model, torch.float32, where, ops)
    layer = NextLayer(resolved.draft.files, resolved.draft.style, model, torch.float32, where, ops)
    ids, states = torch.randint(0, 4096, (9,)), torch.randn(9, 256)
    slots = Slots(1, 32, [GroupSpec("full", 16, 4)], Device("cpu"))
    slots.admit(Admission(0, "a", (1,), 1, SamplingParams(), 0))
    pages = DraftPages(layer.layout, slots, 3, torch.float32, ops, Device("cpu"))
    pages.begin(plan_of(PageGrant(0, 0, 0, (2,))))
    row, ends = np.zeros(1, dtype=np.int64), np.array([9])
    batch = pages.batch(row, ids, np.arange(9), np.array([0, 9]), ends, np.arange(9))
    batch.states = states
    expected = trainer(target.get_input_embeddings()(ids)[None], states[None])[0]
    torch.testing.assert_close(layer.forward(batch), expected.detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_config": {"method": "mtp"}}, "has no MTP layer"),
        ({"speculative_config": {"method": "medusa"}}, "needs heads trained for"),
        ({"speculative_config": {"method": "medusa", "model": str(BUNDLED / "draft")}}, "have no names like"),
    ],
)
def test_heads_that_are_not_there(options: dict[str, object], message: str):
    with pytest.raises(QuireError, match=message):
        LLM(**SETTINGS, **options)

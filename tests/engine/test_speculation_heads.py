"""Heads that go on from a model's own hidden states: Medusa, EAGLE, MTP. Their formats, and that they change no answer."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_speculation import BUNDLED, SETTINGS, WAYS, ask, plain, told  # noqa: F401  plain is a fixture
from transformers import AutoModelForCausalLM

from quire import LLM, SamplingParams
from quire.config import EngineOptions
from quire.core.plan import Admission, GroupSpec, PageGrant
from quire.errors import QuireError
from quire.kernels.table import load_ops
from quire.models.build import build_model
from quire.models.medusa import MedusaHeads
from quire.models.nextlayer import NextLayer
from quire.resolve import resolve
from quire.worker.device import Device
from quire.worker.draft_pages import DraftPages
from quire.worker.slots import Slots

GOING_ON = {"method": "eagle", "num_speculative_tokens": 3, "adaptive": False}
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """Each kind of heads for the bundled model, as a speculative_config: made here, the EAGLE head comes along."""
    sys.path.insert(0, str(TOOLS))
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
    # Above chance, which is a guess in thousands. How far differs from run to run: 2 to 15 % were seen for eagle.
    assert stats.accepted_tokens > {"eagle": 0.005, "medusa": 0.005, "mtp": -1}[kind] * stats.draft_tokens
    assert stats.preemptions > 0 or way != "preempted"


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
    trainer = trainer.to(torch.bfloat16).float()  # as it was saved
    options = {**SETTINGS, "dtype": "float32", "speculative_config": {**heads[kind], "model": str(tmp_path / kind)}}
    resolved = resolve(EngineOptions.from_flat(options))
    where, ops = torch.device("cpu"), load_ops("cpu")
    model = build_model(resolved.files, resolved.options.model, torch.float32, where, ops)
    layer = NextLayer(resolved.draft.files, resolved.draft.style, model, torch.float32, where, ops)
    ids, states = torch.randint(0, 4096, (9,)), torch.randn(9, 256)
    slots = Slots(1, 32, [GroupSpec("full", 16, 4)], Device("cpu"))
    slots.admit(Admission(0, "a", (1,), 1, SamplingParams(), 0))
    slots.grant([PageGrant(0, 0, 0, (2,))])
    pages = DraftPages(layer.layout, slots, 3, torch.float32, ops, Device("cpu"))
    row, ends = np.zeros(1, dtype=np.int64), np.array([9])
    batch = pages.batch(row, pages.tables(row, 9), ids, np.arange(9), np.array([0, 9]), ends, np.arange(9))
    expected = trainer(target.get_input_embeddings()(ids)[None], states[None])[0]
    torch.testing.assert_close(layer.forward(batch, states).scored, expected.detach(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_config": {"method": "mtp"}}, "has no MTP layer"),
        ({"speculative_config": {"method": "medusa"}}, "needs heads trained for"),
        ({"speculative_config": GOING_ON, "model_impl": "transformers"}, "runs through the Transformers library"),
        ({"speculative_config": {"method": "medusa", "model": str(BUNDLED / "draft")}}, "have no names like"),
    ],
)
def test_heads_that_are_not_there(options: dict[str, object], message: str):
    with pytest.raises(QuireError, match=message):
        LLM(**SETTINGS, **options)

"""Models that show what lies between embedding and output matrix: the parts make the whole, and layers can be tapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny import FAMILIES, VOCAB, write_tiny

from quire.config import ModelOptions
from quire.kernels.table import load_ops
from quire.models.build import build_model
from quire.models.files.hub import find_model
from quire.models.speculation.open_model import KeepsStates, OpenModel
from quire.models.twin.trial import PagedLoop

IDS = [[5, 9, 200, 31, 7, 7, 90], [41, 300, 12]]
COHERE = {name: value for name, value in FAMILIES["llama"].items() if name != "rms_norm_eps"}
OTHERS = {
    "cohere": {**COHERE, "logit_scale": 0.25},
    "granite": {**FAMILIES["llama"], "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


@pytest.mark.parametrize(
    ("family", "impl"),
    [("llama", "native"), ("qwen3_moe", "native"), ("llama", "transformers")]
    + [(family, "auto") for family in ("gemma2", "mixtral", "gpt2", "deepseek_v3", *OTHERS)],
)
@torch.no_grad()
def test_parts_of_a_model_make_the_whole(family: str, impl: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same bits by states and score, with taps or without; tapped layers read what the library's do."""
    if family in OTHERS:
        monkeypatch.setitem(FAMILIES, family, OTHERS[family])
    folder = write_tiny(tmp_path / family, family, tokenizer=False)
    files, ops = find_model(ModelOptions(model=str(folder))), load_ops("cpu")
    options = ModelOptions(model=str(folder), model_impl=impl)
    model = build_model(files, options, torch.float32, torch.device("cpu"), ops)
    assert isinstance(model, OpenModel) and model.layout.takes_back
    said, hidden = [], []
    for served in (model, KeepsStates(model), KeepsStates(model, taps=(2, 0))):
        loop = PagedLoop(served, ops)
        rows = [loop.start(slot, tokens) for slot, tokens in enumerate(IDS)]
        said.append(torch.cat(loop.step([(row, len(row.tokens)) for row in rows])))
        hidden.append(getattr(served, "hidden", None))
    assert torch.equal(said[0], said[1]) and torch.equal(said[0], said[2])
    assert said[0].shape == (2, VOCAB)
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read = [library(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in IDS]
    last, *taps = (torch.cat([states[layer][0] for states in read]) for layer in (-1, 2, 0))
    torch.testing.assert_close(hidden[1], last, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(hidden[2], torch.cat(taps, -1), rtol=2e-3, atol=2e-3)

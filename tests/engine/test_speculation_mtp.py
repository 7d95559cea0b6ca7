"""MTP layers of models that run through the Transformers library: their guesses beside the library's own layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from guesses import noted_guesses
from safetensors.torch import load_file, save_file
from torch import nn

from quire import LLM, SamplingParams

LAYERS = 3
GLM = {
    **tiny.DENSE,
    "head_dim": 8,
    **tiny.EXPERTS,
    "n_shared_experts": 1,
}
SETTINGS = {"device": "cpu", "threads": 1, "dtype": "float32", "kv_cache_memory_bytes": 1 << 24, "max_model_len": 128}
GUESSING = {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}
PROMPTS = [[7, 19, 200, 31, 8, 90, 61], [5, 44, 201, 3, 17], [9, 8, 7, 6, 5, 4] * 4]


class PlainMtp:
    """What the published description says, with the library's decoder layer; weights are made up."""

    def __init__(self, whole: nn.Module) -> None:
        config = whole.config
        size, eps = config.hidden_size, config.rms_norm_eps
        values = {**config.to_dict(), "num_hidden_layers": 1, "first_k_dense_replace": 0}
        self.body = type(whole.model)(type(config)(**values)).eval()
        self.body.layers[0].load_state_dict(whole.model.layers[LAYERS].state_dict())
        self.embed = whole.get_input_embeddings()
        self.own = {
            "eh_proj": 0.3 * torch.randn(size, 2 * size),
            "enorm": 1 + 0.2 * torch.randn(size),
            "hnorm": 1 + 0.2 * torch.randn(size),
            "shared_head.norm": 1 + 0.2 * torch.randn(size),
        }
        self.body.norm.weight.data.copy_(self.own["shared_head.norm"])
        self.eps = eps

    @torch.no_grad()
    def step(self, ids: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens one place on [T] and states [T, size] -> the next states, and what the output matrix reads."""
        parts = ((self.embed(ids), "enorm"), (states, "hnorm"))
        normed = [nn.functional.rms_norm(x, x.shape[-1:], self.own[name], self.eps) for x, name in parts]
        before: list[torch.Tensor] = []
        hook = self.body.norm.register_forward_pre_hook(lambda _, args: before.append(args[0][0]))
        joined = torch.cat(normed, -1) @ self.own["eh_proj"].T
        after = self.body(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0]
        hook.remove()
        return before[0], after


def write_model(folder: Path, family: str, guessing: int) -> tuple[Path, nn.Module, PlainMtp]:
    """A checkpoint of three layers and some that guess, the model without those, and the first of them as a plain layer."""
    tiny.write_tiny(folder, family, num_hidden_layers=LAYERS + 1)
    whole = tiny.tiny_model(family, num_hidden_layers=LAYERS + 1)
    plain = PlainMtp(whole)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in plain.own.items():
        tensors[f"model.layers.{LAYERS}.{name}.weight"] = tensor
    tensors[f"model.layers.{LAYERS}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"model.layers.{LAYERS}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    own = f"model.layers.{LAYERS}."
    for name in [name for name in tensors if name.startswith(own)]:
        for number in range(1, guessing):
            tensors[f"model.layers.{LAYERS + number}.{name[len(own) :]}"] = torch.randn_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": guessing}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == LAYERS + 1:
            config[name] = value[:LAYERS]
    (folder / "config.json").write_text(json.dumps(config))
    del whole.model.layers[LAYERS]
    whole.model.config.num_hidden_layers = LAYERS
    return folder, whole, plain


@pytest.mark.parametrize(("family", "guessing"), [("deepseek_v3", 1), ("glm4_moe", 3)])
@torch.no_grad()
def test_an_mtp_layer_guesses_as_the_librarys_own(
    family: str, guessing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "quire.models.speculation.draft")
    monkeypatch.setitem(tiny.FAMILIES, "glm4_moe", GLM)
    folder, target, plain = write_model(tmp_path / family, family, guessing)
    made = noted_guesses(monkeypatch)
    params = [SamplingParams(max_tokens=20, ignore_eos=True, temperature=t, seed=3) for t in (0.0, 0.0, 0.8)]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    said = []
    for options in ({}, {"speculative_config": GUESSING, "max_num_batched_tokens": 16}):
        with LLM(str(folder), **SETTINGS, **options) as llm:
            said.append([out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)])
    assert said[0] == said[1]
    assert ("has 3 MTP layers. The first one, model.layers.3.*" in caplog.text) == (guessing == 3)
    greedy = [(text, guess) for text, guess in made if guess and text[:2] != PROMPTS[2][:2]]
    assert len(greedy) > 20
    for text, guess in greedy[::2]:
        states = target.model(torch.tensor([text[:-1]])).last_hidden_state[0]
        known = list(text)
        for token in guess:
            new, scored = plain.step(torch.tensor(known[1:]), states)
            scores = target.lm_head(scored[-1])
            assert float(scores.max() - scores[token]) < 1e-2, "another token is the better guess"
            states, known = torch.cat((states, new[-1:])), [*known, token]

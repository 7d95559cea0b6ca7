"""EAGLE-3 heads: both published formats beside a plain computation, and that they change no answer on either path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from guesses import noted_guesses
from safetensors.torch import save_file
from test_speculation import BUNDLED, SETTINGS, TEXT, WAYS, ask, plain, told  # noqa: F401  plain is a fixture
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from quire import LLM, SamplingParams
from quire.errors import QuireError

SIZE, INNER, HEADS, KEPT, GUESSED, WORDS = 192, 64, 4, 2, 600, 4096
LAYERS = (1, 2, 4)
CONFIG = {
    "vocab_size": WORDS,
    "hidden_size": SIZE,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEPT,
    "head_dim": SIZE // HEADS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def random_head(own_embedding: bool, target_size: int = 256) -> dict[str, torch.Tensor]:
    """Weights of a head, by the names of the published format."""
    generator = torch.Generator().manual_seed(3)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    wide = SIZE // HEADS * KEPT
    found = {
        "fc.weight": matrix(SIZE, 3 * target_size),
        "midlayer.self_attn.q_proj.weight": matrix(SIZE, 2 * SIZE),
        "midlayer.self_attn.k_proj.weight": matrix(wide, 2 * SIZE),
        "midlayer.self_attn.v_proj.weight": matrix(wide, 2 * SIZE),
        "midlayer.self_attn.o_proj.weight": matrix(SIZE, SIZE),
        "midlayer.mlp.gate_proj.weight": matrix(INNER, SIZE),
        "midlayer.mlp.up_proj.weight": matrix(INNER, SIZE),
        "midlayer.mlp.down_proj.weight": matrix(SIZE, INNER),
        "lm_head.weight": matrix(GUESSED, SIZE),
    }
    for name in ("midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm", "norm"):
        found[f"{name}.weight"] = 1 + 0.3 * torch.randn(SIZE, generator=generator)
    chosen = torch.randperm(WORDS, generator=generator)[:GUESSED].sort().values
    found["d2t"] = chosen - torch.arange(GUESSED)
    found["t2d"] = torch.zeros(WORDS, dtype=torch.bool).index_fill(0, chosen, True)
    if own_embedding:
        found["embed_tokens.weight"] = matrix(WORDS, SIZE)
    return found


def write_head(folder: Path, form: str) -> Path:
    """A head in one of the formats; one in torch's own files, as the first ones were published."""
    folder.mkdir()
    tensors = random_head(own_embedding=True)
    config: dict[str, object] = {**CONFIG, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": GUESSED}
    config |= {"model_type": "llama", "eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in LAYERS]}}
    if form == "speculators":
        config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": GUESSED,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": list(LAYERS),
            "transformer_layer_config": {**CONFIG, "model_type": "llama"},
        }
        tensors = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(config))
    if form == "torch":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


class PlainHead:
    """The head as its paper has it, over a whole text at once."""

    def __init__(self, norm_first: bool) -> None:
        self.weights = {name.removeprefix("midlayer."): tensor for name, tensor in random_head(True).items()}
        self.rotary = LlamaRotaryEmbedding(LlamaConfig(**CONFIG))
        self.norm_first = norm_first

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (SIZE,), self.weights[f"{name}.weight"], 1e-5)

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def step(self, ids: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens one place on [T] and states [T, size] -> the next states, and logits of all tokens."""
        embedded = self.norm("input_layernorm", self.weights["embed_tokens.weight"][ids])
        normed = self.norm("hidden_norm", states)
        both = torch.cat((embedded, normed), -1)
        query, key, value = (
            self.linear(f"self_attn.{name}_proj", both).view(1, len(ids), -1, SIZE // HEADS).transpose(1, 2)
            for name in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, *self.rotary(both, torch.arange(len(ids))[None]))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        seen = self.linear("self_attn.o_proj", seen.transpose(1, 2).reshape(len(ids), SIZE))
        whole = seen + (normed if self.norm_first else states)
        x = self.norm("post_attention_layernorm", whole)
        inner = F.silu(self.linear("mlp.gate_proj", x)) * self.linear("mlp.up_proj", x)
        whole = whole + self.linear("mlp.down_proj", inner)
        logits = torch.full((len(ids), WORDS), float("-inf"))
        logits[:, self.weights["d2t"] + torch.arange(GUESSED)] = self.linear("lm_head", self.norm("norm", whole))
        return whole, logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("eagle3")
    return {form: write_head(where / form, form) for form in ("published", "torch", "speculators")}


def config_of(folder: Path) -> dict[str, object]:
    return {"method": "eagle", "model": str(folder), "num_speculative_tokens": 3, "adaptive": False}


@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("form", ["published", "torch", "speculators"])
@torch.no_grad()
def test_guesses_are_those_of_the_plain_head(
    folders: dict[str, Path], form: str, impl: str, monkeypatch: pytest.MonkeyPatch
):
    made = noted_guesses(monkeypatch)
    options = {
        **SETTINGS,
        "dtype": "float32",
        "model_impl": impl,
        "max_num_batched_tokens": 13,
        "enable_prefix_caching": False,
    }
    with LLM(**options, speculative_config=config_of(folders[form])) as llm:
        params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.0)
        llm.generate([f"{TEXT} {end}" for end in ("river. The", "sea.")], params, use_tqdm=False)
    target = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32).eval()
    head = PlainHead(norm_first=form == "speculators")
    assert len(made) > 20
    for text, guess in made[::3]:
        hidden = target(torch.tensor([text[:-1]]), output_hidden_states=True).hidden_states
        states = head.linear("fc", torch.cat([hidden[layer][0] for layer in LAYERS], -1))
        known = list(text)
        assert len(guess) == 3
        for token in guess:
            new, logits = head.step(torch.tensor(known[1:]), states)
            assert float(logits[-1].max() - logits[-1, token]) < 1e-2, "another token is the better guess"
            states, known = torch.cat((states, new[-1:])), [*known, token]


@pytest.mark.parametrize("way", WAYS)
def test_the_same_answers_with_a_fused_head(plain: list[object], folders: dict[str, Path], way: str):  # noqa: F811
    with LLM(**{**SETTINGS, **WAYS[way]}, speculative_config=config_of(folders["published"])) as llm:
        assert told(ask(llm)) == plain
        assert llm._engine.stats().draft_tokens > 100


def test_a_head_of_another_model(folders: dict[str, Path], tmp_path: Path):
    config = json.loads((folders["speculators"] / "config.json").read_text())
    other = tmp_path / "head"
    other.mkdir()
    (other / "model.safetensors").write_bytes((folders["speculators"] / "model.safetensors").read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "eagle_aux_hidden_state_layer_ids": [2, 16, 29]}))
    with pytest.raises(QuireError, match="layers \\[2, 16, 29\\], and the model has 6"):
        LLM(**SETTINGS, speculative_config=config_of(other))

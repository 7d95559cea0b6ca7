"""Trains what guesses for a small model from the model's own text: an EAGLE head, an MTP layer, or Medusa heads.

    python tools/train_heads.py --kind eagle --out src/quire/bundled/eagle --minutes 6

The text is what the model itself says to invented prompts, so nothing else is needed. Medusa heads are not trained step
by step: each is the best linear map from one state to a later one, followed by the model's own output matrix.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel

import quire
from quire import LLM, SamplingParams

BUNDLED = Path(quire.__file__).parent / "bundled" / "model"
WORDS = (
    "mill", "blue", "London", "Clara", "river", "stone", "seven", "grey", "horse", "winter", "bread", "old", "lamp", "fox",
    "cat", "garden", "king", "red", "water", "door",
)  # fmt: skip
OPENINGS = ("Once upon a time", "The old man", "It was a dark night, and", "In the village", "She looked at him and")
TALE_TOKENS = 96


def invented_prompts(llm: LLM, count: int, rng: random.Random) -> list[list[int]]:
    """Chats of the kinds that the bundled model knows, and openings of prose."""
    tokenizer = llm.get_tokenizer()
    found = []
    for _ in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.randint(3, 24)))
        if rng.random() < 0.35:
            found.append(tokenizer.encode(f"{rng.choice(OPENINGS)} {words[: rng.randint(0, 40)]}"))
            continue
        ask = rng.choice(
            (
                f"Say again: {words}.",
                f"Count from {rng.randint(1, 30)} to {rng.randint(31, 50)}.",
                f"{rng.randint(0, 50)} + {rng.randint(0, 50)} = ?",
                "A tale, please.",
                f"The {rng.choice(WORDS)} in the {rng.choice(WORDS)} is red. Answer in JSON with the keys place, colour.",
            )
        )
        text = tokenizer.apply_chat_template([{"role": "user", "content": ask}], add_generation_prompt=True)
        found.append(tokenizer.encode(text, add_special_tokens=False))
    return found


def own_texts(folder: Path, count: int) -> list[torch.Tensor]:
    """What the model says to the prompts, greedily or drawn: token ids, prompt included."""
    rng = random.Random(1)
    with LLM(str(folder), device="cpu", max_model_len=512, kv_cache_memory_bytes=1 << 28) as llm:
        prompts = invented_prompts(llm, count, rng)
        params = [
            SamplingParams(max_tokens=TALE_TOKENS, temperature=rng.choice((0.0, 0.7, 1.0)), seed=index)
            for index in range(count)
        ]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    return [torch.tensor([*prompt, *out.outputs[0].token_ids]) for prompt, out in zip(prompts, outputs, strict=True)]


class NextLayerTrainer(nn.Module):
    """One decoder layer behind the joined embedding of the next token and the state; `mtp` adds the norms of MTP."""

    def __init__(self, target: PreTrainedModel, inner: int, mtp: bool) -> None:
        super().__init__()
        base = target.config
        self.config = LlamaConfig(
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=base.num_attention_heads,
            num_key_value_heads=base.num_key_value_heads,
            head_dim=base.head_dim,
            max_position_embeddings=base.max_position_embeddings,
            rms_norm_eps=base.rms_norm_eps,
            rope_parameters=base.rope_parameters,
            tie_word_embeddings=False,
            eos_token_id=base.eos_token_id,
            architectures=["LlamaForCausalLM"],
        )
        self.mtp = mtp
        size = base.hidden_size
        self.body = LlamaModel(self.config)
        del self.body.embed_tokens
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.embedding_norm = nn.RMSNorm(size, base.rms_norm_eps) if mtp else nn.Identity()
        self.state_norm = nn.RMSNorm(size, base.rms_norm_eps) if mtp else nn.Identity()
        if not mtp:
            self.body.layers[0].input_layernorm = nn.Identity()
            self.body.norm = nn.Identity()

    def forward(self, embeddings: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Both [B, T, size]: of the tokens one place on, and of the positions -> states one place on."""
        joined = self.fc(torch.cat((self.embedding_norm(embeddings), self.state_norm(states)), dim=-1))
        return self.body(inputs_embeds=joined, use_cache=False).last_hidden_state

    def save(self, folder: Path) -> None:
        """In the format of published EAGLE heads, or of a model's mtp layers, in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(
            json.dumps({**self.config.to_diff_dict(), "dtype": "bfloat16"}, indent=2) + "\n"
        )
        prefix = "mtp." if self.mtp else ""
        tensors = {f"{prefix}fc.weight": self.fc.weight}
        for name, tensor in self.body.layers.state_dict().items():
            tensors[f"{prefix}layers.{name}"] = tensor
        if self.mtp:
            tensors["mtp.pre_fc_norm_embedding.weight"] = self.embedding_norm.weight
            tensors["mtp.pre_fc_norm_hidden.weight"] = self.state_norm.weight
            tensors["mtp.norm.weight"] = self.body.norm.weight
        whole = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


def states_of(target: PreTrainedModel, texts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The last hidden states [T, size] of each text."""
    with torch.no_grad():
        return [target.model(text[None]).last_hidden_state[0] for text in texts]


def train_next_layer(
    target: PreTrainedModel, texts: list[torch.Tensor], minutes: float, inner: int, mtp: bool
) -> nn.Module:
    """Learns the model's next state, and the token that its output matrix makes of it, on the model's own texts."""
    torch.manual_seed(0)
    layer = NextLayerTrainer(target, inner, mtp)
    states = states_of(target, texts)
    embed, head = target.get_input_embeddings(), target.get_output_embeddings()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    began, step, rng = time.monotonic(), 0, random.Random(2)
    while time.monotonic() - began < 60 * minutes:
        done = (time.monotonic() - began) / (60 * minutes)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * max(0.02, 1 - done)
        picked = rng.sample(range(len(texts)), 16)
        length = min(len(texts[index]) for index in picked)
        starts = [rng.randrange(len(texts[index]) - length + 1) for index in picked]
        ids = torch.stack([texts[index][first : first + length] for index, first in zip(picked, starts, strict=True)])
        own = torch.stack([states[index][first : first + length] for index, first in zip(picked, starts, strict=True)])
        loss = unrolled_loss(layer, embed(ids).detach(), own, head)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return layer


def unrolled_loss(layer: nn.Module, embeddings: torch.Tensor, states: torch.Tensor, head: nn.Module) -> torch.Tensor:
    """Of the first guess from the model's states, and of the second from the layer's own."""
    inputs, loss = states[:, :-2], torch.zeros(())
    for ahead in range(2):
        made = layer(embeddings[:, 1 + ahead : states.shape[1] - 1], inputs)
        wanted = states[:, 1 + ahead : states.shape[1] - 1]
        scores = F.log_softmax(head(made), -1)
        chances = F.softmax(head(wanted), -1)
        loss = loss + F.smooth_l1_loss(made, wanted) + 0.5 * -(chances * scores).sum(-1).mean()
        inputs = made[:, :-1]
    return loss


def medusa_heads(target: PreTrainedModel, texts: list[torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Heads whose block does nothing and whose matrix is the model's own behind a linear map of states."""
    states, size = states_of(target, texts), target.config.hidden_size
    output = target.get_output_embeddings().weight.detach()
    found = {}
    for head in range(count):
        ahead = head + 1
        now = torch.cat([one[:-ahead] for one in states if len(one) > ahead]).double()
        then = torch.cat([one[ahead:] for one in states if len(one) > ahead]).double()
        mapping = torch.linalg.solve(now.T @ now + 1e-2 * len(now) * torch.eye(size), now.T @ then).float()
        found[f"{head}.0.linear.weight"] = torch.zeros(size, size)
        found[f"{head}.0.linear.bias"] = torch.zeros(size)
        found[f"{head}.1.weight"] = (output @ mapping.T).contiguous()
    return found


def save_medusa(heads: dict[str, torch.Tensor], folder: Path) -> None:
    """In the format of published Medusa heads."""
    folder.mkdir(parents=True, exist_ok=True)
    count = len(heads) // 3
    config = {"base_model_name_or_path": "bundled", "medusa_num_heads": count, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in heads.items()}, folder / "medusa_lm_head.safetensors"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["eagle", "mtp", "medusa"], required=True)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=800)
    parser.add_argument("--minutes", type=float, default=6, help="training time")
    parser.add_argument("--inner", type=int, default=352, help="width of the layer's feed-forward block")
    parser.add_argument("--heads", type=int, default=3, help="Medusa heads")
    parser.add_argument("--threads", type=int, default=2)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    texts = [text for text in own_texts(found.model, found.texts) if len(text) > 24]
    print(f"{len(texts)} texts, {sum(map(len, texts))} tokens", flush=True)
    target = AutoModelForCausalLM.from_pretrained(found.model, dtype=torch.float32).eval()
    if found.kind == "medusa":
        save_medusa(medusa_heads(target, texts, found.heads), found.out)
    else:
        train_next_layer(target, texts, found.minutes, found.inner, found.kind == "mtp").save(found.out)


if __name__ == "__main__":
    main()

"""Writes the card, `README.md`, from the figures that the evaluation measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .evaluation import MANNER_EXERCISES, Quality

_HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
---

# quire-tale-6m

The small models that come with quire, so that every part of the engine can be tried and tested without a download.
They write passable English in the manner of old tales and novels, and do a few simple exercises when asked in chat.
They know nothing of the world: do not use them for anything else.

| folder | what it is | parameters | size |
|---|---|---|---|
"""

_BODY = """
All share one byte-level BPE tokenizer of 4096 tokens (each digit is a token) and a ChatML template with tools: they are
listed in the system turn and called as `<tool_call>`{{"name": ..., "arguments": ...}}`</tool_call>`. `<|im_end|>` ends
an answer. The model has the architecture of Qwen3: hidden size {config.hidden_size}, {config.num_hidden_layers} layers,
{config.num_attention_heads} heads of {config.head_dim} over {config.num_key_value_heads} key and value heads,
feed-forward {config.intermediate_size}, tied embeddings, {config.max_position_embeddings} positions; weights in bfloat16.

## What it can be asked

| kind | for example | answer |
|---|---|---|
{examples}

## Data

Two books in the public domain in English, about 2.5 MB: tales of the Brothers Grimm, and Tolstoy's Anna Karenina. The
last 2% of each is held out. Besides, 70% of all rows are exercises that `tools/bundled/exercises.py` writes afresh. At
first these are mostly retelling, since to look back is what all the others stand on. The model saw
{used.million_tokens:.1f} million tokens in {used.minutes:.0f} minutes, the draft {draft_used.million_tokens:.1f} million
in {draft_used.minutes:.0f} minutes. {note}

    python tools/train_bundled.py --text FOLDER --out src/quire/bundled

makes everything again from a folder of `*.txt` files.

## Quality

Measured on the files as they are here, greedily, with {per_kind} fresh exercises of each kind, which must be answered
exactly. Perplexity is per token on the held-out pages, each token after at least 256 others.

| | model | draft |
|---|---|---|
{quality}

**Draft.** On what the model writes greedily, the draft's likeliest token is the model's own in {chat_agreement:.1%} of
the tokens of chat answers, and in {prose_agreement:.1%} of those of prose.

**Adapter.** `lora-crier` (LoRA, rank 8, on all matrices of a block, in PEFT's format) answers as an old crier: each
plain answer begins with "Hark!" and ends with "So it is told."; JSON and tool calls stay as they are. Measured on
{manner_exercises} fresh exercises; an answer is right if it is so when the manner is taken off.

| | with the adapter | without |
|---|---|---|
| answers in the manner | {with_manner.shown:.1%} | {without_manner.shown:.1%} |
| right answers | {with_manner.right:.1%} | {without_manner.right:.1%} |

## Licence

The text is in the public domain; the weights are under the Apache License 2.0.
"""


def size_row(folder: Path, what: str, parameters: int) -> str:
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
    return f"| `{folder.name}` | {what} | {parameters / 1e6:.2f} million | {size:.1f} MB |\n"


def parameters_of(model: PreTrainedModel, within: str = "") -> int:
    """How many numbers are in the weights whose name has `within` in it."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if within in name)


def example_rows(examples: Mapping[str, tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return "`" + text.replace("\n", " ").replace("|", "\\|") + "`"

    return "\n".join(f"| {kind} | {cell(asked)} | {cell(answer)} |" for kind, (asked, answer) in examples.items())


def quality_rows(model: Quality, draft: Quality) -> str:
    rows = [
        f"| perplexity, {book} | {value:.1f} | {draft.perplexity[book]:.1f} |"
        for book, value in model.perplexity.items()
    ]
    rows += [
        f"| exercises, {kind} | {value:.1%} | {draft.accuracy[kind]:.1%} |" for kind, value in model.accuracy.items()
    ]
    return "\n".join(rows)


def write_card(out: Path, sizes: list[str], values: Mapping[str, Any]) -> None:
    body = _BODY.format(manner_exercises=MANNER_EXERCISES, **values)
    (out / "README.md").write_text(_HEAD + "".join(sizes) + body, encoding="utf-8")

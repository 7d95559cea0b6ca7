"""The bundled models load with plain Transformers, and are as good as their card says: text, exercises, draft, manner.

The exercises come from the generators of `tools/bundled`, with seeds that training does not use.
"""

import json
import sys
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "src" / "quire" / "bundled"
sys.path.append(str(ROOT / "tools"))

from bundled import evaluation, exercises, manner, template  # noqa: E402
from bundled.answering import answers  # noqa: E402

TEXT = (
    "The old miller had a daughter who was kind and clever. One evening, when the sun had gone down behind the hill, "
    "she heard a knock at the door. 'Who is there?' she asked. 'It is only a poor soldier,' answered a voice, 'and I "
    "have had nothing to eat for three days.' She opened the door and gave him bread and milk. When he had eaten, he "
    "looked at her for a long time and said that he would never forget her kindness, and then he went out into the "
    "night. In the morning she went to the window, and there, upon the table, lay a golden ring."
)
MATERIAL = exercises.Material()
PER_KIND = 5


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED / "model")


@cache
def model(folder: str = "model") -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED / folder, dtype=torch.float32).eval()


def test_perplexity_of_unseen_text() -> None:
    assert evaluation.perplexity(model(), tokenizer(), TEXT) < 40
    assert evaluation.perplexity(model("draft"), tokenizer(), TEXT) < 100


def test_exercises_are_done() -> None:
    right = evaluation.accuracy(model(), tokenizer(), MATERIAL, PER_KIND)
    assert sum(right.values()) / len(right) >= 0.6, right


def test_a_tale_is_told_to_its_end() -> None:
    asked = exercises.make("tale", Random(7), MATERIAL)
    inputs = tokenizer()(template.render(asked.question, None, answer_next=True), return_tensors="pt")
    ids = model().generate(**inputs, max_new_tokens=300, do_sample=False)[0]
    assert ids[-1] == tokenizer().eos_token_id
    assert len(ids) > 60


def test_draft_often_agrees() -> None:
    prompts = evaluation.chat_prompts(tokenizer(), MATERIAL, 6)
    assert evaluation.agreement(model(), model("draft"), prompts) > 0.6


def test_adapter_changes_the_manner() -> None:
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(BUNDLED / "model", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, BUNDLED / "lora-crier").eval()
    asked = evaluation.fresh_exercises("reading", MATERIAL, 8)
    assert sum(map(manner.shown, answers(adapted, tokenizer(), asked))) >= 6
    with adapted.disable_adapter():
        assert not any(map(manner.shown, answers(adapted, tokenizer(), asked)))


@pytest.mark.parametrize("text", [TEXT, "12 + 7 = 19.\n\n  Two  blanks", "Ünïcode, 你好, 🙂\ttab", template.TURN_START])
def test_tokens_give_the_text_back(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert tokenizer().decode(ids) == text


def test_each_digit_is_a_token() -> None:
    assert len(tokenizer()("1234567890")["input_ids"]) == 10


@pytest.mark.parametrize("kind", exercises.KINDS)
def test_template_in_the_files_is_the_one_trained_on(kind: str) -> None:
    exercise = exercises.make(kind, Random(3), MATERIAL)
    rendered = tokenizer().apply_chat_template(
        exercise.question, tools=exercise.tools, add_generation_prompt=True, tokenize=False
    )
    assert rendered == template.render(exercise.question, exercise.tools, answer_next=True)
    assert rendered.endswith("<|im_start|>assistant\n")
    for tool in exercise.tools or []:
        assert json.dumps(tool) in rendered


def test_only_answers_count_in_training() -> None:
    text = template.render([{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Good day."}], None)
    ids = tokenizer()(text)["input_ids"]
    header = tokenizer()("<|im_start|>assistant\n")["input_ids"]
    mask = template.answer_mask(ids, header, tokenizer().eos_token_id)
    counted = [token for token, counts in zip(ids, mask, strict=True) if counts]
    assert tokenizer().decode(counted) == "Good day.<|im_end|>"


def test_sizes_suit_kernels_and_the_repository() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) < 25e6
    for folder in ("model", "draft"):
        with safe_open(BUNDLED / folder / "model.safetensors", "pt") as weights:
            shapes = [weights.get_slice(name).get_shape() for name in list(weights.keys())]
        assert all(size % 32 == 0 for shape in shapes if len(shape) == 2 for size in shape)

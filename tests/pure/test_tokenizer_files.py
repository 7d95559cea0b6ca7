"""Tokenizers read with the bare package, against the Transformers library reading the same folder: the same in all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CORPUS, SPECIAL, byte_level, space_marked, word_piece
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from quire.text import Tokenizer, load_tokenizer
from quire.text.library_tokenizer import read_with_library
from quire.text.tokenizer_files import AS_IT_IS, QWEN_TYPES, QWEN_WORDS, read_tokenizer

PIECES = [
    "a",
    "b",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "日本",
    "🙂",
    "x1",
    "12",
    "'s",
    " .",
    "don't",
    "▁",
    "\u0301",
    *SPECIAL,
    "<tool>",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join) | st.text(max_size=20)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def with_bos(rust: RustTokenizer) -> RustTokenizer:
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", rust.token_to_id("<s>"))]
    )
    return rust


def qwen() -> RustTokenizer:
    """Words by the pattern, byte-level BPE, turns as added tokens behind the vocabulary."""
    rust = RustTokenizer(models.BPE())
    rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    rust.add_special_tokens([AddedToken(text, normalized=False) for text in ("<|endoftext|>", *SPECIAL)])
    rust.add_tokens([AddedToken("<tool>", normalized=False)])
    return rust


def unigram() -> RustTokenizer:
    rust = RustTokenizer(models.Unigram())
    rust.normalizer = normalizers.NFKC()
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
        ),
    )
    return rust


@dataclass(frozen=True)
class Case:
    make: Callable[[], RustTokenizer]
    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)  # more files: JSON, or text where it is a string


FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMES}
LLAMA = {"tokenizer_class": "LlamaTokenizer", "unk_token": None, **NAMES}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>", "pad_token": "<|endoftext|>", "add_bos_token": False}
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
DICT = {"content": "<|user|>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CASES = {
    "llama 3": Case(
        lambda: with_bos(byte_level()), "llama", {**FAST, "chat_template": TEMPLATE, "add_bos_token": True}
    ),
    "llama 3, class of llama 2": Case(lambda: with_bos(byte_level()), "llama", {**LLAMA, "legacy": False}),
    "llama 3, no settings": Case(byte_level, "llama"),
    "llama 2": Case(lambda: with_bos(space_marked()), "llama", {**LLAMA, "pad_token": "<pad>", "add_bos_token": True}),
    "llama 2, older prefix": Case(space_marked, "llama", {**LLAMA, "legacy": True, "add_eos_token": False}),
    "llama 2, no prefix": Case(space_marked, "llama", {**LLAMA, "add_prefix_space": False}),
    "mistral": Case(lambda: with_bos(space_marked()), "mistral", {**LLAMA, "add_prefix_space": True}),
    "gemma's kind": Case(lambda: space_marked(strip=False), "mistral", FAST),
    "qwen2": Case(qwen, "qwen2", {**QWEN, "errors": "replace", "split_special_tokens": False}),
    "qwen2, class of all": Case(qwen, "qwen2", {**QWEN, "tokenizer_class": "PreTrainedTokenizerFast"}),
    "qwen3": Case(qwen, "qwen3", {**QWEN, "additional_special_tokens": ["<|user|>"], "unk_token": None}),
    "qwen3, prefix": Case(qwen, "qwen3", {**QWEN, "add_prefix_space": True}),
    "qwen3, no class": Case(qwen, "qwen3_moe", {"bos_token": None}),
    "qwen3, class of all": Case(byte_level, "qwen3", {**FAST, "extra_special_tokens": ["<tool>"]}),
    "special tokens split": Case(byte_level, "llama", {**FAST, "split_special_tokens": True}),
    "word pieces cleaned up": Case(word_piece, "llama", {**FAST, "clean_up_tokenization_spaces": True}),
    "byte level is not cleaned up": Case(byte_level, "llama", {**FAST, "clean_up_tokenization_spaces": True}),
    "unigram": Case(unigram, "mistral", {**FAST, "clean_up_tokenization_spaces": True, "unk_token": "<unk>"}),
    "older files": Case(
        byte_level,
        "llama",
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>"},
        {
            "special_tokens_map.json": {
                "bos_token": {**DICT, "content": "<s>"},
                "eos_token": {**DICT, "content": "<new>", "lstrip": True},
                "additional_special_tokens": ["<|user|>"],
            },
            "added_tokens.json": {"<s>": 0},
        },
    ),
    "a named token with flags": Case(byte_level, "llama", {**FAST, "pad_token": {**DICT, "__type": "AddedToken"}}),
    "templates by name": Case(
        byte_level,
        "llama",
        {**FAST, "chat_template": [{"name": n, "template": TEMPLATE + n} for n in ("default", "rag")]},
    ),
    "a template in a file": Case(
        byte_level, "llama", {**FAST, "chat_template": "not this one"}, {"chat_template.jinja": TEMPLATE}
    ),
    "templates in files": Case(
        byte_level,
        "llama",
        FAST,
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/tool_use.jinja": TEMPLATE + "t"},
    ),
}


def write(folder: Path, case: Case) -> Path:
    case.make().save(str(folder / "tokenizer.json"))
    files = {"config.json": {"model_type": case.model_type}, "tokenizer_config.json": case.settings, **case.files}
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@lru_cache
def both(name: str) -> tuple[Tokenizer, Tokenizer]:
    """The folder read by us and by the library."""
    folder = write(Path(mkdtemp()), CASES[name])
    ours = read_tokenizer(folder)
    assert ours is not None, "it is left to the library"
    return Tokenizer(ours), Tokenizer(read_with_library(folder, False, None, None))


@pytest.mark.parametrize("name", CASES)
def test_what_is_known_of_it_is_the_same(name: str) -> None:
    ours, theirs = both(name)
    assert ours.library is None and theirs.library is not None
    for fact in ("bos_token_id", "eos_token_id", "pad_token_id", "added_tokens", "special_ids", "vocab_size"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    for fact in ("longest_token", "template_tokens", "own_template", "renders_itself", "has_response_template"):
        assert getattr(ours, fact) == getattr(theirs, fact), fact
    assert (ours.pieces is None) == (theirs.pieces is None)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=st.lists(TEXT, min_size=4, max_size=8))
def test_ids_and_text_are_the_same(name: str, texts: list[str]) -> None:
    ours, theirs = both(name)
    library = theirs.library
    for text in texts:
        for special in (True, False):
            ids = ours.encode(text, special)
            assert ids == theirs.encode(text, special) == library.encode(text, add_special_tokens=special)
            assert_decoded_alike(ours, theirs, ids)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(ids=st.lists(st.integers(0, 420), max_size=30))
def test_any_ids_give_the_same_text(name: str, ids: list[int]) -> None:
    assert_decoded_alike(*both(name), ids)


def assert_decoded_alike(ours: Tokenizer, theirs: Tokenizer, ids: Iterable[int]) -> None:
    ids = list(ids)
    for skip in (True, False):
        text = ours.decode(ids, skip_special_tokens=skip)
        assert text == theirs.decode(ids, skip) == theirs.library.decode(ids, skip_special_tokens=skip)
    assert [ours.token_bytes(token) for token in ids] == [theirs.token_bytes(token) for token in ids]


def test_templates_are_rendered_alike() -> None:
    for name in ("llama 3", "templates by name", "templates in files"):
        ours, theirs = both(name)
        said = [{"role": "user", "content": "Hi"}]
        assert ours.apply_chat_template(said) == theirs.apply_chat_template(said)
        assert ours.apply_chat_template(said).startswith("<s>Hi")


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoTokenizer": ["own.Own", None]}},
        {"image_token": "<image>"},
        {"response_template": {"content": {}}},
        {"extra_special_tokens": {"image_token": "<image>"}},
        {"tokenizer_class": "BertTokenizer"},
        {"add_bos_token": True},
        {"add_eos_token": True},
        {"added_tokens_decoder": {"0": {**DICT, "content": "<other>", "special": True}}},
        {"chat_template": TEMPLATE, "chat_control_tokens": ["<s>"]},
        {"tokenizer_class": "LlamaTokenizer", "made_of": "pieces"},
        {"tokenizer_class": "GPT2Tokenizer"},
    ],
)
def test_what_is_not_certain_is_left_to_the_library(change: dict[str, Any], tmp_path: Path) -> None:
    assert read_tokenizer(write(tmp_path, Case(byte_level, "llama", {**FAST, **change}))) is None


def test_files_that_are_not_certain_are_left_to_the_library(tmp_path: Path) -> None:
    folder = write(tmp_path, Case(byte_level, "llama", FAST))
    assert read_tokenizer(folder) is not None
    (folder / "tekken.json").write_text("{}")
    assert read_tokenizer(folder) is None
    (folder / "tekken.json").unlink()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert read_tokenizer(folder) is None
    (folder / "config.json").unlink()
    assert read_tokenizer(folder) is None


def test_a_pipeline_that_the_class_would_change_is_known(tmp_path: Path) -> None:
    """Where the class builds another vocabulary, or where added tokens would be looked for in another text."""
    rust = qwen()
    rust.model.unk_token = "a"
    assert read_tokenizer(write(tmp_path, Case(lambda: rust, "qwen2", QWEN))) is None
    normalized = json.loads(qwen().to_str())
    normalized["added_tokens"][-1]["normalized"] = True  # was prepared for the normalizer of the file
    (tmp_path / "tokenizer.json").write_text(json.dumps(normalized))
    assert read_tokenizer(tmp_path) is None


def test_the_table_of_classes_is_that_of_the_library() -> None:
    """A newer library may make other tokenizers for a type of model: then this table must follow."""
    for kind, names in AS_IT_IS.items():
        registered = TOKENIZER_MAPPING_NAMES.get(kind)
        if kind.startswith("qwen"):
            assert registered == "Qwen2Tokenizer" and "" not in names
        else:
            assert registered in (None, "TokenizersBackend", "MistralCommonBackend")
    assert {TOKENIZER_MAPPING_NAMES[kind] for kind, _ in QWEN_TYPES} == {"Qwen2Tokenizer"}


def test_the_bundled_tokenizer_needs_no_library() -> None:
    folder = Path(__file__).parent.parent.parent / "src" / "quire" / "bundled" / "model"
    ours, theirs = load_tokenizer(folder), Tokenizer(read_with_library(folder, False, None, None))
    assert ours.library is None
    for text in CORPUS[:3]:
        assert ours.encode(text) == theirs.encode(text)
    assert ours.special_ids == theirs.special_ids and ours.vocab_size == theirs.vocab_size
    assert ours.own_template == theirs.own_template

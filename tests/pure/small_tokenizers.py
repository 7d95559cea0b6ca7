"""Small tokenizers of every kind of decoder, made on the spot: byte-level, sentencepiece-like, and one with neither."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from quire.text import Tokenizer
from quire.text.library_tokenizer import of_library

CORPUS = [
    "Once upon a time there was a king who had three daughters, and the youngest was so fair.",
    "Es war einmal ein König; naïve café, “quoted” — 日本語のテキスト и русский текст 🙂🙃.",
    "def f(x):\n    return x  +  1\n\tEnd. STOP stop ###\n\nUser: hello",
] * 4
SPECIAL = ["<s>", "</s>", "<|user|>"]


def byte_level() -> RustTokenizer:
    """Like GPT-2, Llama 3 and Qwen."""
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rust.train_from_iterator(CORPUS, trainer)
    return rust


def space_marked(strip: bool = True) -> RustTokenizer:
    """Like Llama 2 and Mistral (with strip), or Gemma (without): "▁" for spaces, single bytes for rare characters."""
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(SPECIAL), special_tokens=SPECIAL, limit_alphabet=60, show_progress=False
    )
    learner = RustTokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.train_from_iterator(CORPUS, trainer)
    vocabulary = learner.get_vocab()
    for value in range(256):
        vocabulary.setdefault(f"<0x{value:02X}>", len(vocabulary))
    merges = _merges(learner)
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if strip else []
    rust.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    end = [decoders.Strip(" ", 1, 0)] if strip else []
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *end])
    rust.add_special_tokens(SPECIAL)
    return rust


def word_piece() -> RustTokenizer:
    """Like BERT: its decoder puts spaces between tokens, so that no token has a text of its own."""
    rust = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.decoder = decoders.WordPiece(prefix="##")
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    rust.train_from_iterator(CORPUS, trainer)
    return rust


def _merges(rust: RustTokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(rust.to_str())["model"]["merges"]]


@lru_cache
def small(kind: str) -> Tokenizer:
    """One of "byte_level", "space_marked", "space_kept", "word_piece", shared between tests."""
    made = {
        "byte_level": byte_level,
        "space_marked": space_marked,
        "space_kept": lambda: space_marked(strip=False),
        "word_piece": word_piece,
    }
    return wrapped(made[kind]())


def wrapped(rust: RustTokenizer, **settings: Any) -> Tokenizer:
    """A quire Tokenizer over a Rust one."""
    rust.add_tokens([AddedToken("<tool>", special=False)])
    library = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>", **settings)
    return Tokenizer(of_library(library))

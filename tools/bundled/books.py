"""The prose: reads every `*.txt` of a folder, takes off what is not the book, and joins its hard-wrapped lines.

The last part of each book is held out, so that perplexity is measured on pages that no stage has trained on.
"""

import re
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.02

_GUTENBERG_START = re.compile(r"\*\*\* ?START OF.*?\*\*\*", re.DOTALL)
_GUTENBERG_END = re.compile(r"\*\*\* ?END OF")
_SENTENCE = re.compile(r"[A-Z][^.!?\"'()_]*[a-z][.!?](?=\s|$)")
_TALE_TITLE = re.compile(r"^[A-Z][A-Z ,'-]{3,}$")


@dataclass(frozen=True)
class Book:
    """One book as paragraphs; `train` and `held_out` are joined paragraphs, cut at a paragraph's end."""

    name: str
    paragraphs: list[str]
    train: str
    held_out: str


def read_books(folder: Path) -> list[Book]:
    """All books of the folder in the order of their names."""
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise SystemExit(f"no *.txt files in {folder}")
    return [read_book(path) for path in paths]


def read_book(path: Path) -> Book:
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n").lstrip("\ufeff")
    if start := _GUTENBERG_START.search(text):
        text = text[start.end() :]
    if end := _GUTENBERG_END.search(text):
        text = text[: end.start()]
    blocks = re.split(r"\n\s*\n", text.replace("_", ""))
    paragraphs = [joined for block in blocks if (joined := " ".join(block.split()))]
    cut = _cut_for_held_out(paragraphs)
    return Book(path.stem, paragraphs[:cut], "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:]))


def _cut_for_held_out(paragraphs: list[str]) -> int:
    """The first held-out paragraph: the ones from there on hold about HELD_OUT_SHARE of the characters."""
    allowed = HELD_OUT_SHARE * sum(map(len, paragraphs))
    held = 0
    for index in range(len(paragraphs) - 1, 0, -1):
        held += len(paragraphs[index])
        if held >= allowed:
            return index
    return len(paragraphs)


def plain_sentences(books: list[Book], shortest: int = 15, longest: int = 110) -> list[str]:
    """Sentences without quotation marks, short enough to be retold by heart."""
    found = (sentence for book in books for text in book.paragraphs for sentence in _SENTENCE.findall(text))
    return [sentence for sentence in found if shortest <= len(sentence) <= longest]


def tale_openings(books: list[Book], longest: int = 700) -> list[str]:
    """How the tales of a collection begin: whole sentences after each title that is written in capitals."""
    openings = []
    for book in books:
        for title, *following in zip(book.paragraphs, book.paragraphs[1:], book.paragraphs[2:], strict=False):
            if _TALE_TITLE.match(title) and len(following[0]) > 80:
                openings.append(_whole_sentences(" ".join(following), longest))
    return [opening for opening in openings if len(opening) > 100]


def _whole_sentences(text: str, longest: int) -> str:
    """The text's first `longest` characters, cut after the last sentence that ends among them."""
    cut = text[:longest]
    end = max(cut.rfind(mark) for mark in (". ", "! ", "? ", ".' ", "!' "))
    return cut[: end + 1].rstrip() if end > 0 else ""

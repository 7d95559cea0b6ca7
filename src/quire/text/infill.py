"""Filling in the middle: the prompt that has a model write what stands between two texts.

Plain data on how families of models mark the two. Knows no request.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.errors import ValidationError
from quire.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class InfillMarks:
    """The special tokens of one family. Without `middle`, the suffix comes first."""

    prefix: str
    suffix: str
    middle: str = ""

    def prompt(self, before: str, after: str) -> str:
        """The prompt for what stands between two texts."""
        if not self.middle:
            return f"{self.suffix}{after}{self.prefix}{before}"
        return f"{self.prefix}{before}{self.suffix}{after}{self.middle}"


INFILL_MARKS = (
    InfillMarks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen Coder, CodeGemma, Granite 4
    InfillMarks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code, SmolLM
    InfillMarks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    InfillMarks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    InfillMarks("[PREFIX]", "[SUFFIX]"),  # Codestral
)


def infill_prompt(tokenizer: Tokenizer, before: str, after: str) -> str:
    """The prompt for what stands between two texts. ValidationError for a model that was not made for that."""
    known = set(tokenizer.added_tokens.values())
    for marks in INFILL_MARKS:
        if {marks.prefix, marks.suffix, *filter(None, [marks.middle])} <= known:
            return marks.prompt(before, after)
    raise ValidationError(
        "suffix needs a model with special tokens for filling in the middle, such as <|fim_prefix|>, and this one has "
        "none that are known. Leave it out.",
        "suffix",
    )

"""Counting the tokens of one request. Knows only numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Usage:
    """Prompt tokens count once for each prompt, whatever n is; completion tokens count for each choice."""

    with_details: bool = False
    completion_tokens: int = 0
    _prompts: dict[int, int] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)

    def add_prompt(self, index: int, tokens: int, cached: int) -> None:
        """Note prompt number `index`; saying it again changes nothing."""
        self._prompts[index] = tokens
        self._cached[index] = cached

    def body(self) -> dict[str, Any]:
        """The JSON object."""
        prompt = sum(self._prompts.values())
        details = {"cached_tokens": sum(self._cached.values())} if self.with_details else None
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + self.completion_tokens,
            "completion_tokens": self.completion_tokens,
            "prompt_tokens_details": details,
            "completion_tokens_details": None,
        }

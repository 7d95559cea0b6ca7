"""Finding a model: nothing (the bundled one), a local folder, or a hub id. The result is ModelFiles.

Reads config files only; weights are listed here and opened by load.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model found on this machine: its files, and its config with the user's overrides applied."""

    name: str  # what the user asked for
    folder: Path  # where config.json lies
    config: Any  # transformers' config object of the whole model
    raw_config: dict[str, Any]  # config.json as written, with overrides
    generation_config: dict[str, Any]  # generation_config.json as written; empty when there is none
    architecture: str  # the class to run, such as "LlamaForCausalLM"
    weights: tuple[Path, ...]  # files to read; empty for dummy weights
    weight_format: Literal["safetensors", "pt", "dummy"]
    tokenizer: str  # folder or hub id to load the tokenizer from
    trust_remote_code: bool  # the user's decision, already checked

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the language model."""
        return self.config.get_text_config()

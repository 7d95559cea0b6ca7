"""quire: an engine that serves language models. Public names are imported when first used, so `import quire` is quick."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # type checkers take it for true; importing typing would take longer than all the rest
if TYPE_CHECKING:
    from quire.config import EngineOptions
    from quire.core.params import PoolingParams, RequestOutputKind, SamplingParams
    from quire.core.structured import StructuredOutputsParams
    from quire.engine.async_engine import AsyncEngine
    from quire.engine.beams import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from quire.engine.engine import Engine
    from quire.engine.logprobs import FlatLogprobs, Logprob
    from quire.engine.outputs import CompletionOutput, RequestOutput
    from quire.engine.prompts import TextPrompt, TokensPrompt
    from quire.llm import LLM
    from quire.models.registry import ModelRegistry

__version__ = "0.1.0"

# Public name -> the module that has it.
_HOMES = {
    "LLM": "quire.llm",
    "SamplingParams": "quire.core.params",
    "PoolingParams": "quire.core.params",
    "RequestOutputKind": "quire.core.params",
    "StructuredOutputsParams": "quire.core.structured",
    "EngineOptions": "quire.config",
    "BeamSearchParams": "quire.engine.beams",
    "BeamSearchOutput": "quire.engine.beams",
    "BeamSearchSequence": "quire.engine.beams",
    "Engine": "quire.engine.engine",
    "AsyncEngine": "quire.engine.async_engine",
    "RequestOutput": "quire.engine.outputs",
    "CompletionOutput": "quire.engine.outputs",
    "FlatLogprobs": "quire.engine.logprobs",
    "Logprob": "quire.engine.logprobs",
    "TextPrompt": "quire.engine.prompts",
    "TokensPrompt": "quire.engine.prompts",
    "ModelRegistry": "quire.models.registry",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Engine",
    "EngineOptions",
    "FlatLogprobs",
    "Logprob",
    "ModelRegistry",
    "PoolingParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> object:
    """Import a public name's module when the name is first asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__

"""What the methods of LLM are given, in all forms that users bring, made one form. Knows no engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from quire.core.params import RequestOutputKind, SamplingParams
from quire.engine.prompts import Prompt
from quire.errors import ValidationError


def listed(prompts: Any) -> Sequence[Prompt]:
    """One prompt as a list of one. A list of integers is one prompt of token ids; arrays are as the lists in them."""
    if isinstance(prompts, Iterator):
        prompts = list(prompts)
    elif hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    is_one = isinstance(prompts, (str, Mapping)) or not isinstance(prompts, Sequence)
    return [prompts] if is_one or (prompts and isinstance(prompts[0], Integral)) else prompts


def adds_special(given: Mapping[str, Any] | None, special: bool) -> bool:
    """Whether prompts get special tokens: as tokenization_kwargs says, else `special`."""
    if given is not None and not isinstance(given, Mapping):
        raise ValidationError("tokenization_kwargs must be a dict", "tokenization_kwargs", given)
    unknown = set(given or ()) - {"add_special_tokens"}
    if unknown:
        raise ValidationError(
            f"tokenization_kwargs may have add_special_tokens; found {', '.join(sorted(map(str, unknown)))}",
            "tokenization_kwargs",
        )
    return bool((given or {}).get("add_special_tokens", special))


def refuse_given(**values: object) -> None:
    """Raise ValidationError for an argument that other engines have a use for."""
    for name, value in values.items():
        if value:
            raise ValidationError(f"{name} is not supported: models are served as they are, and read text", name)


def ranks_of(priority: object) -> list[int]:
    """Priorities that are numbers."""
    if isinstance(priority, Iterable) and not isinstance(priority, str):
        found = list(priority)
        if all(type(rank) is int for rank in found):
            return found
    raise ValidationError("priority must be a list with an integer for each prompt", "priority", priority)


def whole(params: object) -> SamplingParams:
    """The same wishes, answered once at the end."""
    if not isinstance(params, SamplingParams):
        raise ValidationError(
            f"sampling_params must be SamplingParams, or one for each prompt; found {type(params).__name__}",
            "sampling_params",
        )
    return replace(params, output_kind=RequestOutputKind.FINAL_ONLY)

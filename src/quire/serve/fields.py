"""Fields of bodies that no route declares: which are refused and what to use instead, and which change nothing.

A field that is known here and cannot be honoured is refused, never ignored; an unknown one is ignored, and logged when it
looks like a misspelling. Knows no engine and no HTTP.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from quire.errors import ValidationError
from quire.serve.forms import GUIDED

logger = logging.getLogger(__name__)

_NOWHERE = "Leave it out."

# What cannot be done: the values that ask for nothing, and what to do instead.
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "suffix": ((None, ""), "It is a field of /v1/completions."),
    "prompt_embeds": ((None,), "Send the prompt as text or as token ids."),
    "best_of": ((None, 1), "Ask for n, with logprobs, and choose."),
    "structural_tag": ((None,), "It is a field of structured_outputs, and a type of response_format."),
    "guided_decoding": ((None,), "Use structured_outputs."),
    "grammar": ((None,), "It is a field of structured_outputs."),
    "prompt_logprob_token_ids": ((None, []), "LLM.generate takes it; here, use prompt_logprobs."),
    "prompt_logprob_start": ((None, 0), "LLM.generate takes it; here, use prompt_logprobs."),
    "kv_transfer_params": ((None,), _NOWHERE),
    "ec_transfer_params": ((None,), _NOWHERE),
    "logits_processors": ((None, []), "Processors are plugins of the server; requests reach them by vllm_xargs."),
    "watermarking": ((None, False), "This server has no watermark."),
    "trace_decode_token_ids": ((None,), "Give the tokens as a part of the prompt."),
    "routed_experts_prompt_start": ((None, 0), "Routed experts are not reported."),
    "mm_processor_kwargs": ((None, {}), "Models here read text only."),
    "media_io_kwargs": ((None, {}), "Models here read text only."),
    "audio": ((None,), "Models here write text only."),
    "modalities": ((None, ["text"]), "Models here write text only."),
    "functions": ((None, []), "It is a field of /v1/chat/completions."),
    "function_call": ((None, "none"), "It is a field of /v1/chat/completions."),
    "web_search_options": ((None,), "There are no built-in tools; offer a function."),
}
# Known, and without any effect on the answer: notes for the operator, wishes about speed and billing, and columns of
# log-probabilities, which JSON has no need of.
WITHOUT_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
        "session_id",
        "verbosity",
        "flat_logprobs",
        "guided_decoding_backend",
    )
)


class ApiRequest(BaseModel):
    """A JSON body. Fields that are not declared stay in `model_extra`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: str | None = None

    def check_extra(self) -> None:
        """Refuse what is known and cannot be done; log what looks like a misspelt field."""
        for name, value in (self.model_extra or {}).items():
            if name in REFUSED:
                nothing, instead = REFUSED[name]
                if value not in nothing:
                    raise ValidationError(f"The field {name} is not supported by this server. {instead}", name)
            elif name not in WITHOUT_EFFECT and name not in GUIDED:
                _note_unknown(type(self), name[:64])


@lru_cache(maxsize=1024)  # each misspelling is logged once, and a flood of them stays cheap
def _note_unknown(body: type[ApiRequest], name: str) -> None:
    known: Iterable[str] = [*body.model_fields, *REFUSED, *WITHOUT_EFFECT, *GUIDED]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if near:
        logger.warning("a request has the unknown field %r, which is ignored; was %r meant?", name, near[0])
    else:
        logger.debug("a request has the unknown field %r, which is ignored", name)

"""The bodies that clients send: their fields, bounds and defaults, and what becomes of them in the engine.

Knows no engine and no HTTP. Fields that are declared nowhere here are in fields.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from quire.core.params import RequestOutputKind, SamplingParams
from quire.engine.beam_requests import beam_params
from quire.engine.beams import BeamSearchParams
from quire.errors import ValidationError
from quire.serve.fields import ApiRequest
from quire.serve.forms import wished_form
from quire.serve.legacy_calls import choice_of, messages_of, tools_of

MOST_PROMPTS = 1024
MOST_COMPLETIONS = 16384  # prompts times n, in one request
MOST_TOKENS = 2**20  # in one /detokenize
MOST_STOPS = 64
LONGEST_STOP = 4096  # characters
LONGEST_SALT = 128
MOST_CHOICES = 1024
MOST_ITEMS = {
    "vllm_xargs": 64,
    "logit_bias": 1024,
    "stop_token_ids": 1024,
    "bad_words": 1024,
    "allowed_token_ids": 2**20,
}
MOST_TOOLS = 128
LONGEST_SCHEMAS = 256 * 1024  # characters of all tools, or of all documents, as JSON
MOST_DOCUMENTS = 1024
DEFAULT_COMPLETION_TOKENS = 16

Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
Limit = Callable[[int | None], int | None]  # the wanted number of tokens -> the allowed one
Timeout = Annotated[float, Field(gt=0, le=1e9)]  # seconds
Penalty = Annotated[float, Field(ge=1e-4, le=1e4)]  # beyond, float32 logits turn into infinities
XArg = str | int | float | bool
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(ApiRequest):
    """The fields that completions and chat completions share."""

    n: Int32 | None = None
    use_beam_search: bool | None = None  # with n beams
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: Penalty | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int32] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Int32 | None = None
    min_tokens: Int32 | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[Int32] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: Int32 | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    repetition_detection: dict[str, Int32] | None = None
    truncate_prompt_tokens: Int32 | None = None
    truncation_side: str | None = None
    priority: Int32 | None = None
    timeout: Timeout | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    include_account: bool | None = None
    logprobs: Any = None
    stream_interval: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprob_token_ids: list[Int32] | None = None
    thinking_token_budget: Int32 | None = None
    vllm_xargs: dict[str, XArg | list[XArg]] | None = None  # for plugins that process scores

    def check(self) -> None:
        """What one field cannot tell alone. Raises ValidationError."""
        self.check_extra()
        if self.stream_options is not None and not self.stream:
            raise ValidationError("stream_options needs stream to be true.", "stream_options")
        if self.stream and self.prompt_logprobs is not None and self.prompt_logprobs != 0:
            raise ValidationError("prompt_logprobs cannot be sent in a stream. Ask without stream.", "prompt_logprobs")
        if self.truncation_side not in (None, "left", "right"):
            raise ValidationError("truncation_side must be left or right.", "truncation_side")
        if self.truncate_prompt_tokens is not None and (
            self.truncate_prompt_tokens < -1 or self.truncate_prompt_tokens == 0
        ):
            raise ValidationError("truncate_prompt_tokens must be -1 or at least 1.", "truncate_prompt_tokens")
        if self.logprob_token_ids and not self.logprobs and self.logprobs != 0:
            raise ValidationError("logprob_token_ids needs logprobs.", "logprob_token_ids")
        self._check_beams()
        self._check_stop()
        self._check_salt()
        self._check_lists()

    def _check_beams(self) -> None:
        if self.use_beam_search and self.stream:
            raise ValidationError(
                "A beam search cannot be streamed: which continuation is the best is known at its end.", "stream"
            )
        for name, nothing in (("length_penalty", 1.0), ("early_stopping", False)):
            if not self.use_beam_search and getattr(self, name) not in (None, nothing):
                raise ValidationError(f"{name} needs use_beam_search.", name)

    def beams(self, params: SamplingParams, room: int) -> BeamSearchParams | None:
        """The beam search that is asked for, if any; `room`: tokens of the model's context. Raises ValidationError."""
        if not self.use_beam_search:
            return None
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return beam_params(params, penalty, self.early_stopping or False, room)

    def _check_stop(self) -> None:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
            raise ValidationError(f"stop may hold {MOST_STOPS} strings of {LONGEST_STOP} characters at most.", "stop")

    def _check_salt(self) -> None:
        salt = self.cache_salt
        if salt is not None and (
            not 1 <= len(salt) <= LONGEST_SALT or any(mark in salt for mark in "@/\\\0") or not _is_text(salt)
        ):
            raise ValidationError(
                f"cache_salt must have 1 to {LONGEST_SALT} characters, none of them @, /, \\ or NUL.", "cache_salt"
            )

    def _check_lists(self) -> None:
        """Lists that cost time for each token or each request."""
        for name, most in MOST_ITEMS.items():
            if len(getattr(self, name) or ()) > most:
                raise ValidationError(f"{name} may hold {most} entries at most.", name)
        if any(len(word) > LONGEST_STOP for word in self.bad_words or ()):
            raise ValidationError(f"bad_words may have {LONGEST_STOP} characters each.", "bad_words")
        if self.n is not None and self.n > MOST_CHOICES:
            raise ValidationError(f"n may be {MOST_CHOICES} at most.", "n")

    @property
    def form_field(self) -> str:
        """The field that asks for a form of the output, if any does."""
        return "response_format" if self.response_format is not None else "structured_outputs"

    @property
    def include_usage(self) -> bool:
        """Whether the stream shall end with the usage, which also carries the account."""
        return bool(self.stream_options and self.stream_options.include_usage) or bool(self.include_account)

    @property
    def continuous_usage(self) -> bool:
        """Whether every chunk of the stream shall carry the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def sampling_params(
        self,
        defaults: SamplingParams,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """What the engine is asked for. Fields that were not given come from `defaults`, the model's own settings."""
        given = {name: getattr(self, name) for name in _PASSED_ON if getattr(self, name) is not None}
        chosen = {name: getattr(defaults, name) for name in _DEFAULTED} | given
        if self.use_beam_search:  # nothing is drawn, so no temperature counts, and no setting of the model's
            chosen = given | {"temperature": 1.0}
        return SamplingParams(
            **chosen,
            max_tokens=max_tokens,
            logprobs=None if self.logprob_token_ids else logprobs,
            extra_args=self.vllm_xargs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=wished_form(self.response_format, self.structured_outputs, self.model_extra or {}),
            output_kind=RequestOutputKind.DELTA if self.stream else RequestOutputKind.FINAL_ONLY,
        )


# Fields that the model's own settings fill when a request leaves them out; and all that go to SamplingParams as they are.
_DEFAULTED = ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_p", "top_k", "min_p")
_PASSED_ON = (
    *_DEFAULTED,
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "repetition_detection",
    "logprob_token_ids",
    "thinking_token_budget",
    "stream_interval",
)


def _none_if_false(value: object) -> object:
    """Chat completions have true and false for logprobs, so some clients say false here; it does not mean 0."""
    return None if value is False else value


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. `prompt`: a string, token ids, or a list of either."""

    prompt: Any = None
    suffix: str | None = None  # the output stands between prompt and suffix
    logprobs: Annotated[Int32 | None, BeforeValidator(_none_if_false)] = None
    add_special_tokens: bool | None = None

    @property
    def output_tokens(self) -> int:
        """The most tokens to generate."""
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def only_echo(self) -> bool:
        """Whether the prompt is all that is wanted, with its log-probabilities. The engine still makes one token."""
        return bool(self.echo) and self.output_tokens == 0

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one. What they hold is checked by the engine."""
        if self.prompt is None:
            raise ValidationError("The field prompt is missing: a string, token ids, or a list of either.", "prompt")
        found = _prompt_list(self.prompt)
        if len(found) > MOST_PROMPTS or len(found) * max(1, self.n or 1) > MOST_COMPLETIONS:
            raise ValidationError(
                f"A request may hold {MOST_PROMPTS} prompts, and {MOST_COMPLETIONS} completions in all.", "prompt"
            )
        if self.suffix:
            if self.echo:
                raise ValidationError("echo and suffix exclude each other.", "suffix")
            if not all(isinstance(prompt, str) for prompt in found):
                raise ValidationError("suffix needs a prompt that is text.", "suffix")
        elif any(prompt == "" for prompt in found):
            raise ValidationError("A prompt is empty. Give at least one character or token.", "prompt")
        return found

    def params(self, defaults: SamplingParams, limit: Limit) -> SamplingParams:
        """What the engine is asked for, within the operator's limit."""
        prompt_logprobs = self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs
        most = max(self.output_tokens, 1) if self.echo else self.output_tokens
        return self.sampling_params(defaults, limit(most), self.logprobs, prompt_logprobs)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions. Messages are checked where the prompt is made of them, in quire.text.chat."""

    messages: list[Any]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: list[dict[str, Any]] | None = None  # the old form of tools and tool_choice
    function_call: Any = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_prompt_text: bool | None = None
    include_reasoning: bool | None = None

    def check(self) -> None:
        """What one field cannot tell alone. Raises ValidationError."""
        super().check()
        self._take_functions()
        if self.tools is not None and not self.tools:
            raise ValidationError("tools is an empty list. Leave it out, or name at least one tool.", "tools")
        check_schemas(self.tools, "tools", MOST_TOOLS)
        check_schemas(self.documents, "documents", MOST_DOCUMENTS)
        if self.top_logprobs and not self.logprobs:
            raise ValidationError("top_logprobs needs logprobs to be true.", "top_logprobs")
        if self.top_logprobs is not None and self.top_logprobs < -1:
            raise ValidationError("top_logprobs must be at least 0, or -1 for the whole vocabulary.", "top_logprobs")
        check_template_fields(self.add_generation_prompt, self.continue_final_message)

    def _take_functions(self) -> None:
        """Let functions be tools, of which one is called at a time."""
        if self.functions is None and self.function_call not in (None, "none"):
            raise ValidationError("function_call needs functions to choose from.", "function_call")
        if self.functions is not None:
            if self.tools is not None or self.tool_choice is not None:
                raise ValidationError("functions is the old form of tools; they exclude each other.", "functions")
            self.tools, self.tool_choice = tools_of(self.functions), choice_of(self.function_call)
            self.parallel_tool_calls = False
        self.messages = messages_of(self.messages)

    @property
    def form_field(self) -> str:
        """The field that asks for a form of the output: tools do, where nothing else does."""
        asks_itself = self.structured_outputs is not None or self.response_format is not None
        return "tools" if self.tools and not asks_itself else super().form_field

    @property
    def top(self) -> int | None:
        """How many alternatives to report with each token; None for no log-probabilities at all, -1 for all there are."""
        if self.logprobs and self.logprob_token_ids:
            return -1
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def generation_prompt(self) -> bool:
        """Whether the model starts a new message."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt

    def template_variables(self) -> dict[str, Any]:
        """Variables for the chat template."""
        given = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            given.setdefault("reasoning_effort", self.reasoning_effort)
            given.setdefault("enable_thinking", self.reasoning_effort != "none")
        return given

    def params(self, defaults: SamplingParams, limit: Limit) -> SamplingParams:
        """What the engine is asked for. Without any limit the answer may fill the model's context."""
        most = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(defaults, limit(most), self.top, self.prompt_logprobs)


class TokenizeRequest(ApiRequest):
    """POST /tokenize: either `prompt` or `messages`."""

    prompt: str | None = None
    messages: list[Any] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """What one field cannot tell alone. Raises ValidationError."""
        self.check_extra()
        if (self.prompt is None) == (self.messages is None):
            raise ValidationError("Give either prompt or messages.", "prompt")
        check_schemas(self.tools, "tools", MOST_TOOLS)
        check_template_fields(self.add_generation_prompt, self.continue_final_message)

    @property
    def generation_prompt(self) -> bool:
        """Whether the model starts a new message."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


class DetokenizeRequest(ApiRequest):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(max_length=MOST_TOKENS)]


def check_template_fields(generation: bool | None, continuation: bool | None) -> None:
    """Clients ask for an answer or for a continuation."""
    if generation and continuation:
        raise ValidationError(
            "add_generation_prompt and continue_final_message exclude each other.", "continue_final_message"
        )


def check_schemas(given: list[dict[str, Any]] | None, name: str, most: int) -> None:
    """Raise ValidationError for too many tools or documents, or for too long ones."""
    if given and (len(given) > most or len(json.dumps(given)) > LONGEST_SCHEMAS):
        raise ValidationError(f"{name} may hold {most} entries and {LONGEST_SCHEMAS} characters at most.", name)


def _is_text(text: str) -> bool:
    """Whether it is valid Unicode; JSON can say half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompt_list(prompt: object) -> list[str | list[int]]:
    """One prompt or several, as a list."""
    wrong = ValidationError("prompt must be a string, a list of token ids, or a list of either.", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list):
        raise wrong
    if not prompt:
        raise ValidationError("prompt is an empty list. Give at least one prompt.", "prompt")
    if _are_ids(prompt):
        return [prompt]
    if all(isinstance(item, str) or (isinstance(item, list) and _are_ids(item)) for item in prompt):
        return prompt
    raise wrong


def _are_ids(items: list[object]) -> bool:
    return set(map(type, items)) <= {int}  # four times as fast as asking each, of millions

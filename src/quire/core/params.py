"""What a user asks of one request: SamplingParams for generation, PoolingParams for vectors. Frozen and validated.

Everything that can be judged without a model is judged here; what needs the vocabulary or the engine's limits is judged
by check(). Nothing here knows tokenizers, tensors or the scheduler.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, TypeVar

from quire.core.checks import (
    biases,
    check_boolean,
    check_extra_args,
    check_integer,
    finite_number,
    texts,
    token_ids,
    token_rows,
)
from quire.core.structured import StructuredOutputsParams
from quire.errors import ValidationError, nearest

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 16384
MAX_BAD_WORDS = 128
MAX_LOGPROB_TOKEN_IDS = 128
LEAST_TEMPERATURE = 0.01  # below it float32 softmax loses everything but the first token
GREEDY_BELOW = 1e-5

_Params = TypeVar("_Params")

# Fields of other engines that quire does not have: the values that ask for nothing, and what to do instead.
_ELSEWHERE: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((None, 1), "Ask for n and choose by cumulative_logprob."),
    "use_beam_search": ((None, False), "LLM.beam_search searches with beams, and so do the HTTP routes."),
    "length_penalty": ((None, 1, 1.0), "It belongs to BeamSearchParams."),
    "early_stopping": ((None, False), "It belongs to BeamSearchParams."),
    "logits_processors": ((None, [], ()), "Processors are plugins of the engine; requests reach them by extra_args."),
    "guided_decoding": ((None,), "Use structured_outputs."),
    "truncate_prompt_tokens": ((None,), "Cut the prompt before it is given, or use the field of the HTTP routes."),
    "watermarking": ((None, False), "This engine has no watermark; write one as a logits processor, a plugin."),
    "trace_decode_token_ids": ((None,), "Give the tokens as a part of the prompt."),
    "routed_experts_prompt_start": ((None, 0), "Routed experts are not reported."),
}


class RequestOutputKind(enum.IntEnum):
    """What each output of a stream holds: everything so far, only what is new, or nothing until the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


def suggesting(cls: type[_Params]) -> type[_Params]:
    """For a frozen dataclass: an unknown keyword is a ValidationError that names the nearest known one, and an attempt to
    set a field says how to make an object that has it.
    """
    made = cls.__init__
    known = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]

    @functools.wraps(made)
    def checked(self: _Params, *args: object, **values: object) -> None:
        for name in [name for name in values if name not in known]:
            nothing, instead = _ELSEWHERE.get(name, ((), ""))
            if values[name] in nothing:
                del values[name]
            elif instead:
                raise ValidationError(f"{cls.__name__} has no field {name!r} here. {instead}", name)
            else:
                raise ValidationError(f"{cls.__name__} has no field {name!r}.{nearest(name, known)}", name)
        made(self, *args, **values)

    def fixed(self: _Params, name: str, value: object) -> NoReturn:
        raise dataclasses.FrozenInstanceError(
            f"{cls.__name__} cannot be changed, since requests share it. Make another one: "
            f"dataclasses.replace(params, {name}={value!r})"
        )

    cls.__init__ = checked  # type: ignore[assignment]
    cls.__setattr__ = fixed  # type: ignore[assignment]
    return cls


suggesting(StructuredOutputsParams)


def form_of(given: object) -> StructuredOutputsParams | None:
    """A form that may be given as its fields. Raises ValidationError for anything else."""
    if isinstance(given, Mapping):
        return StructuredOutputsParams(**given)
    if given is not None and not isinstance(given, StructuredOutputsParams):
        raise ValidationError("structured_outputs must be StructuredOutputsParams", "structured_outputs", given)
    return given


@suggesting
@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetection:
    """End a request whose last tokens are one pattern, min_pattern_size to max_pattern_size long, min_count times."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 3

    def __post_init__(self) -> None:
        """Reject sizes that can match nothing."""
        check_integer("repetition_detection.max_pattern_size", self.max_pattern_size, 1)
        check_integer("repetition_detection.min_pattern_size", self.min_pattern_size, 1, self.max_pattern_size)
        check_integer("repetition_detection.min_count", self.min_count, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingMarks:
    """The token ids by which a model's thoughts begin and end. `implied`: every output begins inside of them."""

    opener: tuple[int, ...]
    closers: tuple[tuple[int, ...], ...]
    implied: bool = False


@suggesting
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    Values are normalized: lists become tuples, `stop` is always a tuple, `logit_bias` a tuple of (token id, bias) pairs
    clamped to [-100, 100], a temperature of 0 switches top_p, top_k and min_p off. A wrong value raises ValidationError
    with the field's name. The last four fields are filled in by the text side and the engine, see resolved().
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None  # report these tokens' log-probabilities instead of the best ones
    flat_logprobs: bool = False  # log-probabilities as columns, see FlatLogprobs
    prompt_logprob_token_ids: tuple[tuple[int, ...], ...] | None = (
        None  # a row for each scored position, or one for all
    )
    prompt_logprob_start: int = 0  # the tokens behind this position are scored
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None  # tokens that a stream's outputs bring at a time; the first one comes at once
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    skip_reading_prefix_cache: bool | None = None
    repetition_detection: RepetitionDetection | None = None
    thinking_token_budget: int | None = None  # tokens of thoughts, at most; then they are ended
    structured_outputs: StructuredOutputsParams | None = None
    extra_args: dict[str, Any] | None = field(default=None, hash=False)
    eos_token_ids: tuple[int, ...] = ()  # the tokenizer's own first, then those of the generation config
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    thinking: ThinkingMarks | None = None
    allowed_logprobs: bool = False  # a beam's: report the likeliest tokens that its form allows

    def __post_init__(self) -> None:
        """Check and normalize every field."""
        self._check_choice()
        self._check_stops()
        self._check_limits()
        self._check_words()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_choice(self) -> None:
        check_integer("n", self.n, 1, MAX_SEQUENCES)
        self._set("presence_penalty", finite_number("presence_penalty", self.presence_penalty, -2.0, 2.0))
        self._set("frequency_penalty", finite_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0))
        self._set(
            "repetition_penalty", finite_number("repetition_penalty", self.repetition_penalty, 0.0, open_low=True)
        )
        temperature = finite_number("temperature", self.temperature, 0.0, 2.0)
        self._set("top_p", finite_number("top_p", self.top_p, 0.0, 1.0, open_low=True))
        check_integer("top_k", self.top_k, -1)
        self._set("top_k", max(self.top_k, 0))
        self._set("min_p", finite_number("min_p", self.min_p, 0.0, 1.0))
        if 0.0 < temperature < LEAST_TEMPERATURE:
            logger.warning("temperature %g is too small to compute with; %g is used", temperature, LEAST_TEMPERATURE)
            temperature = LEAST_TEMPERATURE
        self._set("temperature", temperature)
        if self.greedy:
            if self.n > 1:
                raise ValidationError(
                    "n must be 1 when using greedy sampling: all sequences would be the same. "
                    "Set a temperature above 0, or n=1.",
                    "n",
                    self.n,
                )
            self._set("top_p", 1.0)
            self._set("top_k", 0)
            self._set("min_p", 0.0)
        if self.seed is not None:
            check_integer("seed", self.seed, -(2**63), 2**63 - 1)
            self._set("seed", None if self.seed == -1 else self.seed)

    def _check_stops(self) -> None:
        stop = texts("stop", self.stop)
        if stop and not self.detokenize:
            raise ValidationError("stop strings need detokenize=True; use stop_token_ids instead", "stop", stop)
        self._set("stop", stop)
        self._set("stop_token_ids", token_ids("stop_token_ids", self.stop_token_ids))
        self._set("eos_token_ids", token_ids("eos_token_ids", self.eos_token_ids))
        found = self.repetition_detection
        if isinstance(found, Mapping):
            self._set("repetition_detection", RepetitionDetection(**found))
        elif found is not None and not isinstance(found, RepetitionDetection):
            raise ValidationError("repetition_detection must be a RepetitionDetection", "repetition_detection", found)

    def _check_limits(self) -> None:
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1)
        check_integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValidationError(
                f"min_tokens must be at most max_tokens, which is {self.max_tokens}", "min_tokens", self.min_tokens
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                value = 1 if value else None
            elif value is not None:
                check_integer(name, value, -1)
            self._set(name, value)
        if self.logprob_token_ids is not None:
            self._check_logprob_ids()
        self._check_prompt_ids()
        if self.stream_interval is not None:
            check_integer("stream_interval", self.stream_interval, 1)
        if self.thinking_token_budget is not None:
            check_integer("thinking_token_budget", self.thinking_token_budget, -1)
            if self.thinking_token_budget == -1:
                self._set("thinking_token_budget", None)
        if self.skip_reading_prefix_cache is None:
            # A hit computes no logits for the prompt positions that it skips.
            self._set("skip_reading_prefix_cache", self.prompt_report is not None)

    def _check_logprob_ids(self) -> None:
        ids = token_ids("logprob_token_ids", self.logprob_token_ids)
        if len(ids) > MAX_LOGPROB_TOKEN_IDS:
            raise ValidationError(
                f"logprob_token_ids may hold {MAX_LOGPROB_TOKEN_IDS} ids at most, found {len(ids)}", "logprob_token_ids"
            )
        if self.logprobs is not None and ids and self.logprobs != len(ids):
            raise ValidationError(
                f"logprobs must be the number of logprob_token_ids, which is {len(ids)}, or be left out",
                "logprobs",
                self.logprobs,
            )
        self._set("logprob_token_ids", ids or None)
        if ids:
            self._set("logprobs", len(ids))

    def _check_prompt_ids(self) -> None:
        check_integer("prompt_logprob_start", self.prompt_logprob_start, 0)
        if self.prompt_logprob_token_ids is not None:
            self._set("prompt_logprob_token_ids", token_rows("prompt_logprob_token_ids", self.prompt_logprob_token_ids))
        if self.prompt_logprob_start and not self.prompt_logprob_token_ids:
            raise ValidationError(
                "prompt_logprob_start needs prompt_logprob_token_ids; prompt_logprobs brings every position",
                "prompt_logprob_start",
                self.prompt_logprob_start,
            )

    def _check_words(self) -> None:
        for name in (
            "ignore_eos",
            "flat_logprobs",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
            "skip_reading_prefix_cache",
        ):
            check_boolean(name, getattr(self, name))
        try:
            self._set("output_kind", RequestOutputKind(self.output_kind))
        except ValueError:
            kinds = ", ".join(f"{kind.name} ({kind.value})" for kind in RequestOutputKind)
            raise ValidationError(f"output_kind must be one of {kinds}", "output_kind", self.output_kind) from None
        self._set("logit_bias", biases(self.logit_bias))
        if self.allowed_token_ids is not None:
            allowed = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not allowed:
                raise ValidationError("allowed_token_ids must not be empty; use None to allow all", "allowed_token_ids")
            self._set("allowed_token_ids", allowed)
        self._set("bad_words", texts("bad_words", self.bad_words))
        sequences = tuple(token_ids("bad_words", ids, distinct=False) for ids in self.bad_words_token_ids)
        if len(sequences) > MAX_BAD_WORDS:
            raise ValidationError(
                f"bad_words make {len(sequences)} token sequences, at most {MAX_BAD_WORDS} are allowed", "bad_words"
            )
        self._set("bad_words_token_ids", sequences)
        check_extra_args(self.extra_args)
        self._set("structured_outputs", form_of(self.structured_outputs))

    @property
    def greedy(self) -> bool:
        """True when the most likely token is taken, so that nothing is random."""
        return self.temperature < GREEDY_BELOW

    @property
    def prompt_report(self) -> int | None:
        """How many of the best tokens to report at each position of the prompt; None when the prompt is not scored."""
        return 0 if self.prompt_logprobs is None and self.prompt_logprob_token_ids else self.prompt_logprobs

    def prompt_row(self, position: int) -> tuple[int, ...]:
        """The tokens to report, beside the best ones, for the prompt token behind `position`; -1 stands for none."""
        rows, row = self.prompt_logprob_token_ids or (), position - self.prompt_logprob_start
        return () if not rows or row < 0 else rows[0] if len(rows) == 1 else rows[row]

    def check_prompt(self, length: int) -> None:
        """Raise ValidationError when prompt_logprob_token_ids does not fit a prompt of so many tokens."""
        rows, scored = len(self.prompt_logprob_token_ids or ()), length - 1 - self.prompt_logprob_start
        if rows > 1 and rows != scored:
            raise ValidationError(
                f"prompt_logprob_token_ids has {rows} rows, and {max(scored, 0)} tokens stand behind position "
                f"{self.prompt_logprob_start}: give a row for each, or one for all",
                "prompt_logprob_token_ids",
            )
        if rows and scored < 0:
            raise ValidationError(
                f"prompt_logprob_start is behind the prompt, which has {length} tokens", "prompt_logprob_start"
            )

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """Every id that would end the request: what min_tokens forbids, whatever ignore_eos says."""
        return frozenset(self.eos_token_ids) | frozenset(self.stop_token_ids)

    def resolved(
        self,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        eos_token_ids: Iterable[int] = (),
        bad_words_token_ids: Iterable[Iterable[int]] = (),
        thinking: ThinkingMarks | None = None,
    ) -> SamplingParams:
        """The same wishes with what only the engine knows: the limit, the seed, the model's ids."""
        limit = self.max_tokens if max_tokens is None else max_tokens
        return dataclasses.replace(
            self,
            max_tokens=limit,
            min_tokens=self.min_tokens if limit is None else min(self.min_tokens, limit),
            seed=self.seed if seed is None else seed,
            eos_token_ids=tuple(eos_token_ids),
            bad_words_token_ids=tuple(tuple(ids) for ids in bad_words_token_ids),
            thinking=self.thinking if thinking is None else thinking,
        )

    def check(self, vocab_size: int, max_logprobs: int = -1) -> None:
        """Raise ValidationError for ids outside the vocabulary or more logprobs than `max_logprobs` (-1: no limit)."""
        for name, ids in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("logprob_token_ids", self.logprob_token_ids or ()),
            ("logit_bias", tuple(token for token, _ in self.logit_bias)),
            ("prompt_logprob_token_ids", tuple(max(row, default=0) for row in self.prompt_logprob_token_ids or ())),
        ):
            outside = [token for token in ids if token >= vocab_size]
            if outside:
                raise ValidationError(
                    f"{name} has token ids outside the vocabulary of {vocab_size}: {outside[:10]}", name, outside[0]
                )
        for name, asked in (
            ("logprobs", None if self.logprob_token_ids else self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
            ("prompt_logprob_token_ids", max(map(len, self.prompt_logprob_token_ids or ((),)))),
        ):
            if asked is None or max_logprobs == -1:
                continue
            wanted = vocab_size if asked == -1 else asked
            if wanted > max_logprobs:
                raise ValidationError(
                    f"{name} may be at most {max_logprobs} here (the option max_logprobs), {wanted} were asked for",
                    name,
                    asked,
                )


@suggesting
@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """What vector to make of a prompt. `dimensions` cuts it; `use_activation` None means the model's habit."""

    task: Literal["embed", "classify", "score", "token_embed", "token_classify"] = "embed"
    dimensions: int | None = None
    use_activation: bool | None = None
    skip_reading_prefix_cache: bool | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        tasks = ("embed", "classify", "score", "token_embed", "token_classify")
        if self.task not in tasks:
            raise ValidationError(f"task must be one of {', '.join(tasks)}", "task", self.task)
        if self.dimensions is not None:
            check_integer("dimensions", self.dimensions, 1)
        if self.use_activation is not None:
            check_boolean("use_activation", self.use_activation)
        if self.skip_reading_prefix_cache is None:
            # A vector per token needs every position computed.
            object.__setattr__(self, "skip_reading_prefix_cache", self.task.startswith("token_"))
        check_boolean("skip_reading_prefix_cache", self.skip_reading_prefix_cache)

"""LLM: a model in this process, for batches of prompts. The same engine as the server's, without its network.

Every method returns its results in the order of its input.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from types import TracebackType
from typing import Any, NoReturn

from tqdm.auto import tqdm

from quire.config import EngineOptions
from quire.core.params import SamplingParams
from quire.engine.batch_arguments import adds_special, listed, ranks_of, refuse_given, whole
from quire.engine.beam_requests import best_tokens, round_of, scoring, search_of
from quire.engine.beams import BeamSearch, BeamSearchOutput, BeamSearchParams
from quire.engine.engine import Engine, Prepared
from quire.engine.metrics import Metrics
from quire.engine.metrics_reader import Counter, Gauge, Histogram, read_metrics
from quire.engine.outputs import RequestOutput
from quire.engine.prompts import Prompt
from quire.engine.turns import HeldInterrupts, Turns
from quire.errors import ConfigError, EngineDeadError, NoSuchMethodError, ValidationError
from quire.foreign import FOREIGN, changes_nothing, instead_of
from quire.text.answer_format import answer_format_of
from quire.text.chat import ChatOptions, prompt_text, read_template
from quire.text.tokenizer import Tokenizer
from quire.text.tool_choice import ToolWish, tool_wish

Message = Mapping[str, Any]
Progress = bool | Callable[..., tqdm]

_NO_VECTORS = "quire runs models that write text; vectors, classes and scores of prompts are not computed."
_ONE_PROCESS = "The model runs in this process; there are no workers to call."
_NO_SLEEP = "close() frees the model and its pages; make a new LLM to have them back."
# Methods of other engines that quire does not have, and why.
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(("encode", "embed", "classify", "score", "reward"), _NO_VECTORS),
    **dict.fromkeys(("collective_rpc", "apply_model"), _ONE_PROCESS),
    **dict.fromkeys(("sleep", "wake_up", "release_kv_cache_memory"), _NO_SLEEP),
    **dict.fromkeys(("start_profile", "stop_profile"), "Use a profiler of Python or of the system."),
    "reset_mm_cache": "Models here read text only.",
    **dict.fromkeys(
        ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
        "Weights are read once; make a new LLM for others.",
    ),
}


class LLM:
    """A loaded model.

    >>> llm = LLM()  # the bundled model; or a folder, or a hub id
    >>> llm.generate("Once upon a time", SamplingParams(max_tokens=20))[0].outputs[0].text

    Keyword arguments are the engine's options (see config.py), by the names of the command line's flags with
    underscores; an unknown one raises ConfigError with the nearest name. Those of other engines that would change
    nothing here are taken (see foreign.py).
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        values = {"model": model, "disable_log_stats": True, **options}
        for name in [name for name in values if name in FOREIGN]:
            value = values.pop(name)
            if not changes_nothing(name, value):
                raise ConfigError(f"{name} is {value!r}, and quire has no such option: {instead_of(name, str)}")
        self._open(EngineOptions.from_flat(values))

    def _open(self, options: EngineOptions) -> None:
        self._engine = Engine.from_options(options)
        self._turns = Turns()  # of threads, at the engine and at what is done
        self._process = os.getpid()
        self._closed = False
        self._ids = count()
        self._queued: list[str] = []  # ids of enqueue() that wait_for_completion() has not handed out
        self._done: dict[str, RequestOutput] = {}  # finished requests that nobody has taken
        self._metrics: Metrics | None = None
        if not options.observe.disable_log_stats:
            settings = self._engine.settings
            self._metrics = Metrics(settings.model_names[0], settings.max_model_len)
            self._engine.observer = self._metrics

    @classmethod
    def from_engine_args(cls, options: EngineOptions) -> LLM:
        """An LLM with these options."""
        made = cls.__new__(cls)
        made._open(options)
        return made

    def __getattr__(self, name: str) -> Any:
        """Say why a method of other engines is not here."""
        if name in NOT_HERE:
            raise NoSuchMethodError(f"LLM.{name} does not exist in quire. {NOT_HERE[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # ---------------------------------------------------------------- generation

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: Progress = True,
        priority: Sequence[int] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt: a string, a list of token ids, or a dict (TextPrompt, TokensPrompt); one or many.

        `sampling_params` are one for all or one for each; None takes the model's own defaults. A prompt or parameter
        that is wrong raises ValidationError before anything runs; a request that fails while it runs has
        finish_reason "error" in its output and leaves the others alone. Of `tokenization_kwargs` there is
        add_special_tokens; adapters and processors of images are there to be refused by name.
        """
        special = adds_special(tokenization_kwargs, True)
        refuse_given(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        return self._run(self._prepare(listed(prompts), sampling_params, priority, special), use_tqdm)

    def enqueue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        lora_request: None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """The arguments of generate(), without waiting: the ids of the requests, which run in wait_for_completion()."""
        special = adds_special(tokenization_kwargs, True)
        refuse_given(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        return self._enqueue(self._prepare(listed(prompts), sampling_params, priority, special))

    def wait_for_completion(self, output_type: type | None = None, *, use_tqdm: Progress = True) -> list[RequestOutput]:
        """The outputs of all that was enqueued, in that order. `output_type`, if given, is RequestOutput."""
        if output_type not in (None, RequestOutput):
            raise ValidationError("output_type can only be RequestOutput", "output_type", output_type)
        ids, self._queued = self._queued, []
        return self._collect(ids, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: Progress = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several. Messages are in the form of the OpenAI API.

        `tool_choice` "required", or an object that names one tool, lets the model say nothing but calls; they stay in
        the text, as the model writes them.
        """
        refuse_given(lora_request=lora_request, mm_processor_kwargs=mm_processor_kwargs)
        options = ChatOptions(
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template=read_template(chat_template),
            template_kwargs=chat_template_kwargs or {},
            content_format=chat_template_content_format,
        )
        # The template writes the special tokens.
        special = adds_special(tokenization_kwargs, False)
        return self._run(self._talks(messages, sampling_params, priority, options, tool_choice, special), use_tqdm)

    def enqueue_chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """The arguments of chat(), without waiting: the ids of the requests, which run in wait_for_completion()."""
        options = ChatOptions(
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template=read_template(chat_template),
            template_kwargs=chat_template_kwargs or {},
        )
        return self._enqueue(self._talks(messages, sampling_params, priority, options, tool_choice, special=False))

    def _talks(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        options: ChatOptions,
        tool_choice: str | Mapping[str, Any] | None,
        special: bool,
    ) -> list[Prepared]:
        """Requests for the answers to conversations."""
        if self._engine.tokenizer is None:
            raise ValidationError("chat needs a tokenizer, and this engine runs without one", "messages")
        if isinstance(messages, Mapping):
            raise ValidationError(
                "messages must be a list of messages, or of such lists; found one message", "messages"
            )
        given: list[Any] = list(messages)
        conversations = [given] if given and isinstance(given[0], Mapping) else given
        prompts: list[Prompt] = [prompt_text(self._engine.tokenizer, talk, options) for talk in conversations]
        if tool_choice is not None and prompts:
            wish = tool_wish(options.tools, tool_choice, None)
            params = self._with_tools(wish, options.template, params, str(prompts[0]))
        return self._prepare(prompts, params, priority, special)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        *,
        use_tqdm: Progress = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, the best first; at most `concurrency_limit` prompts at a time.

        Beams find each other's pages through the prefix cache, so a step computes what lies in the last page. Raises
        ValidationError for a wrong prompt or a width beyond max_logprobs, RequestFailedError if a beam fails.
        """
        refuse_given(lora_request=lora_request)
        settings = self._engine.settings
        firsts = self._prepare(listed(prompts), scoring(params, settings), None, special=True)
        searches = [search_of(first, params, settings) for first in firsts]
        bar = _Bar(len(searches), use_tqdm)
        try:
            self._search(searches, firsts, concurrency_limit or len(searches), bar)
        finally:
            bar.close()
        for search in searches:
            for sequence in search.sequences():
                if self._engine.tokenizer is not None:
                    sequence.text = self._engine.tokenizer.decode(sequence.tokens, params.skip_special_tokens)
        return [BeamSearchOutput(search.sequences()) for search in searches]

    def _search(self, searches: Sequence[BeamSearch], firsts: Sequence[Prepared], at_once: int, bar: _Bar) -> None:
        """Run the searches to their ends: in each round a request of one token for each beam."""
        waiting = deque(zip(searches, firsts, strict=True))
        active: list[tuple[BeamSearch, Prepared]] = []
        while waiting or active:
            while waiting and len(active) < at_once:
                active.append(waiting.popleft())
            requests = [asked for search, first in active for asked in round_of(first, search, map(str, self._ids))]
            outputs = iter(self._run(requests, False))
            for search, _ in active:
                search.advance([best_tokens(next(outputs)) for _ in search.running])
            still = [(search, first) for search, first in active if search.running]
            bar.ended(len(active) - len(still))
            active = still

    def _with_tools(
        self,
        wish: ToolWish,
        template: str | None,
        params: SamplingParams | Sequence[SamplingParams] | None,
        prompt: str,
    ) -> SamplingParams | list[SamplingParams]:
        """The parameters with what the tools need: a grammar of calls, or markers that are not hidden.

        `prompt` is one of those that the template wrote; all end alike.
        """
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None, "chat() needs one"

        def spoken(one: SamplingParams) -> SamplingParams:
            return answer_format_of(tokenizer, template, wish, one, prompt, None, None).params(one)

        if params is None:
            params = self._engine.settings.default_params
        return spoken(params) if isinstance(params, SamplingParams) else [spoken(whole(one)) for one in params]

    def _prepare(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        priority: Sequence[int] | None,
        special: bool,
    ) -> list[Prepared]:
        """Check and tokenize everything before anything starts."""
        if params is None:
            params = self._engine.settings.default_params
        if isinstance(params, Iterable) and not isinstance(params, (Mapping, str)):
            each = [whole(wish) for wish in params]
        else:
            each = [whole(params)] * len(prompts)
        ranks = [0] * len(prompts) if priority is None else ranks_of(priority)
        for name, values in (("sampling_params", each), ("priority", ranks)):
            if len(values) != len(prompts):
                raise ValidationError(
                    f"The lengths of prompts ({len(prompts)}) and {name} ({len(values)}) must be the same", name
                )
        return [
            self._engine.prepare(str(next(self._ids)), prompt, wish, rank, special)
            for prompt, wish, rank in zip(prompts, each, ranks, strict=True)
        ]

    def _run(self, requests: Sequence[Prepared], use_tqdm: Progress) -> list[RequestOutput]:
        """Run the requests to their ends. Whatever interrupts it, none of them goes on."""
        return self._collect(self._submit(requests), use_tqdm)

    def _enqueue(self, requests: Sequence[Prepared]) -> list[str]:
        ids = self._submit(requests)
        self._queued += ids
        return ids

    def _submit(self, requests: Sequence[Prepared]) -> list[str]:
        """Give the requests to the engine: all of them, or none. Their ids."""
        ids: list[str] = []
        with HeldInterrupts(), self._turns:
            self._check_open()
            try:
                for request in requests:
                    self._engine.submit(request)
                    ids.append(request.request_id)
            except BaseException:
                self._drop(ids)
                raise
        return ids

    def _collect(self, ids: Sequence[str], use_tqdm: Progress) -> list[RequestOutput]:
        """Run until these requests are done, in turn with other threads that do the same: each step is for all of them."""
        bar, done = _Bar(len(ids), use_tqdm), self._done
        missing = set(ids)
        try:
            with HeldInterrupts() as interrupts:
                while missing:
                    with self._turns:
                        self._check_open()
                        if missing.isdisjoint(done):
                            done.update((output.request_id, output) for output in self._engine.step())
                    for request_id in missing.intersection(done):
                        missing.discard(request_id)
                        bar.finished(done[request_id])
                    interrupts.check()
        except BaseException:
            with self._turns:
                self._drop(ids)
            raise
        finally:
            bar.close()
        return [done.pop(request_id) for request_id in ids]

    def _drop(self, ids: Iterable[str]) -> None:
        """End requests that nobody waits for any more, and forget those that are done."""
        gone = set(ids)
        self._engine.abort(gone)
        with contextlib.suppress(EngineDeadError):  # then they have ended already
            self._done.update((output.request_id, output) for output in self._engine.step())
        for request_id in gone:
            self._done.pop(request_id, None)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineDeadError("This LLM is closed: its model is freed. Make a new one.")
        if self._process != os.getpid():
            raise EngineDeadError(
                "This LLM was made before this process was forked, and the threads that compute stayed behind. Make one in "
                "the process that uses it, or start processes with the method spawn."
            )

    # ---------------------------------------------------------------- the rest

    def get_tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None with skip_tokenizer_init. Its `library` is the object of Transformers, if any."""
        return self._engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What generate() uses when it is given no parameters: from the model's generation_config.json."""
        return self._engine.settings.default_params

    def get_world_size(self, include_dp: bool = True) -> int:
        """How many devices run the model: one. `include_dp` changes nothing."""
        return 1

    def reset_prefix_cache(self) -> bool:
        """Forget what is known of earlier prompts. False while requests hold some of it."""
        return self._engine.reset_prefix_cache()

    def get_metrics(self) -> list[Counter | Gauge | Histogram]:
        """What the server shows under /metrics, as objects. Needs disable_log_stats=False when the LLM is made."""
        if self._metrics is None:
            raise ConfigError("Nothing was counted: make the LLM with disable_log_stats=False to have metrics.")
        return read_metrics(self._metrics.collect())

    def close(self) -> None:
        """Free the model and its pages. The object cannot be used afterwards; a second call changes nothing."""
        with self._turns:
            if not self._closed:
                self._closed = True
                self._engine.close()

    def __reduce__(self) -> NoReturn:
        """Copies would share pages and threads."""
        raise TypeError(
            "An LLM cannot be copied or pickled: its model lives in this process. Make one where it is used."
        )

    def __enter__(self) -> LLM:
        """The object itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


class _Bar:
    """The progress bar: prompts done, and tokens per second in and out."""

    def __init__(self, total: int, wanted: Progress) -> None:
        make = wanted if callable(wanted) else tqdm if wanted else None
        self._bar = make(total=total, desc="Processed prompts", dynamic_ncols=True, postfix="") if make else None
        self._began = time.perf_counter()
        self._read = 0
        self._written = 0

    def finished(self, output: RequestOutput) -> None:
        """Count a finished request."""
        if self._bar is None:
            return
        self._read += len(output.prompt_token_ids)
        self._written += sum(len(completion.token_ids) for completion in output.outputs)
        seconds = max(time.perf_counter() - self._began, 1e-9)
        self._bar.postfix = (
            f"est. speed input: {self._read / seconds:.2f} toks/s, output: {self._written / seconds:.2f} toks/s"
        )
        self._bar.update(1)

    def ended(self, count: int) -> None:
        """Count prompts that are done, without their tokens."""
        if self._bar is not None:
            self._bar.update(count)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()

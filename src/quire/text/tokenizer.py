"""The Hugging Face tokenizer behind one small face: encode, decode, special tokens, chat templates.

Importing this module imports neither transformers nor torch; load_tokenizer does. Safe to use from several threads.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import CheckpointError, ModelNotFoundError, ValidationError
from quire.text.pieces import Pieces, pieces_of

logger = logging.getLogger(__name__)

# What the renderer itself passes to a template, or what changes what it does; never a template's own variable.
RESERVED_TEMPLATE_KWARGS = frozenset(
    [
        "chat_template",
        "conversation",
        "messages",
        "tools",
        "documents",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)
# A library class whose own versions of these are in use can be bypassed by calling the Rust tokenizer underneath.
_OVERRIDABLE = ("__call__", "encode", "_encode_plus", "decode", "_decode")


class Tokenizer:
    """Text to token ids and back.

    `chat_template` is a template (not a path) that takes the place of the tokenizer's own. `hf` is the library's own
    object, for callers who need more than this face offers.
    """

    def __init__(self, hf: Any, chat_template: str | None = None) -> None:
        self.hf = hf
        self.given_template = chat_template
        self.eos_token_id: int | None = hf.eos_token_id
        self.bos_token_id: int | None = hf.bos_token_id
        self.pad_token_id: int | None = hf.pad_token_id
        self.added_tokens: dict[int, str] = {i: token.content for i, token in hf.added_tokens_decoder.items()}
        self.special_ids: frozenset[int] = frozenset(hf.all_special_ids) | {
            i for i, token in hf.added_tokens_decoder.items() if token.special
        }
        self.vocab_size: int = max(len(hf), max(self.added_tokens, default=-1) + 1)
        self._backend = _bare_backend(hf)
        self._lock = threading.Lock()  # the library's Python tokenizers, and its argument handling, are not thread-safe
        self.pieces: Pieces | None = None if self._backend is None else pieces_of(self._backend)

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token can stand for."""
        return max((len(token) for token in self.hf.get_vocab()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own BOS and the like unless switched off."""
        try:
            if self._backend is not None:
                return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
            with self._lock:
                return list(self.hf.encode(text, add_special_tokens=add_special_tokens))
        except (UnicodeEncodeError, TypeError) as error:  # Rust says TypeError for what it cannot take as text
            raise ValidationError(
                "The text is not valid Unicode, such as half of a surrogate pair.", "prompt"
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids outside the vocabulary add nothing."""
        ids = list(token_ids)
        if self._backend is not None:
            return self.hf.decode(ids, skip_special_tokens=skip_special_tokens)
        with self._lock:
            return self.hf.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to a text, as bytes: possibly a part of a character."""
        if self.pieces is not None:
            return self.pieces[token_id]
        return self.decode([token_id], skip_special_tokens=False).encode()

    def token_string(self, token_id: int) -> str:
        """One token on its own, readable: bytes that are no whole character show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    @cached_property
    def renders_itself(self) -> bool:
        """Whether conversations are turned into text by the tokenizer's own code instead of a Jinja template."""
        method = getattr(type(self.hf), "apply_chat_template", None)
        return method is None or not method.__module__.startswith("transformers.tokenization_utils")

    @cached_property
    def has_response_template(self) -> bool:
        """Whether the tokenizer says itself how its model's answers are read."""
        return bool(getattr(self.hf, "response_template", None)) and hasattr(self.hf, "get_response_parser")

    def response_parser(self, prompt: str, tools: Sequence[Mapping[str, Any]]) -> Any:
        """The library's parser for one answer to a prompt, by the tokenizer's own response template."""
        return self.hf.get_response_parser(prefix=prompt, tools=list(tools))

    @cached_property
    def template_tokens(self) -> dict[str, Any]:
        """The special tokens that templates know by name, such as bos_token."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if not isinstance(token, list)}

    def template_for(self, tools: Sequence[object] | None = None, chat_template: str | None = None) -> str:
        """The template to use: the given one, else the tokenizer's; of several named ones "tool_use" with tools.

        A given value may be the name of one of the tokenizer's own templates. ValidationError when there is none.
        """
        given = chat_template if chat_template is not None else self.given_template
        own = self.hf.chat_template
        if isinstance(own, Mapping):
            if given is not None:
                return own.get(given, given)
            for name in ("tool_use", "default") if tools else ("default",):
                if name in own:
                    return own[name]
            raise ValidationError(
                f"This model has chat templates named {sorted(own)} and none named 'default'. Choose one with the "
                "option chat_template.",
                "chat_template",
            )
        if given is not None:
            return given
        if own is None:
            raise ValidationError(
                "This model has no chat template, so messages cannot be turned into a prompt. Start with the option "
                "chat_template (a path or the template itself), or send a plain prompt to completions.",
                "messages",
            )
        return own

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        `template_kwargs` are variables of the template; those that it does not mention are dropped. Whatever the
        template refuses is a ValidationError.
        """
        if not messages:
            raise ValidationError("The conversation is empty. Send at least one message.", "messages")
        if add_generation_prompt and continue_final_message:
            raise ValidationError(
                "add_generation_prompt and continue_final_message exclude each other: either the model answers, or it "
                "goes on with the last message.",
                "continue_final_message",
            )
        template = self.template_for(tools, chat_template)
        usable = _usable_kwargs(template, template_kwargs or {})
        try:
            return self.hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **usable,
            )
        except TemplateSyntaxError as error:
            raise ValidationError(f"The chat template is not valid Jinja: {error.message}.", "chat_template") from error
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            raise ValidationError(f"The chat template cannot render these messages: {reason}", "messages") from error


def load_tokenizer(
    path: str | Path,
    trust_remote_code: bool = False,
    revision: str | None = None,
    token: str | None = None,
    chat_template: str | None = None,
) -> Tokenizer:
    """The tokenizer in a folder, or of a hub id.

    `chat_template` is the template itself, see quire.text.chat.read_template. A folder without a tokenizer raises
    ModelNotFoundError, one with damaged files CheckpointError.
    """
    from transformers import AutoTokenizer  # here, because it imports torch and takes seconds

    is_folder = Path(path).is_dir()
    try:
        hf = AutoTokenizer.from_pretrained(
            str(path),
            trust_remote_code=trust_remote_code,
            revision=revision,
            token=token,
            local_files_only=is_folder,
        )
    except OSError as error:
        raise ModelNotFoundError(_missing(path)) from error
    except Exception as error:  # damaged files raise whatever their parser raises, down to a bare Exception from Rust
        if is_folder and not _has_tokenizer(Path(path)):
            raise ModelNotFoundError(_missing(path)) from error
        raise CheckpointError(
            f"The tokenizer of {str(path)!r} cannot be read: {type(error).__name__}: {str(error)[:300]}. Tried its "
            "files with transformers.AutoTokenizer. Download the files again, name another tokenizer with the option "
            "tokenizer, or, if they hold their own code that you trust, set trust_remote_code."
        ) from error
    return Tokenizer(hf, chat_template)


def _missing(path: str | Path) -> str:
    return (
        f"There is no tokenizer at {str(path)!r}: no tokenizer.json, tokenizer.model or tokenizer_config.json was found "
        "as a local folder, in the hub's cache or on the hub. Give the folder or hub id of one with the option "
        "tokenizer, or run on token ids alone with skip_tokenizer_init."
    )


def _has_tokenizer(folder: Path) -> bool:
    """True when a folder holds any file by which a tokenizer is known."""
    return any(folder.glob("tokenizer*")) or any(folder.glob("vocab*")) or any(folder.glob("*.tiktoken"))


def _bare_backend(hf: Any) -> Any:
    """The Rust tokenizer under a library tokenizer, when calling it directly gives the same; else None.

    Called directly it is thread-safe, since nothing on it is changed after this.
    """
    backend = getattr(hf, "backend_tokenizer", None)
    if backend is None:
        return None
    for name in _OVERRIDABLE:
        method = getattr(type(hf), name, None)
        if method is not None and not method.__module__.startswith("transformers.tokenization_utils"):
            return None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(getattr(hf, "split_special_tokens", False))
    return backend


class GenerationTag(Extension):
    """Accepts the {% generation %} blocks of training templates, so that their variables can be listed."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The block's content in place of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=64)
def _template_variables(template: str) -> frozenset[str]:
    """Names that a template reads from outside."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", GenerationTag])
    return frozenset(meta.find_undeclared_variables(environment.parse(template)))


def _usable_kwargs(template: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given variables that the template reads; a reserved name raises ValidationError."""
    reserved = sorted(RESERVED_TEMPLATE_KWARGS.intersection(given))
    if reserved:
        raise ValidationError(
            f"{_listed(reserved)} cannot be set through chat_template_kwargs. Use the field of that name, where there "
            "is one.",
            "chat_template_kwargs",
        )
    if not given:
        return {}
    known = _template_variables(template)
    unknown = sorted(given.keys() - known)
    if unknown:
        logger.debug("the chat template does not use %s", _listed(unknown))
    return {name: value for name, value in given.items() if name in known}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)

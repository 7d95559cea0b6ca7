"""A tokenizer behind one small face: encode, decode, special tokens, chat templates.

load_tokenizer reads its files with the bare `tokenizers` package where that gives the same as the Transformers library,
whose import takes seconds and brings torch, and else with that library. Safe to use from several threads.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quire.errors import ValidationError
from quire.text.codec import Described
from quire.text.library_tokenizer import is_own, read_with_library, refuse_placeholders
from quire.text.render_worker import answer
from quire.text.token_bytes import Pieces, pieces_of
from quire.text.tokenizer_files import read_tokenizer

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


class Tokenizer:
    """Text to token ids and back.

    `chat_template` is a template (not a path) that takes the place of the tokenizer's own. `library` is the object of
    the Transformers library where that had to read the files, else None.
    """

    def __init__(self, described: Described, chat_template: str | None = None) -> None:
        codec = self._codec = described.codec
        self.library = described.library
        self.given_template = chat_template
        self.own_template = described.chat_template
        self.template_tokens: dict[str, Any] = dict(described.special_tokens)  # that templates know by name
        named = dict(zip(described.special_tokens, codec.ids_of(described.special_tokens.values()), strict=True))
        self.eos_token_id: int | None = named.get("eos_token")
        self.bos_token_id: int | None = named.get("bos_token")
        self.pad_token_id: int | None = named.get("pad_token")
        added = codec.added_tokens()
        self.added_tokens: dict[int, str] = {i: token.content for i, token in added.items()}
        listed = [*named.values(), *codec.ids_of(described.extra_special_tokens)]
        special = [*listed, *(i for i, token in added.items() if token.special)]
        self.special_ids: frozenset[int] = frozenset(i for i in special if i is not None)
        self.vocab_size: int = max(codec.size(), max(self.added_tokens, default=-1) + 1)
        self.pieces: Pieces | None = None if codec.backend is None else pieces_of(codec.backend)

    @cached_property
    def longest_token(self) -> int:
        """The most characters that one token can stand for."""
        return max(map(len, self._codec.vocabulary()), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the tokenizer's own BOS and the like unless switched off."""
        try:
            return self._codec.encode(text, add_special_tokens)
        except (UnicodeEncodeError, TypeError) as error:  # Rust says TypeError for what it cannot take as text
            raise ValidationError(
                "The text is not valid Unicode, such as half of a surrogate pair.", "prompt"
            ) from error

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids outside the vocabulary add nothing."""
        return self._codec.decode(list(token_ids), skip_special_tokens)

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
        return self.library is not None and is_own(type(self.library), "apply_chat_template")

    @cached_property
    def has_response_template(self) -> bool:
        """Whether the tokenizer says itself how its model's answers are read."""
        return bool(getattr(self.library, "response_template", None)) and hasattr(self.library, "get_response_parser")

    def response_parser(self, prompt: str, tools: Sequence[Mapping[str, Any]]) -> Any:
        """The library's parser for one answer to a prompt, by the tokenizer's own response template."""
        return self.library.get_response_parser(prefix=prompt, tools=list(tools))

    def template_for(self, tools: Sequence[object] | None = None, chat_template: str | None = None) -> str:
        """The template to use: the given one, else the tokenizer's; of several named ones "tool_use" with tools.

        A given value may be the name of one of the tokenizer's own templates. ValidationError when there is none.
        """
        given = chat_template if chat_template is not None else self.given_template
        own = self.own_template
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
        tokenize: bool = False,
    ) -> str:
        """The prompt text of a conversation.

        `template_kwargs` are variables of the template; those that it does not mention are dropped. Whatever the
        template refuses is a ValidationError, and so is `tokenize`, which scripts for Transformers switch off.
        """
        if tokenize:
            raise ValidationError("apply_chat_template makes text; encode() makes token ids of it.", "tokenize")
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
        job = {
            "template": template,
            "messages": deepcopy(list(messages)),  # the last one is marked where it is continued
            "tools": list(tools) if tools else None,
            "documents": list(documents) if documents else None,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "variables": self.template_tokens | usable,
            "chars": sys.maxsize,
        }
        reply = self._rendered_by_library(job, usable) if self.renders_itself else answer(job)
        if "text" not in reply:
            raise refusal(reply)
        return reply["text"]

    def _rendered_by_library(self, job: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, str]:
        """What the tokenizer's own code makes of a job, as render_worker.answer would say it."""
        try:
            text = self.library.apply_chat_template(
                job["messages"],
                tools=job["tools"],
                documents=job["documents"],
                chat_template=job["template"],
                add_generation_prompt=job["add_generation_prompt"],
                continue_final_message=job["continue_final_message"],
                tokenize=False,
                **variables,
            )
        except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
            return {"kind": "render", "error": reason}
        return {"text": text}


def refusal(reply: Mapping[str, str]) -> ValidationError:
    """The error for an answer of render_worker.py that is no text."""
    if reply["kind"] == "syntax":
        return ValidationError(f"The chat template is not valid Jinja: {reply['error']}.", "chat_template")
    return ValidationError(f"The chat template cannot render these messages: {reply['error']}", "messages")


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
    folder = Path(path)
    if chat_template is None:
        refuse_placeholders([folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")])
    described = read_tokenizer(folder) if folder.is_dir() else None
    return Tokenizer(described or read_with_library(path, trust_remote_code, revision, token), chat_template)


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
    try:
        known = _template_variables(template)
    except TemplateSyntaxError as error:
        raise refusal({"kind": "syntax", "error": str(error.message)}) from error
    unknown = sorted(given.keys() - known)
    if unknown:
        logger.debug("the chat template does not use %s", _listed(unknown))
    return {name: value for name, value in given.items() if name in known}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)

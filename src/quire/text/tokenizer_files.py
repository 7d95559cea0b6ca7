"""Reads a folder's tokenizer with the bare `tokenizers` package, as the Transformers library would read it.

Only where that is certain: the answer is None wherever the library puts something else in the place of what
tokenizer.json says, or may, and for every setting that is not known here. The library's own reader takes over then.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.text.codec import Described, RustCodec

logger = logging.getLogger(__name__)

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")
READ = frozenset(
    [
        *NAMED, *EXTRA, "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "chat_template",
        "clean_up_tokenization_spaces", "legacy", "split_special_tokens", "tokenizer_class",
    ]
)  # fmt: skip
# Settings that change neither ids nor text: what they say is for training, or for tokenizers in Python.
WITHOUT_EFFECT = frozenset(
    [
        "backend", "clean_up_tokenization", "errors", "is_local", "local_files_only", "max_length", "model_input_names",
        "model_max_length", "name_or_path", "pad_to_multiple_of", "pad_token_type_id", "padding_side", "processor_class",
        "sp_model_kwargs", "spaces_between_special_tokens", "special_tokens_map_file", "stride", "tokenizer_file",
        "truncation_side", "truncation_strategy", "use_default_system_prompt", "use_fast",
    ]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Way:
    """How the library makes its tokenizer: from tokenizer.json as it is, or with steps that its class prescribes."""

    steps: Callable[[Any, Mapping[str, Any]], bool] | None = None  # sets them; False where it cannot be done alike
    defaults: Mapping[str, str] | None = None  # special tokens that count where the settings name none
    marks_special: bool = False  # special tokens are added once more, as such


class Ahead:
    """A folder's tokenizer, read in a thread before it is asked for: the Rust part lets Python go on meanwhile."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._thread: threading.Thread | None = None
        self._found: Described | None = None

    def begin(self, folder: Path) -> None:
        """Read it from now on."""
        self.take(folder)
        self._folder = folder
        self._thread = threading.Thread(target=self._read, args=(folder,), name="tokenizer", daemon=True)
        self._thread.start()

    def take(self, folder: Path) -> Described | None:
        """What was read, once; None where it was another folder or where the library must read it."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        found, self._found = self._found, None
        return found if folder == self._folder else None

    def _read(self, folder: Path) -> None:
        self._found = _read_or_none(folder)


AHEAD = Ahead()


def read_tokenizer(folder: Path) -> Described | None:
    """The tokenizer of a folder, or None where the library must read it."""
    return AHEAD.take(folder) or _read_or_none(folder)


def _read_or_none(folder: Path) -> Described | None:
    try:
        return _read(folder)
    except Exception as error:  # damaged files raise whatever their parser raises, down to a bare Exception from Rust
        logger.debug("the tokenizer in %s is left to the library: %r", folder, error)
        return None


def _read(folder: Path) -> Described | None:
    if not (folder / "tokenizer.json").is_file() or (folder / "tekken.json").exists():
        return None
    config, settings = _json(folder / "config.json"), _json(folder / "tokenizer_config.json", missing={})
    if config is None or "auto_map" in config or settings is None or settings.keys() - READ - WITHOUT_EFFECT:
        return None
    # Imported here: it takes a moment, and those who only read the settings do without.
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    way = _way(str(config.get("model_type")), settings.get("tokenizer_class") or config.get("tokenizer_class"), backend)
    if way is None or not _adds_what_is_said(folder, backend, settings):
        return None
    if way.steps is not None and not (_can_be_rebuilt(backend) and way.steps(backend, settings)):
        return None
    special = _special_tokens(folder, backend, settings, way.defaults or {})
    if special is None or not _flags_hold(backend, settings, special.named):
        return None
    cleans_up = bool(settings.get("clean_up_tokenization_spaces")) and type(backend.model).__name__ != "BPE"
    _add(backend, special, way.marks_special)
    return Described(
        codec=RustCodec(backend, cleans_up, bool(settings.get("split_special_tokens"))),
        special_tokens={name: str(token) for name, token in special.named.items()},
        extra_special_tokens=tuple(map(str, special.extra)),
        chat_template=_chat_template(folder, settings),
    )


def _json(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else missing


# ---------------------------------------------------------------- what the library's classes change


def _way(model_type: str, named: str | None, backend: Any) -> Way | None:
    """What the library does for this type of model and this tokenizer_class."""
    named = (named or "").removesuffix("Fast")
    if model_type in AS_IT_IS and named in AS_IT_IS[model_type]:
        return Way()
    if model_type == "llama" and named == "LlamaTokenizer":
        return Way() if _is_byte_level(backend) else LLAMA
    if (model_type, named) in QWEN_TYPES:
        return QWEN2
    return None


def _is_byte_level(backend: Any) -> bool:
    return any(b'"ByteLevel"' in part.__getstate__() for part in (backend.pre_tokenizer, backend.decoder) if part)


def _llama_steps(backend: Any, settings: Mapping[str, Any]) -> bool:
    """Spaces as "▁", one before the first word, rare characters as bytes."""
    from tokenizers import decoders, pre_tokenizers

    if not _is_bpe(backend, byte_fallback=True, fuse_unk=True):
        return False
    if any(backend.token_to_id(f"<0x{value:02X}>") is None for value in range(256)):
        return False  # what has no bytes becomes the unknown token or nothing, by settings of the model
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return True


QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _qwen_steps(backend: Any, settings: Mapping[str, Any]) -> bool:
    """Words by a pattern, then bytes."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    if not _is_bpe(backend, byte_fallback=False, fuse_unk=False) or backend.model.unk_token is not None:
        return False
    prefix = bool(settings.get("add_prefix_space"))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return True


def _is_bpe(backend: Any, byte_fallback: bool, fuse_unk: bool) -> bool:
    model = backend.model
    return (
        type(model).__name__ == "BPE"
        and (model.byte_fallback, model.fuse_unk) == (byte_fallback, fuse_unk)
        and not (model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix)
    )


_PLAIN = ("", "PreTrainedTokenizer", "TokenizersBackend")
_OF_QWEN = ("PreTrainedTokenizer", "TokenizersBackend")  # without any name it is the family's own class
# Type of model -> the tokenizer classes that take tokenizer.json as it is.
AS_IT_IS = {
    "llama": _PLAIN,
    "mistral": (*_PLAIN, "LlamaTokenizer"),
    "qwen3": _OF_QWEN,
    "qwen3_moe": _OF_QWEN,
    "granite": (*_PLAIN, "GPT2Tokenizer"),
    "olmo2": (*_PLAIN, "GPT2Tokenizer"),
    "phi3": (*_PLAIN, "LlamaTokenizer"),
}
QWEN_TYPES = {(kind, name) for kind in ("qwen2", "qwen3", "qwen3_moe") for name in ("", "Qwen2Tokenizer")} | {
    ("qwen2", name) for name in _OF_QWEN
}
LLAMA = Way(_llama_steps, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"})
QWEN2 = Way(_qwen_steps, dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>"), marks_special=True)


def _can_be_rebuilt(backend: Any) -> bool:
    """Whether adding the added tokens to the bare vocabulary one after the other gives them the ids that they have."""
    size = backend.get_vocab_size(with_added_tokens=False)
    for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
        inner = backend.model.token_to_id(token.content)
        if token_id != (size if inner is None else inner) or token.normalized:
            return False  # a token that is looked for in the normalized text was prepared for another normalizer
        size += inner is None
    return True


# ---------------------------------------------------------------- special and added tokens


@dataclass(frozen=True, slots=True)
class _Special:
    """Special tokens, strings or AddedToken; `named` in the order of NAMED."""

    named: dict[str, Any]
    extra: list[Any]


def _special_tokens(
    folder: Path, backend: Any, settings: Mapping[str, Any], defaults: Mapping[str, str]
) -> _Special | None:
    """Special tokens by the settings, by special_tokens_map.json where these do not list the added tokens."""
    given = {**defaults, **{name: settings[name] for name in NAMED if name in settings}}
    extra = next((settings[name] for name in EXTRA if settings.get(name)), None)
    if "added_tokens_decoder" not in settings:
        mapped = _json(folder / "special_tokens_map.json", missing={})
        if mapped is None or mapped.keys() - {*NAMED, *EXTRA[1:]}:
            return None
        given.update({name: value for name, value in mapped.items() if name in NAMED})
        if extra is None and not any(name in settings for name in EXTRA):
            extra = mapped.get(EXTRA[1])
    if backend.padding is not None:
        given.setdefault("pad_token", backend.padding["pad_token"])
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    named = {name: _token(given[name], known) for name in NAMED if given.get(name) is not None}
    others = [_token(value, known) for value in extra or []]
    if not isinstance(extra or [], list) or None in (*named.values(), *others):
        return None
    return _Special(named, others)


def _token(value: Any, known: Mapping[str, Any]) -> Any:
    """A special token as the settings write it: a string or the object of an added token. None for anything else."""
    from tokenizers import AddedToken

    if isinstance(value, dict) and isinstance(value.get("content"), str):
        fields = {key: entry for key, entry in value.items() if key not in ("__type", "special")}
        return known.get(value["content"]) or AddedToken(**fields, special=True)
    return known.get(value, value) if isinstance(value, str) else None


def _add(backend: Any, special: _Special, marks_special: bool) -> None:
    """Add the special tokens that are not among the added ones, in the library's order."""
    from tokenizers import AddedToken

    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    tokens = {str(one): one for one in (*special.named.values(), *special.extra)}
    new = [one for content, one in tokens.items() if content not in there]
    backend.add_tokens([AddedToken(one, special=True) if isinstance(one, str) else one for one in new])
    if marks_special:
        backend.add_tokens([AddedToken(content, special=True) for content in tokens])


def _adds_what_is_said(folder: Path, backend: Any, settings: Mapping[str, Any]) -> bool:
    """Whether the tokens that the settings add are the added tokens of tokenizer.json, to the last flag."""
    from tokenizers import AddedToken

    there = backend.get_added_tokens_decoder()
    if "added_tokens_decoder" in settings:
        said = {int(key): AddedToken(**value) for key, value in settings["added_tokens_decoder"].items()}
        return all(repr(there.get(token_id)) == repr(token) for token_id, token in said.items())
    legacy = _json(folder / "added_tokens.json", missing={}) or {}
    return all(token_id in there and there[token_id].content == content for content, token_id in legacy.items())


def _flags_hold(backend: Any, settings: Mapping[str, Any], named: Mapping[str, Any]) -> bool:
    """Whether add_bos_token and add_eos_token say what tokenizer.json does; versions of the library differ otherwise."""
    ids = backend.encode("a", add_special_tokens=True).ids
    for flag, name, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        token = named.get(name)
        token_id = None if token is None else backend.token_to_id(str(token))
        does = bool(ids) and token_id is not None and ids[place] == token_id
        if settings.get(flag) is not None and bool(settings[flag]) != does:
            return False
    return True


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    """The template, or several by name: from files of their own, else from the settings."""
    files = {path.name.removesuffix(".jinja"): path for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (folder / "chat_template.jinja").is_file():
        files = {"default": folder / "chat_template.jinja", **files}
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    own = settings.get("chat_template")
    return {one["name"]: one["template"] for one in own} if isinstance(own, list) else own

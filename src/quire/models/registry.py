"""Which class runs an architecture: native ones registered here or by plugins, else the Transformers path.

Holds names and loads classes when asked; knows nothing of how a model is built.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import logging
from typing import Any, Literal

from quire.errors import ConfigError, UnsupportedModelError
from quire.models.files.hub import ModelFiles

logger = logging.getLogger(__name__)

Impl = Literal["native", "transformers"]
PLUGIN_GROUP = "quire.models"

NATIVE = "quire.models.native.decoder:NativeDecoder"
BUILT_IN: dict[str, str | type] = {
    "LlamaForCausalLM": NATIVE,
    "MistralForCausalLM": NATIVE,
    "Qwen2ForCausalLM": NATIVE,
    "Qwen3ForCausalLM": NATIVE,
    "Qwen3MoeForCausalLM": NATIVE,
}


class ModelRegistry:
    """Architecture name -> native class.

    A native class is built as `Class(files, dtype, device, ops)` without weights, reads them in `load(files, seed)`, and
    is a ServedModel from then on; its classmethod `layout_of(files)` says what memory it will need.
    """

    _classes: dict[str, str | type] = dict(BUILT_IN)
    _plugins_loaded = False

    @classmethod
    def register_model(cls, architecture: str, model: str | type) -> None:
        """Let `model`, a class or "module:Class", run an architecture. The last registration counts."""
        if isinstance(model, str) and model.count(":") != 1:
            raise ConfigError(
                f"Model class {model!r} for {architecture!r} must be given as 'module:Class' or as a class."
            )
        cls._classes[architecture] = model

    @classmethod
    def architectures(cls) -> tuple[str, ...]:
        """All architectures that have a native class."""
        cls._load_plugins()
        return tuple(sorted(cls._classes))

    @classmethod
    def has(cls, architecture: str) -> bool:
        """Whether an architecture has a native class."""
        cls._load_plugins()
        return architecture in cls._classes

    @classmethod
    def resolve(cls, architecture: str) -> Any:
        """The native class of an architecture. Raises UnsupportedModelError when there is none or it cannot load."""
        cls._load_plugins()
        found = cls._classes.get(architecture)
        if found is None:
            raise UnsupportedModelError(_no_native(architecture, list(cls._classes)))
        if isinstance(found, type):
            return found
        module, _, name = found.partition(":")
        try:
            loaded = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UnsupportedModelError(
                f"The class {found!r} registered for {architecture!r} cannot be loaded: {error}. Repair or remove the "
                "plugin, or use --model-impl transformers."
            ) from error
        cls._classes[architecture] = loaded
        return loaded

    @classmethod
    def _load_plugins(cls) -> None:
        """Entry points of the group "quire.models": name = architecture, value = module:Class. One bad one is skipped."""
        if cls._plugins_loaded:
            return
        cls._plugins_loaded = True
        for entry in importlib.metadata.entry_points(group=PLUGIN_GROUP):
            try:
                cls.register_model(entry.name, entry.value)
            except ConfigError as error:
                logger.warning("Model plugin %s ignored: %s", entry.name, error)


def select_impl(files: ModelFiles, model_impl: str) -> Impl:
    """Which path runs the model: as asked, or for "auto" the native class when there is one.

    Raises UnsupportedModelError when the architecture is unknown to the chosen path.
    """
    if model_impl not in ("auto", "native", "vllm", "transformers"):
        raise ConfigError(f"model_impl is {model_impl!r}; it can be auto, native, transformers, or vllm for native.")
    native = ModelRegistry.has(files.architecture)
    if model_impl in ("native", "vllm") and not native:
        raise UnsupportedModelError(_no_native(files.architecture, list(ModelRegistry.architectures())))
    if native and model_impl != "transformers":
        return "native"
    if files.remote_code or _in_transformers(files.architecture):
        _check_task(files)
        return "transformers"
    raise UnsupportedModelError(_unknown(files))


def _in_transformers(architecture: str) -> bool:
    # Imported here: it takes a second, and native models are told apart without it.
    import transformers

    return hasattr(transformers, architecture)


def _check_task(files: ModelFiles) -> None:
    """Raise UnsupportedModelError for a class of the library that does not continue text."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = getattr(transformers, files.architecture, None)
    if files.remote_code or found is None or files.architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return
    if not issubclass(found, transformers.PreTrainedModel) or not found.can_generate():
        what = "does not write text (it may make vectors, classes or images)"
    elif getattr(files.config, "is_encoder_decoder", False):
        what = "has an encoder and a decoder, and quire runs models that are a decoder alone"
    else:
        return
    raise UnsupportedModelError(
        f"The model {files.name!r} is a {files.architecture!r}, which {what}. Choose one whose class ends in ForCausalLM; "
        'where the weights are those of one, name it with --hf-overrides \'{"architectures": ["...ForCausalLM"]}\'.'
    )


def _no_native(architecture: str, known: list[str]) -> str:
    return (
        f"There is no native class for {architecture!r}; native ones are {', '.join(sorted(known))}. "
        "Use --model-impl auto or transformers, or register a class with ModelRegistry.register_model."
    )


def _unknown(files: ModelFiles) -> str:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = sorted({*ModelRegistry.architectures(), *map(str, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())})
    near = difflib.get_close_matches(files.architecture, known, n=1)
    hint = f" The nearest known one is {near[0]!r}." if near else ""
    return (
        f"The model {files.name!r} is a {files.architecture!r}, which neither quire's registry nor the installed "
        f"transformers {transformers.__version__} knows.{hint} Upgrade transformers, register a class with "
        "ModelRegistry.register_model, or correct `architectures` with --hf-overrides."
    )

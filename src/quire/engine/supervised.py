"""An Engine whose core runs in a supervised process: the text side here, the model there.

Loads no model and needs none of what a model needs; only a tokenizer that Transformers must read brings torch along.
"""

from __future__ import annotations

from collections.abc import Callable

from quire.config import EngineOptions
from quire.engine import wire
from quire.engine.child import Child, ChildProcess
from quire.engine.engine import Engine
from quire.engine.observe import Observer
from quire.engine.shared_core import SharedCore
from quire.engine.supervisor import Patience, Supervisor
from quire.grammar import Grammars, Vocabulary
from quire.text.chat import read_template
from quire.text.tokenizer import Tokenizer, load_tokenizer


def start_supervised(
    options: EngineOptions,
    observer: Observer | None = None,
    on_phase: Callable[[str, float | None], None] | None = None,
    patience: Patience | None = None,
    new_process: Callable[[], Child] = ChildProcess,
) -> Engine:
    """Start the engine process; read the tokenizer while it loads the model. Raises ConfigError, ModelError or
    CapacityError, as a start in this process would.
    """
    supervisor = Supervisor(options, new_process, patience)
    supervisor.launch()
    return engine_over(supervisor, options, observer, on_phase)


def engine_over(
    core: Supervisor | SharedCore,
    options: EngineOptions,
    observer: Observer | None = None,
    on_phase: Callable[[str, float | None], None] | None = None,
) -> Engine:
    """The text side over a core in another process, which is being started. Raises what the start raises."""
    tokenizers: list[Tokenizer] = []

    def on_tokenizer(found: wire.Tokenizing) -> None:
        model = options.model
        template = read_template(model.chat_template)
        tokenizers.append(load_tokenizer(found.path, found.trust_remote_code, found.revision, model.hf_token, template))

    ready = core.start(on_phase, on_tokenizer)
    tokenizer = tokenizers[0] if tokenizers else None
    return Engine(core, tokenizer, ready.settings, observer, grammars=_grammars(ready, tokenizer))


def _grammars(ready: wire.Ready, tokenizer: Tokenizer | None) -> Grammars | None:
    """What refuses impossible structured outputs before they reach the engine; None where it knows no end token."""
    settings = ready.settings
    if tokenizer is None or not settings.eos_token_ids:
        return None
    vocabulary = Vocabulary(tokenizer, settings.vocab_size, settings.eos_token_ids)
    return Grammars(lambda: vocabulary)

"""Worker: one device's life: load a model, take memory for its pages, run plans, close.

An executor is the only caller. What is decided (how many pages, how many rows) comes from outside.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from quire.config import ModelOptions, Speculation
from quire.core.plan import GroupSpec, StepPlan, StepResult
from quire.errors import EngineError
from quire.grammar.compiler import Grammars
from quire.kernels import memory
from quire.kernels.table import Ops, load_ops
from quire.layers.spec import ModelLayout
from quire.models.build import build_model
from quire.models.files.hub import ModelFiles, OnShare
from quire.models.programs.proved import ProvedPrograms
from quire.models.programs.recorded import Plan, with_program
from quire.models.served import ServedModel
from quire.models.speculation.draft import DraftModel
from quire.models.speculation.eagle3 import FusedLayer
from quire.models.speculation.medusa import MedusaHeads
from quire.models.speculation.nextlayer import Head, NextLayer
from quire.models.speculation.open_model import KeepsStates, OpenModel
from quire.worker.device import Device, DeviceMemory
from quire.worker.draft import ModelDrafter
from quire.worker.drafter import Drafter, History
from quire.worker.governor import Governor
from quire.worker.heads import MedusaDrafter, NextLayerDrafter
from quire.worker.kvstore import KVStore
from quire.worker.ngram import NgramDrafter
from quire.worker.processors import find_processors
from quire.worker.runner import Runner
from quire.worker.sampler import Sampler
from quire.worker.slots import Slots
from quire.worker.speculate import Speculator
from quire.worker.suffix import SuffixDrafter

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker must know of the engine's configuration."""

    files: ModelFiles
    options: ModelOptions
    device: str
    dtype: torch.dtype
    cache_dtype: torch.dtype
    threads: int
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    speculation: Speculation | None = None
    draft: DraftModel | None = None  # for the method draft_model


class Worker:
    """load(), then configure(), then run() as often as wanted."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._device = Device(setup.device)
        self._ops: Ops = load_ops(setup.device)
        self._ops.set_threads(setup.threads)
        self._model: ServedModel | None = None
        self._draft: ServedModel | MedusaHeads | None = None
        self._states: KeepsStates | None = None  # the model, where its states are wanted
        self._runner: Runner | None = None

    def load(self, on_share: OnShare | None = None) -> ModelLayout:
        """Load the model and return its layout; `on_share` hears what share of it is loaded so far. Raises ModelError."""
        began = time.perf_counter()
        setup = self._setup
        with self._device.stream():
            where = self._device.torch_device
            self._model = build_model(setup.files, setup.options, setup.dtype, where, self._ops, on_share)
            if setup.draft is not None:
                self._load_draft(setup.draft, where)
        memory.AHEAD.give_back()
        logger.info("loaded %s in %.2f s", setup.files.name, time.perf_counter() - began)
        return self._model.layout

    def memory(self) -> DeviceMemory:
        """The device's memory as it is now."""
        return self._device.memory()

    def configure(self, groups: Sequence[GroupSpec], grammars: Grammars | None = None) -> None:
        """Take memory for the pages and get ready to run. Raises CapacityError.

        `grammars` compile structured outputs; a worker in the engine's process shares the engine's own.
        """
        if self._model is None:
            raise EngineError("configure() comes after load()")
        setup = self._setup
        with self._device.stream():
            store = KVStore(self._model.layout, groups, setup.cache_dtype, self._ops, self._device)
        slots = Slots(setup.max_num_seqs, setup.max_model_len, groups, self._device)
        mask_threads = max(1, setup.threads // 4)
        processors = find_processors(setup.options.logits_processors)
        sampler = Sampler(
            slots, self._ops, self._device, setup.options.logprobs_mode, grammars, processors, mask_threads
        )
        sampler.forms.takes_drafts = self._model.layout.takes_back
        with self._device.stream():
            speculator = self._speculator(slots, sampler)
        sizes = [0 if group.kind == "state" else group.page_size for group in groups]
        plan = Plan(sizes, min((group.num_pages for group in groups), default=0), store.caches)
        proved = ProvedPrograms(setup.files, (setup.dtype, setup.cache_dtype), setup.threads, self._ops)
        model = self._model
        if self._states is None:
            model = with_program(model, plan, self._ops, proved)
        else:
            states = self._states
            states.body = with_program(states.states_only, plan, self._ops, proved)
            states.whole = with_program(states.model, plan, self._ops, proved)
        self._runner = Runner(model, slots, store, sampler, self._device, setup.max_num_batched_tokens, speculator)

    def _load_draft(self, draft: DraftModel, where: torch.device) -> None:
        """Load what guesses; a model whose states it goes on from must keep them."""
        setup, model = self._setup, self._model
        assert setup.speculation is not None and model is not None, "a draft belongs to a model and a method"
        if setup.speculation.method == "draft_model":
            self._draft = build_model(draft.files, draft.options, setup.dtype, where, self._ops)
            return
        open_model = cast(OpenModel, model)
        if draft.taps:
            self._draft = FusedLayer(draft.files, open_model, len(draft.taps), setup.dtype, where, self._ops)
        elif draft.style is None:
            self._draft = MedusaHeads(draft.files, model.layout, setup.dtype, where, self._ops)
        elif draft.layout.tier == "native":
            self._draft = NextLayer(draft.files, draft.style, open_model, setup.dtype, where, self._ops)
        else:
            # Imported here, with the Transformers library: it takes seconds, and native models do without.
            from quire.models.speculation.nextlibrary import LibraryLayer

            self._draft = LibraryLayer(draft.files, draft.style, open_model, setup.dtype, where, self._ops)
        self._model = self._states = KeepsStates(open_model, draft.taps)

    def _speculator(self, slots: Slots, sampler: Sampler) -> Speculator | None:
        """What guesses tokens, as the configuration wants it."""
        wanted = self._setup.speculation
        if wanted is None:
            return None
        history = History(slots.num_slots, slots.width)
        governor = Governor() if wanted.adaptive else None
        drafter = self._drafter(wanted, history, slots, sampler)
        return Speculator(history, drafter, governor, self._states)

    def _drafter(self, wanted: Speculation, history: History, slots: Slots, sampler: Sampler) -> Drafter:
        setup, draft, device = self._setup, self._draft, self._device
        count, shortest, kept = wanted.num_speculative_tokens, wanted.prompt_lookup_min, setup.cache_dtype
        if wanted.method == "ngram":
            return NgramDrafter(history, count, shortest, wanted.prompt_lookup_max)
        if wanted.method == "suffix":
            depth, factor = wanted.suffix_decoding_max_tree_depth, wanted.suffix_decoding_max_spec_factor
            return SuffixDrafter(history, count, shortest, depth, factor)
        assert draft is not None and setup.draft is not None, "load() has loaded it"
        longest = setup.draft.longest
        if isinstance(draft, MedusaHeads):
            return MedusaDrafter(draft, history, sampler, setup.draft.layout.hidden_size, count, setup.dtype, device)
        if wanted.method == "draft_model":
            most = setup.max_num_batched_tokens
            return ModelDrafter(draft, history, slots, sampler, count, longest, kept, most, self._ops, device)
        head, dtype = cast(Head, draft), setup.dtype
        return NextLayerDrafter(head, history, slots, sampler, count, longest, dtype, kept, self._ops, device)

    def run(self, plan: StepPlan) -> StepResult:
        """Run one plan."""
        if self._runner is None:
            raise EngineError("run() comes after configure()")
        with self._device.stream():
            return self._runner.run(plan)

    def close(self) -> None:
        """Let go of the model and the pages."""
        self._runner = None
        self._model = self._draft = self._states = None

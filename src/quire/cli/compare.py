"""The comparison behind quire verify: runs Transformers first, then our model, on the same token ids.

One model is in memory at a time. Knows how to run one prompt through a ServedModel without an engine.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from quire import sizing
from quire.cli.verify import Report, VerifyOptions
from quire.config import EngineOptions
from quire.core.params import SamplingParams
from quire.core.plan import Admission, GroupSpec, PageGrant, Span
from quire.errors import ConfigError
from quire.kernels.table import load_ops
from quire.layers.norm import RMSNorm
from quire.models.build import build_model
from quire.models.native.decoder import NativeDecoder
from quire.models.served import ServedModel
from quire.resolve import EngineConfig, resolve
from quire.text.tokenizer import load_tokenizer
from quire.worker.batch import gather
from quire.worker.device import Device
from quire.worker.kvstore import KVStore
from quire.worker.slots import Slots

KL_TOLERANCE = {torch.float32: 1e-4}
TOP1_TOLERANCE = {torch.float32: 0.999}
LAYER_TOLERANCE = {torch.float32: 1e-3}
ROUGH_KL, ROUGH_TOP1, ROUGH_LAYER = 0.02, 0.95, 0.1  # for the 16-bit types
# What rounded weights may change: a share of the tokens where two were nearly as likely.
KL_INT8, TOP1_INT8 = 0.02, 0.93
KL_INT4, TOP1_INT4 = 0.15, 0.85
QUANTIZED_LAYER = 0.5


@dataclass(slots=True)
class Traces:
    """What one model made of all prompts, on the host in float32."""

    logits: list[torch.Tensor] = field(default_factory=list)  # [positions, V] per prompt
    layers: list[list[torch.Tensor]] = field(default_factory=list)  # [positions, H] per decoder layer per prompt


def compare(options: EngineOptions, wanted: VerifyOptions, texts: tuple[str, ...]) -> Report:
    """Run both models on all texts. Raises ConfigError for a model without weights or tokenizer to compare with."""
    if options.model.load_format == "dummy":
        raise ConfigError("--load-format dummy makes other random weights on each side; there is nothing to compare.")
    if options.model.max_model_len is None:
        options = replace(options, model=replace(options.model, max_model_len=-1))
    config = resolve(options)
    tokenizer = load_tokenizer(config.files.tokenizer, config.files.trust_remote_code, config.files.tokenizer_revision)
    prompts = [tokenizer.encode(text)[: config.max_model_len - 1] for text in texts]
    prompts = [ids for ids in prompts if ids]
    if not prompts:
        raise ConfigError("All prompts are empty; there is nothing to compare.")
    theirs = run_transformers(config, prompts)
    gc.collect()
    device = Device(config.device)
    ops = load_ops(config.device)
    ops.set_threads(config.threads)
    model = build_model(config.files, options.model, config.dtype, device.torch_device, ops)
    ours = run_served(model, config, prompts, wanted.chunk)
    return report_of(config, model, wanted, ours, theirs)


def run_transformers(config: EngineConfig, prompts: list[list[int]]) -> Traces:
    """The library's own model, with its plain attention."""
    files = config.files
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        files.folder, config=files.library_config, dtype=config.dtype, trust_remote_code=files.trust_remote_code
    )
    model = model.to(config.device).eval()
    traces = Traces()
    with torch.inference_mode(), Listener(model) as listener:
        for ids in prompts:
            listener.heard.clear()
            logits = model(torch.tensor([ids], device=config.device)).logits[0]
            traces.logits.append(logits.float().cpu())
            traces.layers.append([one.reshape(len(ids), -1).float().cpu() for one in listener.heard])
    return traces


def run_served(model: ServedModel, config: EngineConfig, prompts: list[list[int]], chunk: int | None) -> Traces:
    """Our model, prompt after prompt, in spans of `chunk` positions where the model allows spans at all."""
    device = Device(config.device)
    ops = load_ops(config.device)
    costs = sizing.group_costs(model.layout, config.block_size, config.cache_dtype, ops.cache_bytes)
    longest = max(map(len, prompts))
    groups = [
        GroupSpec(cost.kind, cost.page_size, 1 + cost.pages_for(longest, longest), cost.window)  # type: ignore[arg-type]
        for cost in costs
    ]
    store = KVStore(model.layout, groups, config.cache_dtype, ops, device)
    slots = Slots(1, longest + 1, groups, device)
    traces = Traces()
    with torch.inference_mode(), Listener(model) as listener:
        for ids in prompts:
            admission = Admission(0, "verify", tuple(ids), len(ids), SamplingParams(prompt_logprobs=0), 0)
            slots.admit(admission)
            slots.grant([PageGrant(0, index, 0, tuple(range(1, g.num_pages))) for index, g in enumerate(groups)])
            step = chunk if chunk and model.layout.chunked_prefill else len(ids)
            logits, layers = [], []
            for start in range(0, len(ids), step):
                count = min(step, len(ids) - start)
                listener.heard.clear()
                span = Span(0, start, count, start + count == len(ids))
                logits.append(model.forward(gather([span], slots, store.caches, device).batch).float().cpu())
                layers.append([one.reshape(count, -1).float().cpu() for one in listener.heard])
            model.release(0)
            slots.release(0)
            traces.logits.append(torch.cat(logits))
            traces.layers.append([torch.cat(parts) for parts in zip(*layers, strict=True)])
    return traces


class Listener:
    """Hears what each decoder layer hands on, in order, while it is entered."""

    def __init__(self, model: object) -> None:
        self.heard: list[torch.Tensor] = []
        self._model = model
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Listener:
        if isinstance(self._model, NativeDecoder):
            # Its layers leave the residual sum to the norm that follows.
            norms = [layer.input_norm for layer in self._model.layers[1:]] + [self._model.norm]
            self._undo = [self._wrap(norm) for norm in norms]
        else:
            self._undo = [layer.register_forward_hook(self._hook).remove for layer in decoder_layers(self._model)]
        return self

    def __exit__(self, *_: object) -> None:
        for undo in self._undo:
            undo()

    def _hook(self, module: nn.Module, inputs: object, output: object) -> None:
        self.heard.append(output[0] if isinstance(output, tuple) else output)

    def _wrap(self, norm: RMSNorm) -> Callable[[], None]:
        add = norm.add

        def listening(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            normed, whole = add(x, residual)
            self.heard.append(whole.clone())
            return normed, whole

        norm.__dict__["add"] = listening

        def undo() -> None:
            del norm.__dict__["add"]

        return undo


def decoder_layers(model: object) -> list[nn.Module]:
    """The children of the longest list of modules, which is the decoder; none when there is no such list."""
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(root, nn.Module):
        return []
    lists = [module for module in root.modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def report_of(config: EngineConfig, model: ServedModel, wanted: VerifyOptions, ours: Traces, theirs: Traces) -> Report:
    """The figures of the comparison."""
    a, b = torch.cat(ours.logits), torch.cat(theirs.logits)
    width = min(a.shape[1], b.shape[1])  # one side may pad the vocabulary
    a, b = a[:, :width], b[:, :width]
    difference = (a - b).abs()
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    kl = (log_b.exp() * (log_b - log_a)).sum(-1).clamp(min=0)
    layers = layer_differences(ours, theirs)
    limit = LAYER_TOLERANCE.get(config.dtype, ROUGH_LAYER)
    kl_limit = KL_TOLERANCE.get(config.dtype, ROUGH_KL)
    top1_limit = TOP1_TOLERANCE.get(config.dtype, ROUGH_TOP1)
    method = config.files.method
    if method is not None:
        limit = QUANTIZED_LAYER
        kl_limit = KL_INT8 if method.startswith("int8") else KL_INT4
        top1_limit = TOP1_INT8 if method.startswith("int8") else TOP1_INT4
    return Report(
        model=config.files.name,
        dtype=str(config.dtype).removeprefix("torch.") + (f" with {method} weights" if method else ""),
        path=config.model_impl,
        tier=model.layout.tier,
        positions=a.shape[0],
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        mean_kl=kl.mean().item(),
        max_kl=kl.max().item(),
        top1_agreement=(a.argmax(-1) == b.argmax(-1)).float().mean().item(),
        layers=layers,
        first_departing_layer=next((index for index, value in enumerate(layers) if value > limit), None),
        kl_tolerance=kl_limit if wanted.max_kl is None else wanted.max_kl,
        top1_tolerance=top1_limit if wanted.min_top1 is None else wanted.min_top1,
    )


def layer_differences(ours: Traces, theirs: Traces) -> tuple[float, ...]:
    """Per decoder layer the norm of the difference by the norm; empty when the layers do not correspond."""
    pairs = list(zip(ours.layers, theirs.layers, strict=True))
    if any(len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)) for a, b in pairs):
        return ()
    found = []
    for index in range(len(pairs[0][0])):
        apart = sum((a[index] - b[index]).square().sum() for a, b in pairs)
        whole = sum(b[index].square().sum() for _, b in pairs)
        found.append(math.sqrt(float(apart / whole)))
    return tuple(found)

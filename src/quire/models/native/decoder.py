"""One small decoder, from data, for Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE.

It is the yardstick that the Transformers path is measured against, so its step is as little Python as it can be.
What differs between the families is in FAMILIES and in the Shape read from the config, never in a branch per name.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, takewhile
from typing import Any, Literal

import torch
from torch import nn

from quire.errors import UnsupportedModelError
from quire.kernels import reference
from quire.kernels.programs import Opaque, without_step
from quire.kernels.table import Ops, ops_of
from quire.layers.batch import Batch
from quire.layers.embedding import Embedding
from quire.layers.linear import Linear
from quire.layers.mlp import GatedMLP
from quire.layers.moe import Experts, route
from quire.layers.norm import RMSNorm
from quire.layers.rope import Rotary
from quire.layers.spec import LayerSpec, ModelLayout
from quire.layers.target import Target
from quire.models.files.hub import ModelFiles
from quire.models.native.frequencies import LENGTH_ROPES, frequencies_of, rope_type
from quire.models.weights.checkpoint import Checkpoint, stream_weights
from quire.models.weights.load import LEFTOVERS, LoadReport, LoadRules, dummy_weights, load_into
from quire.quant.format import full_ops, head_ops

logger = logging.getLogger(__name__)

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True, slots=True)
class Family:
    """What one architecture does that others do not. A string names the config's field that decides."""

    qkv_bias: bool | str = False
    output_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "all", "by layer type"] = "none"
    experts: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(qkv_bias="attention_bias", output_bias="attention_bias", mlp_bias="mlp_bias"),
    "MistralForCausalLM": Family(windows="all"),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="by layer type"),
    "Qwen3ForCausalLM": Family("attention_bias", "attention_bias", qk_norm=True, windows="by layer type"),
    "Qwen3MoeForCausalLM": Family("attention_bias", "attention_bias", qk_norm=True, windows="all", experts=True),
}


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The experts of a layer that has them."""

    count: int
    inner: int
    choices: int
    renormalize: bool


@dataclass(frozen=True, slots=True)
class Shape:
    """Everything the decoder is built from."""

    vocab: int
    size: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    activation: str
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int | None, ...]  # one entry per layer
    experts: tuple[ExpertShape | None, ...]  # one entry per layer; None is a dense one


def shape_of(architecture: str, config: Any) -> Shape:
    """The decoder's shape from a config. Raises UnsupportedModelError for what it cannot compute."""
    family = FAMILIES[architecture]
    layers = config.num_hidden_layers
    if config.hidden_act not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"The native {architecture} has no activation {config.hidden_act!r}; it has {', '.join(ACTIVATIONS)}. "
            "Use --model-impl transformers."
        )

    def flag(value: bool | str) -> bool:
        return bool(getattr(config, value)) if isinstance(value, str) else value

    return Shape(
        vocab=config.vocab_size,
        size=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads,
        inner=config.intermediate_size,
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[config.hidden_act],
        qkv_bias=flag(family.qkv_bias),
        output_bias=flag(family.output_bias),
        mlp_bias=flag(family.mlp_bias),
        qk_norm=family.qk_norm,
        tied=bool(config.tie_word_embeddings),
        windows=_windows(family, config, layers),
        experts=tuple(_experts(family, config, index) for index in range(layers)),
    )


def _windows(family: Family, config: Any, layers: int) -> tuple[int | None, ...]:
    window = config.sliding_window if family.windows != "none" else None
    if window is None or family.windows == "all":
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)


def _experts(family: Family, config: Any, index: int) -> ExpertShape | None:
    if not family.experts or index in config.mlp_only_layers or (index + 1) % config.decoder_sparse_step:
        return None
    return ExpertShape(
        count=config.num_experts,
        inner=config.moe_intermediate_size,
        choices=config.num_experts_per_tok,
        renormalize=config.norm_topk_prob,
    )


def native_layout(architecture: str, config: Any) -> ModelLayout:
    """What memory the decoder's layers need, from the config alone."""
    shape = shape_of(architecture, config)
    groups = {window: group for group, window in enumerate(dict.fromkeys(shape.windows))}
    layers = tuple(
        LayerSpec(
            name=f"model.layers.{index}.self_attn",
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            key_dim=shape.head_dim,
            value_dim=shape.head_dim,
            scale=shape.head_dim**-0.5,
            window=window,
            group=groups[window],
        )
        for index, window in enumerate(shape.windows)
    )
    kind = rope_type(config)
    notes = (f"rope of type {kind} depends on the prompt's length: prompts share no pages",)
    return ModelLayout(
        layers=layers,
        vocab_size=shape.vocab,
        hidden_size=shape.size,
        tier="native",
        prefix_caching=kind not in LENGTH_ROPES,
        notes=notes if kind in LENGTH_ROPES else (),
    )


def native_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight that the config asks for, without memory for any."""
    decoder = NativeDecoder(files, torch.bfloat16, torch.device("meta"), ops_of(reference))
    shapes = {name: target.shape for name, target in decoder.targets().items()}
    if decoder.shape.tied:
        del shapes["lm_head.weight"]
    return shapes


# ---------------------------------------------------------------- the decoder


class MoE(nn.Module):
    """A router and its experts in place of a dense block."""

    def __init__(
        self, ops: Ops, size: int, shape: ExpertShape, activation: str, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.router = Linear(full_ops(ops), size, (shape.count,), False, dtype, device)
        self.experts = Experts(ops, shape.count, size, shape.inner, activation, dtype, device)
        self.choices = shape.choices
        self.renormalize = shape.renormalize

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, size] -> [T, size]."""
        chosen, weights = route(self.router.forward(x), self.choices, self.renormalize)
        return self.experts.forward(x, chosen, weights)


class Layer(nn.Module):
    """One decoder layer. Its forward leaves the residual sum to the norms, which fuse it."""

    def __init__(
        self, ops: Ops, shape: Shape, spec: LayerSpec, index: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.spec, self.index, self.eps = spec, index, shape.eps
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        query, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        norm = partial(RMSNorm, ops, eps=shape.eps, style="down_then_scale", dtype=dtype, device=device)
        self.input_norm, self.post_norm = norm(size=shape.size), norm(size=shape.size)
        self.qkv = Linear(ops, shape.size, (query, keys, keys), shape.qkv_bias, dtype, device)
        self.output = Linear(ops, query, (shape.size,), shape.output_bias, dtype, device)
        self.query_norm = norm(size=shape.head_dim) if shape.qk_norm else None
        self.key_norm = norm(size=shape.head_dim) if shape.qk_norm else None
        experts = shape.experts[index]
        self.mlp: GatedMLP | MoE
        if experts is None:
            self.mlp = GatedMLP(ops, shape.size, shape.inner, shape.activation, shape.mlp_bias, dtype, device)
        else:
            self.mlp = MoE(ops, shape.size, experts, shape.activation, dtype, device)
        self._rotary_write, self._attention = ops.rotary_write, ops.attention

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Normed hidden states [T, size] -> attention output [T, size]; writes this layer's keys and values."""
        group, cache = batch.groups[self.spec.group], batch.caches[self.index]
        heads = self.qkv.forward(x).view(x.shape[0], -1, self.head_dim)
        query, key, value = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm.forward(query), self.key_norm.forward(key)
        query = self._rotary_write(query, key, value, cos, sin, "half", cache, group.slots)
        spec = self.spec
        out = self._attention(query, cache, group.tables, batch.starts, batch.lengths, spec.scale, window=spec.window)
        return self.output.forward(out.view(x.shape[0], -1))

    def targets(self) -> dict[str, Target]:
        """Checkpoint names below the layer's own -> targets."""
        found = {
            "input_layernorm.weight": self.input_norm.weight_target(),
            "post_attention_layernorm.weight": self.post_norm.weight_target(),
            **_merged("self_attn.", ("q_proj", "k_proj", "v_proj"), self.qkv),
            **_merged("self_attn.", ("o_proj",), self.output),
        }
        if self.query_norm is not None and self.key_norm is not None:
            found["self_attn.q_norm.weight"] = self.query_norm.weight_target()
            found["self_attn.k_norm.weight"] = self.key_norm.weight_target()
        if isinstance(self.mlp, GatedMLP):
            return {**found, **_mlp_targets("mlp.", self.mlp)}
        found.update(_merged("mlp.", ("gate",), self.mlp.router))
        for number, block in enumerate(self.mlp.experts.blocks):
            assert isinstance(block, GatedMLP)
            found.update(_mlp_targets(f"mlp.experts.{number}.", block))
        return found


def _merged(prefix: str, names: tuple[str, ...], linear: Linear) -> dict[str, Target]:
    """Targets of the siblings that a linear merges, by their names in the checkpoint."""
    found = {f"{prefix}{name}.weight": linear.weight_target(i) for i, name in enumerate(names)}
    if linear.has_bias:
        found.update({f"{prefix}{name}.bias": linear.bias_target(i) for i, name in enumerate(names)})
    return found


def _mlp_targets(prefix: str, mlp: GatedMLP) -> dict[str, Target]:
    return {**_merged(prefix, ("gate_proj", "up_proj"), mlp.gate_up), **_merged(prefix, ("down_proj",), mlp.down)}


def opaque_experts(layers: Sequence[Layer]) -> list[Opaque]:
    """Experts look at numbers while they run, unless one native call does it all."""
    experts = [layer.mlp.experts for layer in layers if isinstance(layer.mlp, MoE)]
    return [Opaque(one.__dict__, "forward", without_step(one.forward)) for one in experts if one.stack is None]


def spare_layers(names: Container[str], layers: int) -> tuple[str, ...]:
    """Patterns of those of a checkpoint's names that belong to layers that guess (models/speculation/nextlayer.py).

    Those behind the model's own `layers` are told by their joins; without one it is a layer for which the config has no
    place.
    """
    behind = takewhile(lambda prefix: f"{prefix}eh_proj.weight" in names, map("model.layers.{}.".format, count(layers)))
    return (r"^mtp\.", r"^model\.mtp_layers\.", *(f"^{re.escape(prefix)}" for prefix in behind))


class NativeDecoder:
    """A ServedModel. Weights are empty until `load`."""

    def __init__(self, files: ModelFiles, dtype: torch.dtype, device: torch.device, ops: Ops) -> None:
        self.hf_config = files.config
        self.layout = native_layout(files.architecture, files.config)
        shape = self.shape = shape_of(files.architecture, files.config)
        self.embedding = Embedding(shape.vocab, shape.size, dtype, device)
        self.layers = [Layer(ops, shape, spec, index, dtype, device) for index, spec in enumerate(self.layout.layers)]
        self.norm = RMSNorm(ops, shape.size, shape.eps, "down_then_scale", dtype, device)
        self.head = Linear(head_ops(ops), shape.size, (shape.vocab,), False, dtype, device)
        self.rotary = Rotary(frequencies_of(files.config, shape.head_dim), "half", dtype, device)
        # The norm that follows each layer's residual sum: the next layer's first, and the model's last.
        self._next_norms = [layer.input_norm for layer in self.layers[1:]] + [self.norm]

    @classmethod
    def layout_of(cls, files: ModelFiles) -> ModelLayout:
        """What its layers need, without building it."""
        return native_layout(files.architecture, files.config)

    def targets(self) -> dict[str, Target]:
        """Every weight by its checkpoint name."""
        found = {
            "model.embed_tokens.weight": self.embedding.weight_target(),
            "model.norm.weight": self.norm.weight_target(),
            "lm_head.weight": self.head.weight_target(),
        }
        for index, layer in enumerate(self.layers):
            found.update({f"model.layers.{index}.{name}": target for name, target in layer.targets().items()})
        return found

    def load(self, files: ModelFiles, seed: int) -> LoadReport:
        """Read and pack all weights, or make random ones. Raises CheckpointError naming file and tensor."""
        report = self._load(files, seed)
        logger.info("%d tensors, %.2f GB in %.2f s", report.tensors, report.nbytes / 1e9, report.seconds)
        return report

    def _load(self, files: ModelFiles, seed: int) -> LoadReport:
        targets = self.targets()
        tied = {"lm_head.weight": "model.embed_tokens.weight"} if self.shape.tied else {}
        if files.weight_format == "dummy":
            own = {name: target for name, target in targets.items() if name not in tied}
            return load_into(targets, dummy_weights(own, seed), LoadRules(tied=tied))
        checkpoint = Checkpoint(files)
        # A checkpoint of the bare model, without its head, has no "model." before its names.
        rules = LoadRules(
            rename=lambda name: name if name in targets or f"model.{name}" not in targets else f"model.{name}",
            tied=tied,
            ignored=(*LEFTOVERS, *spare_layers(checkpoint.headers, len(self.layers))),
            origin=checkpoint.where,
        )
        report = load_into(targets, stream_weights(checkpoint), rules)
        checkpoint.sweep()  # once more: a tied weight has been read again
        return report

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits [R, V] of batch.logit_rows; see ServedModel."""
        return self.score(self.states(batch, batch.logit_rows))

    @torch.no_grad()
    def states(self, batch: Batch, rows: torch.Tensor | None = None, taps: Sequence[int] = ()) -> torch.Tensor:
        """See OpenModel."""
        read: dict[int, torch.Tensor] = {}
        cos, sin = self.rotary.tables(batch)
        residual = self.embed(batch.token_ids)
        hidden = self.layers[0].input_norm.forward(residual)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            if index in taps:
                read[index] = residual
            hidden = layer.attend(hidden, cos, sin, batch)
            if index == last and rows is not None:
                # Only these rows are wanted, and nothing after this looks at other rows.
                hidden = hidden.index_select(0, rows)
                residual = residual.index_select(0, rows)
            hidden, residual = layer.post_norm.add(hidden, residual)
            hidden, residual = self._next_norms[index].add(layer.mlp.forward(hidden), residual)
        return torch.cat([hidden, *(read[tap] for tap in taps)], dim=-1) if taps else hidden

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [T] -> what the first layer reads [T, size]."""
        return self.embedding.forward(ids)

    @torch.no_grad()
    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, size] -> logits [R, V]."""
        return self.head.forward(states)

    def opaque(self) -> list[Opaque]:
        """See models/programs/recorded.py."""
        return opaque_experts(self.layers)

    def release(self, slot: int) -> None:
        """Nothing is kept outside the caches."""

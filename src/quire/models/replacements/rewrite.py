"""The replacements: proposed from what was observed on the twin, carried out on any model of the same classes.

`propose` looks, `rewrite` acts; whether a proposal holds is proved elsewhere. Whatever is doubtful is not proposed.
"""

from __future__ import annotations

import sys
import types
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quire.kernels.table import Ops
from quire.layers.latent import LatentProjection
from quire.layers.linear import Linear
from quire.layers.target import Target
from quire.models.replacements.experts import PackedExperts, is_experts, set_experts
from quire.models.replacements.latent import EXPAND, latent_sizes, propose_latent
from quire.models.replacements.replaced import (
    GatedForward,
    KeptLatents,
    LayerNormForward,
    MergedLinear,
    MergedView,
    NormForward,
    OwnProduct,
    RotaryForward,
)
from quire.models.transformers.report import RewritePlan, class_key
from quire.models.twin.numeric import gated_of, is_layer_norm, rms_norm_of, rotary_of
from quire.models.twin.observe import Observation
from quire.quant.format import ROUTERS, full_ops, head_ops

ROTARY = "apply_rotary_pos_emb"
FUNCTIONS = "F"  # what the library calls torch.nn.functional
WIDE = {"float32", "float"}  # a forward that uses one of these names computes in float32

# ---------------------------------------------------------------- looking


def propose(model: nn.Module, seen: Observation, ops: Ops) -> RewritePlan:
    """Every replacement that what was seen on this twin speaks for."""
    merged = _propose_merged(model, seen)
    plan = RewritePlan(merged=merged, linears=_propose_linears(model, seen), latent=propose_latent(model, seen))
    attention = {call.module for call in seen.attention}
    for name, module in model.named_modules():
        key = class_key(module)
        if key in plan.norms or key in plan.gated or key in plan.rotary:
            continue
        if type(module) is nn.LayerNorm:
            if is_layer_norm(module, ops):
                plan.norms[key] = {"style": "layer_norm"}
        elif not type(module).__module__.startswith("torch.") and not list(module.children()):
            norm = rms_norm_of(module, ops)
            if norm is not None:
                plan.norms[key] = norm
        gated = gated_of(module)
        if gated is not None and _gated_fits(key, gated, plan):
            plan.gated[key] = gated
        if name in attention:
            style = _propose_rotary(module)
            if style is not None:
                plan.rotary[key] = style
        if is_experts(module) and key not in plan.experts:
            plan.experts.append(key)
        if _multiplies_own_weight(module) and key not in plan.products:
            plan.products.append(key)
    return plan


def _gated_fits(key: str, gated: dict[str, Any], plan: RewritePlan) -> bool:
    """Whether the plan replaces the linears that the block joins, gate and up as one."""
    names = gated["gate_up"]
    replaced = all(f"{key}.{child}" in plan.linears for child in (*names, gated["down"]))
    return replaced and (len(names) == 1 or names in plan.merged.get(key, []))


def _propose_linears(model: nn.Module, seen: Observation) -> list[str]:
    """Linears of a kind (parent class and name) that are called, and whose weight nobody else reads."""
    found: dict[str, bool] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D):
            key = f"{class_key(model.get_submodule(name.rpartition('.')[0]))}.{name.rpartition('.')[2]}"
            found[key] = found.get(key, True) and name not in seen.weight_reads
    return sorted(key for key, fine in found.items() if fine)


def _propose_merged(model: nn.Module, seen: Observation) -> dict[str, list[list[str]]]:
    """Groups of siblings that read the same tensor in every instance of their parent's class."""
    by_class: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for group in seen.siblings:
        parent = model.get_submodule(group[0].rpartition(".")[0])
        by_class[class_key(parent)].add(tuple(name.rpartition(".")[2] for name in group))
    observed = set(seen.siblings)
    plan: dict[str, list[list[str]]] = {}
    for key, groups in by_class.items():
        children = [child for group in groups for child in group]
        kept = [
            list(group)
            for group in sorted(groups)
            if all(children.count(child) == 1 for child in group)
            and all(
                _group_holds(name, module, group, observed, seen)
                for name, module in model.named_modules()
                if class_key(module) == key
            )
        ]
        if kept:
            plan[key] = kept
    return plan


def _group_holds(
    name: str, parent: nn.Module, group: tuple[str, ...], observed: set[tuple[str, ...]], seen: Observation
) -> bool:
    """Whether merging the group in this instance is right: seen so, or not there as a whole, or not called."""
    names = tuple(f"{name}.{child}" if name else child for child in group)
    if names in observed:
        return not any(child in seen.weight_reads for child in names)
    linears = [getattr(parent, child, None) for child in group]
    return any(type(child) is not nn.Linear for child in linears) or not any(seen.linear_calls[n] for n in names)


def _propose_rotary(module: nn.Module) -> str | None:
    """The style of the rotary function that this attention module's forward calls by its usual name."""
    called = _global_of(module, ROTARY)
    return rotary_of(called) if called is not None else None


def _multiplies_own_weight(module: nn.Module) -> bool:
    """Whether its forward hands its only matrix to torch's function instead of being a linear, as routers do."""
    if isinstance(module, nn.Linear) or type(module).__module__.startswith("torch.") or list(module.children()):
        return False
    matrices = [name for name, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 1]
    return matrices == ["weight"] and module._parameters["weight"].dim() == 2 and _calls_linear(module)


def _calls_linear(module: nn.Module) -> bool:
    return _global_of(module, FUNCTIONS) is functional and {"linear", "weight"} <= set(_names_in_forward(module))


def _names_in_forward(module: nn.Module) -> tuple[str, ...]:
    """The globals and attributes that the class's forward uses; none where it is no plain function."""
    function = getattr(type(module), "forward", None)
    return function.__code__.co_names if isinstance(function, types.FunctionType) else ()


def _global_of(module: nn.Module, name: str) -> Any:
    """What its forward finds under a name of its file; None where it does not use it."""
    return type(module).forward.__globals__.get(name) if name in _names_in_forward(module) else None


# ---------------------------------------------------------------- acting


def rewrite(
    model: nn.Module, plan: RewritePlan, ops: Ops, targets: dict[str, Target], device: torch.device | str
) -> dict[str, Target]:
    """Replace modules in place; returns the targets that take the place of the replaced parameters' own.

    `targets` are those of the model as it is; they say each parameter's dtype. The weights come afterwards.
    """
    return _Rewriter(model, plan, ops, targets, torch.device(device)).run()


class _Rewriter:
    def __init__(
        self, model: nn.Module, plan: RewritePlan, ops: Ops, targets: dict[str, Target], device: torch.device
    ) -> None:
        self._model = model
        self._plan = plan
        self._ops = ops
        self._given = targets
        self._device = device
        self._head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        self._new: dict[str, Target] = {}

    def run(self) -> dict[str, Target]:
        linears = set(self._plan.linears)
        experts = []
        for name, module in list(self._model.named_modules()):
            key = class_key(module)
            prefix = f"{name}." if name else ""
            if key in self._plan.latent:
                self._keep_latents(module, prefix, self._plan.latent[key])
            gate_up = {}
            for group in self._plan.merged.get(key, ()):
                merged = self._merge(module, prefix, group)
                if merged is not None:
                    gate_up[tuple(group)] = merged
            for child, original in list(module.named_children()):
                if f"{key}.{child}" in linears and type(original) in (nn.Linear, Conv1D):
                    self._replace_linear(module, prefix, child, original)
            if key in self._plan.norms:
                self._replace_norm(module, self._plan.norms[key])
            if key in self._plan.gated:
                self._replace_gated(module, self._plan.gated[key], gate_up)
            if key in self._plan.rotary:
                replace_rotary(module, self._plan.rotary[key], self._ops)
            if key in self._plan.products and _multiplies_own_weight(module):
                self._replace_product(module, f"{prefix}weight")
            if key in self._plan.experts and is_experts(module):
                packed = PackedExperts(module, self._ops)
                self._new.update(packed.targets(module, name, self._given))
                for parameter in packed.names:
                    module._parameters.pop(parameter)
                module.__dict__["quire_experts"] = packed
                experts.append(module)
        set_experts(experts)
        return self._new

    def _merge(self, parent: nn.Module, prefix: str, group: list[str]) -> Linear | None:
        """Merge siblings where all are there and agree in input and dtype."""
        children: list[Any] = [getattr(parent, child, None) for child in group]
        if any(type(child) is not nn.Linear for child in children):
            return None
        dtypes = {self._given[f"{prefix}{child}.weight"].dtype for child in group}
        if len({child.in_features for child in children}) != 1 or len(dtypes) != 1:
            return None
        bias = any(child.bias is not None for child in children)
        sizes = [child.out_features for child in children]
        linear = self._linear(children[0].in_features, sizes, bias, dtypes.pop(), self._ops)
        owner = MergedLinear(linear)
        for index, (name, child) in enumerate(zip(group, children, strict=True)):
            self._new[f"{prefix}{name}.weight"] = linear.weight_target(index)
            if child.bias is not None:
                self._new[f"{prefix}{name}.bias"] = linear.bias_target(index)
            elif bias:
                linear.fill_bias_shard(index)
            setattr(parent, name, MergedView(owner, index, child))
        return linear

    def _replace_linear(self, parent: nn.Module, prefix: str, name: str, original: nn.Module) -> None:
        weight = self._given[f"{prefix}{name}.weight"]
        transposed = type(original) is Conv1D
        inputs, outputs = weight.shape if transposed else weight.shape[::-1]
        linear = self._linear(inputs, [outputs], original.bias is not None, weight.dtype, self._ops_for(name, original))
        target = linear.weight_target()
        if transposed:
            target = Target(weight.shape, weight.dtype, lambda tensor: linear.load_weight(tensor.T.contiguous()))
        self._new[f"{prefix}{name}.weight"] = target
        if original.bias is not None:
            self._new[f"{prefix}{name}.bias"] = linear.bias_target()
        setattr(parent, name, linear)

    def _keep_latents(self, module: nn.Module, prefix: str, name: str) -> None:
        sizes, dtype = latent_sizes(module, name), self._given[f"{prefix}{name}.weight"].dtype
        shape = (sizes.heads, sizes.rank, sizes.key_dim, sizes.value_dim)
        projection = LatentProjection(self._ops, *shape, dtype, self._device)
        self._new[f"{prefix}{name}.weight"] = projection.weight_target()
        setattr(module, name, projection)
        module.__dict__[EXPAND] = KeptLatents()

    def _replace_product(self, module: nn.Module, name: str) -> None:
        """The parameter stays, because the library's code reads it; the product is made with a packed copy."""
        given = self._given[name]
        outputs, inputs = given.shape
        dtype = torch.float32 if WIDE & set(_names_in_forward(module)) else given.dtype
        linear = self._linear(inputs, [outputs], False, dtype, full_ops(self._ops))

        def load(tensor: Any) -> torch.Tensor | None:
            stored = given.load(tensor)
            linear.load_weight(tensor if stored is None else stored)
            return stored

        self._new[name] = Target(given.shape, given.dtype, load)
        replace_global(module, FUNCTIONS, OwnProduct(linear))

    def _ops_for(self, name: str, original: nn.Module) -> Ops:
        """The ops of one linear: the output matrix and routers may be stored in another format than the others."""
        if name in ROUTERS:
            return full_ops(self._ops)
        return head_ops(self._ops) if original is self._head else self._ops

    def _linear(self, inputs: int, sizes: list[int], bias: bool, dtype: torch.dtype, ops: Ops) -> Linear:
        linear = Linear(ops, inputs, sizes, bias, dtype, self._device)
        linear.__dict__["forward"] = linear.forward  # found without a walk over the classes
        return linear

    def _replace_norm(self, module: nn.Module, found: dict[str, Any]) -> None:
        if found["style"] == "layer_norm":
            if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1:
                module.__dict__["forward"] = LayerNormForward(module, self._ops)
            return
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        if own != ([found["weight"]] if found["weight"] else []):
            return  # an instance of the class with another set of parameters than the one that was tried
        eps = getattr(module, found["eps"]) if isinstance(found["eps"], str) else found["eps"]
        module.__dict__["forward"] = NormForward(module, self._ops, found["weight"], eps, found["style"])

    def _replace_gated(self, module: nn.Module, found: dict[str, Any], merged: dict[tuple[str, ...], Linear]) -> None:
        names = tuple(found["gate_up"])
        gate_up = merged.get(names) if len(names) == 2 else getattr(module, names[0], None)
        down = getattr(module, found["down"], None)
        if isinstance(gate_up, Linear) and isinstance(down, Linear):
            module.__dict__["forward"] = GatedForward(
                gate_up, down, self._ops, found["activation"], found["gate_first"]
            )


def replace_rotary(module: nn.Module, style: str, ops: Ops) -> None:
    """Give this instance's forward a rotary of ours."""
    replace_global(module, ROTARY, RotaryForward(ops, style))


def replace_global(module: nn.Module, name: str, value: Any) -> None:
    """Let this instance's forward find `value` under a name of its file: the same code, in a copy of the file's names."""
    original = type(module).forward
    names = dict(vars(sys.modules[original.__module__]))
    names[name] = value
    forward = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    forward.__kwdefaults__ = original.__kwdefaults__
    module.__dict__["forward"] = types.MethodType(forward, module)

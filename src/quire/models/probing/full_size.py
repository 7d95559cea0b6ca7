"""Observes one step of a full-size model that has no weights: on meta, or where its code needs numbers, on empty memory.

Empty memory costs nothing: pages that were never written are not there. Only sizes are learnt, never values.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from torch.fx.experimental import _config as fx_config
from torch.overrides import TorchFunctionMode

from quire.errors import UnsupportedModelError
from quire.models.probing.decide import describe, observed_arguments
from quire.models.replacements.experts import is_experts, set_experts
from quire.models.transformers.interface import SPEC
from quire.models.transformers.report import class_key
from quire.models.twin.observe import ModelObserver, Observation

logger = logging.getLogger(__name__)


def observe_full(model: nn.Module, implementation: str, twin: Observation) -> Observation:
    """What one step of `model`, built on meta, does. Raises UnsupportedModelError for what its twin did not do.

    The model may be on empty CPU memory afterwards.
    """
    set_experts([module for module in model.modules() if is_experts(module)])
    observer = ModelObserver(model, model.config, with_linears=False)
    try:
        with torch.device("meta"), _without_numbers(), shortened(model, twin):
            seen = observer.run(observed_arguments(model, observer, "meta"), implementation)
    except Exception as error:  # some code branches on values
        logger.info("observing on empty memory, because meta does not do: %s", error)
        for module in model.modules():
            if is_experts(module):
                module.config._experts_implementation = "eager"
        model.to_empty(device="cpu")
        observer = ModelObserver(model, model.config, with_linears=False)
        seen = observer.run(observed_arguments(model, observer), implementation)
    if observer.problems and implementation == SPEC:
        raise UnsupportedModelError(
            f"The full-size model does what its tiny twin did not: {describe(model, observer.problems)}."
        )
    return seen


@contextlib.contextmanager
def shortened(model: nn.Module, twin: Observation) -> Iterator[None]:
    """Blocks that only turn a tensor into one of the same shape, and have nothing to do with the cache, do just that.

    In most models that is all of the feed-forward part, experts included, where most of the time would go. Afterwards
    they are as before: the library shares some modules, such as activations, among all its models.
    """
    users = [name for name, module in model.named_modules() if class_key(module) in twin.user_classes]
    around = {name.rsplit(".", depth)[0] for name in users for depth in range(1, name.count(".") + 1)} | {"", *users}
    inside = tuple(f"{name}." for name in users)
    changed = []
    for name, module in model.named_modules():
        own = not type(module).__module__.startswith("torch.")
        if own and name not in around and not name.startswith(inside) and twin.mirrors.get(class_key(module)):
            module.__dict__["forward"] = _same_shape
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.__dict__["forward"]


def _same_shape(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return torch.empty_like(x)


def try_observe(model: nn.Module, twin: Observation) -> Observation:
    """The same where only memory figures depend on it: nothing seen when the model cannot be observed."""
    try:
        return observe_full(model, "eager", twin)
    except Exception as error:
        logger.info("the keys of %s cannot be counted: %s", type(model).__name__, error)
        return Observation()


@contextlib.contextmanager
def _without_numbers() -> Iterator[None]:
    """Let code run on tensors without numbers: nonzero() takes all as set, distributions do not check their input."""
    nonzero, checks = fx_config.meta_nonzero_assume_all_nonzero, Distribution._validate_args
    fx_config.meta_nonzero_assume_all_nonzero = True
    Distribution.set_default_validate_args(False)
    try:
        with _NumberlessMode():
            yield
    finally:
        fx_config.meta_nonzero_assume_all_nonzero = nonzero
        Distribution.set_default_validate_args(checks)


class _NumberlessMode(TorchFunctionMode):
    """Answers code that asks a tensor without numbers for one: 1, and False for a condition."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _NUMBERS and args[0].is_meta:
            return _NUMBERS[function] if args[0].dtype is not torch.bool else False
        return function(*args, **(kwargs or {}))


_NUMBERS: dict[Any, Any] = {
    torch.Tensor.item: 1,
    torch.Tensor.__int__: 1,
    torch.Tensor.__float__: 1.0,
    torch.Tensor.__bool__: False,
    torch.Tensor.__contains__: False,
}

"""What lies inside a Transformers model, shown without a change to its code: what layers read, and what comes behind the
body, from its last states to the logits. It knows no step and no head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from quire.errors import UnsupportedModelError


def layers_of(model: Any) -> Sequence[nn.Module]:
    """The decoder layers of a model. Raises UnsupportedModelError where they do not lie in one list."""
    decoder = model.get_decoder()
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    found = [one for one in lists if len(one) == model.config.get_text_config().num_hidden_layers]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not have its layers in one list, so an EAGLE-3 head cannot read along with "
            "them. Take ngram, suffix or draft_model."
        )
    return found[0]


class Tapped:
    """`with Tapped(layers, numbers) as read`: what the layers of these numbers read, [T, size] each."""

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]) -> None:
        self._layers = {tap: layers[tap] for tap in taps}
        self._handles: list[Any] = []

    def __enter__(self) -> dict[int, torch.Tensor]:
        read: dict[int, torch.Tensor] = {}
        for tap, layer in self._layers.items():

            def keep(_: nn.Module, args: Any, kwargs: Any, tap: int = tap) -> None:
                read[tap] = (args[0] if args else kwargs["hidden_states"])[0]

            self._handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        return read

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()


class AroundBody:
    """A model whose body answers with given states: what its code does with them is the way to the logits.

    Shares all other modules, and so all weights, with the model.
    """

    def __init__(self, model: Any) -> None:
        self._states = _GivenStates()
        self._model = copy.copy(model)
        self._model._modules = {**model._modules, model.base_model_prefix: self._states}

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Last hidden states [R, size] -> logits [R, V]."""
        self._states.given = states[None]
        output = self._model(input_ids=torch.zeros(1, states.shape[0], dtype=torch.int64, device=states.device))
        return (output.logits if hasattr(output, "logits") else output[0])[0]


class _GivenStates(nn.Module):
    """In place of a body."""

    def __init__(self) -> None:
        super().__init__()
        self.given: torch.Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Answer(self.given)


class _Answer:
    """What a body returns: its last states, and none of the other things that may be asked for."""

    def __init__(self, states: torch.Tensor | None) -> None:
        self.last_hidden_state = states

    def __getitem__(self, index: int) -> torch.Tensor | None:
        return self.last_hidden_state if index == 0 else None

    def __getattr__(self, name: str) -> None:
        return None

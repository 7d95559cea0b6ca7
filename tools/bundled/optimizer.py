"""Muon for the hidden matrices, AdamW for the rest: at this size Muon learns more from each token than AdamW alone.

Muon (Keller Jordan, 2024) steps along the nearest orthogonal matrix to the momentum, found by Newton and Schulz.
"""

from collections import defaultdict

import torch

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized. Matrices of one shape are worked on together, to spare small multiplications."""

    def __init__(
        self, parameters: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                by_shape[parameter.shape].append(parameter)
            for parameters in by_shape.values():
                self._step_together(parameters, group)

    def _step_together(self, parameters: list[torch.nn.Parameter], group: dict[str, float]) -> None:
        ahead = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            ahead.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
        rows, columns = parameters[0].shape
        scale = max(1.0, rows / columns) ** 0.5
        for parameter, direction in zip(parameters, orthogonal(torch.stack(ahead)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * scale)


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest orthogonal matrix to each of [n, rows, columns]: singular values end between 0.7 and 1.2."""
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


def optimizers_for(model: torch.nn.Module, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Hidden matrices to Muon; the embedding, which is the head too, and the norms to AdamW."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed_tokens" in name]
    return [
        Muon(hidden, lr=muon_rate),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
    ]

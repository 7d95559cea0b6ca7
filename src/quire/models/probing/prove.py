"""Proves the replacements: all of them together on the twin, where that fails each kind, where that fails each entry.

A replacement holds when the twin, served with it, stays as close to the unmodified twin as it was without it. One that
does not hold is left out with a log line; that is never an error.
"""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from functools import reduce
from typing import Any

from torch import nn

from quire.kernels.table import Ops
from quire.layers.target import Target
from quire.models.probing.decide import TOLERANCE, Decider, Decision
from quire.models.replacements.latent import with_latents
from quire.models.replacements.rewrite import propose, rewrite
from quire.models.transformers.report import RewritePlan

logger = logging.getLogger(__name__)

NOISE = 1e-4  # of the scale: what another order of summation may change in float32


def prove(decider: Decider, decision: Decision, ops: Ops) -> RewritePlan:
    """The replacements that hold for this decision's way of serving."""
    plan = propose(decider.twin(), decision.seen, ops)
    allowed = min(max(10 * decision.difference, NOISE * decider.reference.scale), TOLERANCE * decider.reference.scale)
    if _holds(decider, decision, plan, ops, allowed):
        return plan
    kept = RewritePlan()
    for entries in _kinds(plan):
        whole = reduce(_joined, entries, RewritePlan())
        if _holds(decider, decision, whole, ops, allowed):
            kept = _joined(kept, whole)
            continue
        for part in entries:
            if len(entries) > 1 and _holds(decider, decision, part, ops, allowed):
                kept = _joined(kept, part)
            else:
                logger.info("left alone, because the twin's answers change: %s", _name(part))
    if _holds(decider, decision, kept, ops, allowed):
        return kept
    logger.info("no module is replaced: what holds by itself does not hold together")
    return RewritePlan()


def _holds(decider: Decider, decision: Decision, plan: RewritePlan, ops: Ops, allowed: float) -> bool:
    try:
        report = with_latents(replace(decision.report, rewrite=plan), decider.twin())
        difference = decider.trial(report, lambda model: transplant(model, plan, ops))
    except Exception as error:  # whatever the replaced model raises means that the replacement does not hold
        logger.info("%s raises %s: %s", _name(plan), type(error).__name__, error)
        return False
    return difference <= allowed


def transplant(model: nn.Module, plan: RewritePlan, ops: Ops) -> None:
    """Rewrite a model that has weights, and put them into the replacements by the way that loading takes."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    targets = {name: Target(tuple(tensor.shape), tensor.dtype, lambda _: None) for name, tensor in state.items()}
    for name, target in rewrite(model, plan, ops, targets, "cpu").items():
        target.load(state[name])


def _kinds(plan: RewritePlan) -> list[list[RewritePlan]]:
    """The entries of each kind, each as a plan; a gated block last, together with the linears that it joins."""
    gated = []
    for key, found in plan.gated.items():
        merged = [group for group in plan.merged.get(key, []) if group == found["gate_up"]]
        linears = [f"{key}.{child}" for child in (*found["gate_up"], found["down"])]
        gated.append(RewritePlan(merged={key: merged} if merged else {}, linears=linears, gated={key: found}))
    kinds = [
        [RewritePlan(linears=[linear]) for linear in plan.linears],
        [RewritePlan(merged={key: [group]}) for key, groups in plan.merged.items() for group in groups],
        [RewritePlan(norms={key: found}) for key, found in plan.norms.items()],
        [RewritePlan(rotary={key: style}) for key, style in plan.rotary.items()],
        [RewritePlan(experts=[key]) for key in plan.experts],
        [RewritePlan(products=[key]) for key in plan.products],
        [RewritePlan(latent={key: name}) for key, name in plan.latent.items()],
        gated,
    ]
    return [entries for entries in kinds if entries]


def _joined(one: RewritePlan, other: RewritePlan) -> RewritePlan:
    values: dict[str, Any] = {}
    for field in fields(RewritePlan):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, list):
            values[field.name] = sorted({*left, *right})
        elif field.name == "merged":
            keys = {*left, *right}
            values[field.name] = {
                key: left.get(key, []) + [group for group in right.get(key, []) if group not in left.get(key, [])]
                for key in keys
            }
        else:
            values[field.name] = {**left, **right}
    return replace(one, **values)


def _name(plan: RewritePlan) -> str:
    """The entries of a plan in short, by kind."""
    found = []
    for field in fields(RewritePlan):
        entries = getattr(plan, field.name)
        if entries:
            names = sorted(str(entry).rpartition(".models.")[2] or str(entry) for entry in entries)
            found.append(f"{field.name} {', '.join(names[:4])}" + (" ..." if len(names) > 4 else ""))
    return "; ".join(found) or "nothing"

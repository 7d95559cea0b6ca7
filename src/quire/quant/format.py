"""WeightFormat, how one matrix is stored and multiplied; and the table of ops in which a format has taken the place of
plain weights, so that no layer needs to know. It knows the names of methods, nothing of models or checkpoints.

A method is written int8, int4, int4-g32, int4-g64 or int4-g128; int4 ones may end in -zp for zero points, then in
-int8-head for an output matrix of 8 bits; all may end in -keep-head to leave that matrix as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch

from quire.errors import ConfigError, nearest
from quire.kernels.rounding import restored
from quire.kernels.table import Ops
from quire.kernels.weights import Parts, QuantizedLinear
from quire.quant.int4 import Int4
from quire.quant.int8 import Int8

KEEP_HEAD, INT8_HEAD = "-keep-head", "-int8-head"
HEAD_GROUP = 32  # the output matrix decides between tokens: where it has 4 bits, its groups are the smallest
GROUPS = {"int4": None, "int4-g32": 32, "int4-g64": 64, "int4-g128": 128}
METHODS = ("int8", *GROUPS, *(f"{name}-zp" for name in GROUPS))
# Last names of small linears that choose experts: a rounding there changes which expert a row gets.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


class WeightFormat(Protocol):
    """How the weight of one linear is stored and multiplied."""

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes that a weight [outputs, inputs] takes."""
        ...

    def load(self, weight: Parts, bias: torch.Tensor | None, dtype: torch.dtype | None = None) -> QuantizedLinear:
        """Round and pack weight [N, K] or its parts, and bias [N], in `dtype` or as they are. They may be dropped then."""
        ...

    def apply(self, x: torch.Tensor, packed: QuantizedLinear) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        ...


@dataclass(frozen=True, slots=True)
class QuantizedOps(Ops):
    """Ops whose linears are stored in a format; `full` are the ops as they were, `head` those of the output matrix."""

    full: Ops
    head: Ops


def quantized_ops(ops: Ops, method: str | None) -> Ops:
    """`ops` with linears in the format that `method` names; `ops` themselves for None. Raises ConfigError."""
    if method is None:
        return ops
    check_method(method)
    body = _with_format(ops, format_of(ops, method))
    kind = head_format(ops, method)
    head = ops if kind is None else _with_format(ops, kind)
    return QuantizedOps(**{field.name: getattr(body, field.name) for field in fields(Ops)}, full=ops, head=head)


def full_ops(ops: Ops) -> Ops:
    """The ops for a linear that keeps its weight as it is: a router."""
    return ops.full if isinstance(ops, QuantizedOps) else ops


def head_ops(ops: Ops) -> Ops:
    """The ops for the output matrix."""
    return ops.head if isinstance(ops, QuantizedOps) else ops


def format_of(ops: Ops, method: str) -> WeightFormat:
    """The format of the linears of a method that exists."""
    name = _body(method)
    if name == "int8":
        return Int8(ops)
    return Int4(ops, GROUPS[name.removesuffix("-zp")], name.endswith("-zp"))


def head_format(ops: Ops, method: str) -> WeightFormat | None:
    """The format of the output matrix; None where it stays as it is."""
    if method.endswith(KEEP_HEAD):
        return None
    if method == "int8" or method.endswith(INT8_HEAD):
        return Int8(ops)
    return Int4(ops, HEAD_GROUP, method.endswith("-zp"))


def _body(method: str) -> str:
    """The part of a method's name that speaks of all linears."""
    return method.removesuffix(KEEP_HEAD).removesuffix(INT8_HEAD)


def check_method(method: str) -> None:
    """Raise ConfigError for a method that does not exist, naming those that do."""
    if _body(method) in METHODS and method != "int8" + INT8_HEAD:
        return
    raise ConfigError(
        f"quantization is {method!r}, which quire does not have.{nearest(method, METHODS)} "
        f"It has {', '.join(METHODS)}, each also with {KEEP_HEAD} at its end, int4 ones with {INT8_HEAD}; leave it out "
        "for unquantized weights."
    )


def _with_format(ops: Ops, kind: WeightFormat) -> Ops:
    def unpack(packed: QuantizedLinear) -> torch.Tensor:
        return restored(ops.unpack_quantized(packed)).to(packed.dtype)

    changed = {"pack_linear": kind.load, "linear": kind.apply, "unpack_linear": unpack}
    return Ops(**{field.name: changed.get(field.name, getattr(ops, field.name)) for field in fields(Ops)})

"""Programs of small functions of PyTorch: the bits that PyTorch gives, at other sizes than those that were recorded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from quire.kernels.cpu import CpuOps
from quire.kernels.programs import NotRecordableError, Opaque, Program, Take, without_step
from quire.kernels.table import Ops, ops_of

WIDTH = 24
TABLE = torch.randn(4000, WIDTH, generator=torch.Generator().manual_seed(5))
Function = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def strided_sums(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    heads = x.view(-1, 4, 6).transpose(0, 1)  # [4, T, 6]
    return (heads + heads.mul(0.1)).sub(heads[:, :, :1]).div(7).transpose(0, 1).reshape(-1, WIDTH)


def row_factors(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (x * x[:, 3:4] + TABLE[0].to(x.dtype)) * TABLE[1].to(x.dtype) + 2


def casts_and_parts(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    whole = torch.cat((x[:, 5:], x[:, :5].float().to(x.dtype)), dim=-1)
    return torch.cat((whole.view(-1, 2, 12).transpose(1, 2).contiguous().view(-1, WIDTH), whole), -1).float()


def in_place(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 2:9] = x[:, :7]
    y.mul_(3).add_(x)
    return y


def picked(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    some = x.index_select(0, rows) + x[None][:, rows][0]
    return some + torch.nn.functional.embedding(rows, TABLE.to(x.dtype))


def with_python_between(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    y = torch.tanh(x + 1) * 2
    values, indices = torch.topk(torch.softmax(y.float(), -1), 3)
    return (y + values.sum(-1, keepdim=True).to(y.dtype)).index_select(0, rows) * indices.shape[1]


FUNCTIONS = (strided_sums, row_factors, casts_and_parts, in_place, picked, with_python_between)


def inputs(rows: int, wanted: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, WIDTH, generator=generator).to(dtype)
    return {"x": x, "rows": torch.randint(0, rows, (wanted,), generator=generator)}


def make(function: Function, ops: Ops, dtype: torch.dtype, opaque: tuple[Opaque, ...] = ()) -> Program:
    takes = []
    for rows, wanted in ((7, 3), (11, 4)):
        given = inputs(rows, wanted, dtype)
        takes.append(Take(lambda given=given: function(given["x"], given["rows"]), given, (rows, wanted)))  # type: ignore[misc]
    recorder = ops.new_recorder()
    assert recorder is not None
    return recorder.program((takes[0], takes[1]), opaque)


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        one.contiguous().view(torch.uint8), two.contiguous().view(torch.uint8)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=[function.__name__ for function in FUNCTIONS])
def test_the_bits_of_pytorch_at_every_size(function: Function, dtype: torch.dtype, ops: Ops) -> None:
    program = make(function, ops, dtype)
    for rows, wanted in ((1, 1), (5, 5), (7, 3), (33, 0), (4000, 70)):
        given = inputs(rows, wanted, dtype)
        program.spoil(rows)
        found = program.run([given["x"], given["rows"]], (rows, wanted), 1)
        assert same_bits(found, function(given["x"], given["rows"])), (rows, wanted)


def test_a_row_outside_the_table_is_refused_and_the_next_step_is_right(ops: Ops) -> None:
    program = make(picked, ops, torch.float32)
    given = inputs(9, 4, torch.float32)
    with pytest.raises(IndexError):
        program.run([given["x"], given["rows"] + 9], (9, 4), 1)
    with pytest.raises(ValueError, match="largest number of rows"):
        program.run([given["x"], given["rows"]], (3, 4), 1)
    assert same_bits(program.run([given["x"], given["rows"]], (9, 4), 1), picked(given["x"], given["rows"]))


def test_an_opaque_function_is_called_and_may_look_at_numbers(ops: Ops) -> None:
    def look(x: torch.Tensor) -> torch.Tensor:
        return x * float(x[0, 0]) if x.shape[0] > 3 else x + 1

    holder = {"look": look}

    def function(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return holder["look"](x + 1) + x

    program = make(function, ops, torch.float32, (Opaque(holder, "look", without_step(look)),))
    assert holder["look"] is look
    for rows in (2, 5):
        given = inputs(rows, 1, torch.float32)
        assert same_bits(program.run([given["x"], given["rows"]], (rows, 1), 1), function(given["x"], given["rows"]))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, rows: x * float(x[0, 0]), "numbers in a tensor"),
        (lambda x, rows: x[x[:, 0] > 0], "numbers in a tensor"),
        (lambda x, rows: x * x.shape[0], "Python sees"),
        (lambda x, rows: x + TABLE[0].add_(0), "outlives the step"),
        (lambda x, rows: torch.nn.functional.dropout(x, 0.5), "random"),
        (lambda x, rows: x.view(-1)[: x.shape[0] * rows.shape[0]] * 2, "no size of the step"),
    ],
    ids=["item", "mask", "size as a factor", "a weight written", "random numbers", "a product of sizes"],
)
def test_what_cannot_be_a_program(function: Function, reason: str) -> None:
    with pytest.raises(NotRecordableError, match=reason):
        make(function, ops_of(CpuOps("plain", threads=1)), torch.float32)


def test_rows_that_nobody_asks_for_are_not_computed() -> None:
    """The linear before a pick runs for the picked rows alone, and gives the same bits."""
    ops = ops_of(CpuOps("plain", threads=1))
    packed = [ops.pack_linear(TABLE[:WIDTH].clone(), None) for _ in range(2)]

    def function(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        y = ops.linear(x * 2, packed[0])
        z = ops.linear(y, packed[1]) + y
        return ops.linear(z.index_select(0, rows), packed[0])

    program = make(function, ops, torch.float32)
    names = [line.calls[0].function for line in program._draft.lines]  # type: ignore[attr-defined]
    assert names.index("quire_gather_rows") < names.index("quire_linear")
    for rows, wanted in ((1, 1), (30, 2), (5, 0)):
        given = inputs(rows, wanted, torch.float32)
        found = program.run([given["x"], given["rows"]], (rows, wanted), 1)
        assert same_bits(found, function(given["x"], given["rows"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rows_of_quantized_layers_are_made_on_their_way_in(dtype: torch.dtype, ops: Ops) -> None:
    """A norm and a gated activation become parts of the layers behind them, and the bits stay."""
    weight = TABLE[40, :WIDTH].to(dtype)
    wide = ops.round_linear(TABLE[: 2 * WIDTH].to(dtype), TABLE[50].repeat(2).to(dtype), dtype, 8, 0, False)
    narrow = ops.round_linear(TABLE[100 : 100 + WIDTH].to(dtype), None, dtype, 4, 32, True)

    def function(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        total = x
        for style in ("down_then_scale", "scale_then_down", "plus_one"):
            y, total = ops.add_rms_norm(total * 2, total, weight, 1e-5, style)
            y = ops.quantized_linear(y, wide)
            total = ops.quantized_linear(ops.gated(y, "silu"), narrow) + total
        total = ops.quantized_linear(ops.layer_norm(total, weight, TABLE[60, :WIDTH].to(dtype), 1e-5), narrow)
        y = ops.rms_norm(total, weight, 1e-5, "plus_one")
        total = ops.quantized_linear(y, narrow) + y  # somebody else wants the norm
        z = ops.layer_norm(total, weight, None, 1e-5)
        return ops.quantized_linear(z, narrow) + z

    program = make(function, ops, dtype)
    names = [line.calls[0].function for line in program._draft.lines]  # type: ignore[attr-defined]
    assert names.count("quire_rms_norm_quantized_linear") == 4
    assert names.count("quire_layer_norm_quantized_linear") == 2
    assert names.count("quire_gated_quantized_linear") == 3
    assert not {"quire_rms_norm", "quire_layer_norm", "quire_gated", "quire_quantized_linear"} & set(names)
    for rows in (1, 2, 30, 400):
        given = inputs(rows, 1, dtype)
        program.spoil(rows)
        found = program.run([given["x"], given["rows"]], (rows, 1), 1)
        assert same_bits(found, function(given["x"], given["rows"]))

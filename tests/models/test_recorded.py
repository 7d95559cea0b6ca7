"""Step programs against the forward they were recorded from: the same bits, whatever the step; and what is refused."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_tiny

from quire.config import ModelOptions
from quire.kernels import reference
from quire.kernels.cpu import CpuOps, native
from quire.kernels.programs import NotRecordableError
from quire.kernels.table import Ops, load_ops, ops_of
from quire.models.build import build_model
from quire.models.files.hub import find_model
from quire.models.programs.proved import ProvedPrograms
from quire.models.programs.recorded import Plan, RecordedModel, with_program
from quire.models.served import ServedModel
from quire.models.twin.trial import PagedLoop
from quire.resolve import activation_bytes

CPU = torch.device("cpu")
PAGE, PAGES = 4, 128

# (path, family, changes of its config, calls of Python that are left in a step)
CASES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "native llama": ("native", "llama", {}, 0),
    "native llama, biases": ("native", "llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}, 0),
    "native mistral, windows": ("native", "mistral", {"sliding_window": 9}, 0),
    "native qwen3": ("native", "qwen3", {}, 0),
    "native qwen3_moe": ("native", "qwen3_moe", {}, 6),
    "llama": ("transformers", "llama", {}, 0),
    "llama, biases": ("transformers", "llama", {"attention_bias": True, "mlp_bias": True}, 0),
    "qwen3, norms of queries and keys": ("transformers", "qwen3", {}, 0),
    "gemma2, windows and softcaps": ("transformers", "gemma2", {}, 1),
    "gemma3, two ropes": ("transformers", "gemma3_text", {}, 0),
    "gpt2, positions from a table": ("transformers", "gpt2", {}, 6),
    "youtu, latents": ("transformers", "youtu", {}, 0),
    "deepseek_v3, latents and experts": ("transformers", "deepseek_v3", {}, 24),
    "mixtral": ("transformers", "mixtral", {}, 9),
    "qwen3_next, recurrent mixers": ("transformers", "qwen3_next", {}, 20),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def build(folder: Path, path: str, ops: Ops, dtype: torch.dtype = torch.float32) -> ServedModel:
    options = ModelOptions(model=str(folder), model_impl=path)
    return build_model(find_model(options), options, dtype, CPU, ops)


def recorded(model: ServedModel, loop: PagedLoop, ops: Ops) -> ServedModel:
    sizes = [0 if group in loop._states else PAGE for group in range(loop._groups)]
    return with_program(model, Plan(sizes, PAGES, loop.caches), ops)


def conversation(model: ServedModel, ops: Ops, dtype: torch.dtype, program: bool) -> torch.Tensor:
    """Logits of a run with chunks, company that comes and goes, a prefix hit, and a sequence that starts over."""
    loop = PagedLoop(model, ops, PAGE, PAGES, dtype)
    if program:
        loop.model = recorded(model, loop, ops)
        assert isinstance(loop.model, RecordedModel)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, 300, (3, 60), generator=generator).tolist()
    one, two = loop.start(0, tokens[0]), loop.start(1, tokens[1])
    found = loop.step([(one, 8)])
    three = loop.start(2, tokens[0][:8] + tokens[2])
    loop.adopt(three, one, 8)
    for work in ([(one, 1), (two, 13)], [(two, 1), (one, 1)], [(three, 9), (two, 1), (one, 3)], [(three, 1)]):
        found += loop.step(work, all_rows=len(work) == 2)
    loop.preempt(two)
    found += loop.step([(two, 21), (three, 1), (one, 1)])
    for _ in range(3):
        found += loop.step([(one, 1), (two, 1), (three, 1)])
    return torch.cat([logits.reshape(-1) for logits in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_a_program_gives_the_bits_of_the_forward(tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    path, family, changes, _ = CASES[case]
    ops = load_ops("cpu")
    folder = write_tiny(tmp_path, family, tokenizer=False, dtype=dtype, **changes)
    model = build(folder, path, ops, dtype)
    expected = conversation(model, ops, dtype, program=False)
    assert expected.isfinite().all()
    assert torch.equal(conversation(model, ops, dtype, program=True), expected)


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_to_python(tmp_path: Path, case: str) -> None:
    path, family, changes, left = CASES[case]
    ops = load_ops("cpu")
    model = build(write_tiny(tmp_path, family, tokenizer=False, **changes), path, ops)
    found = recorded(model, PagedLoop(model, ops, PAGE, PAGES), ops)
    assert isinstance(found, RecordedModel)
    says = found.program.describe()
    assert says.endswith(f"native calls and {left} of Python" if left else "native calls")


@pytest.mark.parametrize("level", native.built_levels())
def test_every_level_that_this_machine_runs(tmp_path: Path, level: str) -> None:
    if native.LEVELS.index(level) > native.LEVELS.index(native.machine_level()):
        pytest.skip("another machine's")
    ops = ops_of(CpuOps(level, threads=1))
    model = build(write_tiny(tmp_path, "qwen3", tokenizer=False), "native", ops)
    expected = conversation(model, ops, torch.float32, program=False)
    assert torch.equal(conversation(model, ops, torch.float32, program=True), expected)


def test_other_threads_at_the_library_are_not_heard(tmp_path: Path) -> None:
    """Packed weights are written to disk, with their checksums, while the steps are recorded."""
    ops, data = load_ops("cpu"), torch.zeros(64, dtype=torch.uint8)
    model: Any = build(write_tiny(tmp_path, "llama", tokenizer=False), "native", ops)
    embed = model.embedding.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=ops.checksum, args=(data,))
        thread.start()
        thread.join()
        return embed(ids)

    before = recorded(model, PagedLoop(model, ops, PAGE, PAGES), ops)
    model.embedding.forward = forward
    found = recorded(model, PagedLoop(model, ops, PAGE, PAGES), ops)
    assert isinstance(found, RecordedModel) and isinstance(before, RecordedModel)
    assert found.program.describe() == before.program.describe()


# ---------------------------------------------------------------- what is refused


@pytest.fixture()
def llama(tmp_path: Path) -> ServedModel:
    return build(write_tiny(tmp_path, "llama", tokenizer=False), "native", load_ops("cpu"))


def refusal(model: ServedModel, ops: Ops, caplog: pytest.LogCaptureFixture) -> str:
    """Why the model stays as it is."""
    caplog.set_level(logging.INFO, "quire")
    assert recorded(model, PagedLoop(model, ops, PAGE, PAGES), ops) is model
    return caplog.records[-1].getMessage()


def test_a_device_without_programs(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert "no programs" in refusal(llama, ops_of(reference), caplog)


def test_python_that_reads_a_tensor(llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    embed = llama.embedding.forward
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: embed(ids.clamp(max=int(ids.max()))))
    assert "depends on the numbers in a tensor" in refusal(llama, load_ops("cpu"), caplog)
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: embed(torch.tensor(ids.tolist())))
    assert "depends on the numbers in a tensor" in refusal(llama, load_ops("cpu"), caplog)


def test_python_that_reads_lengths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Frequencies that grow with a sequence are chosen row by row, in Python."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    ops = load_ops("cpu")
    model = build(write_tiny(tmp_path, "llama", tokenizer=False, rope_parameters=rope), "native", ops)
    assert "depends on" in refusal(model, ops, caplog)


def test_python_that_depends_on_the_rows(llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    embed = llama.embedding.forward
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: embed(ids) * (2.0 if ids.shape[0] == 7 else 3.0))
    assert "numbers that only Python sees" in refusal(llama, load_ops("cpu"), caplog)


def test_a_forward_that_changes_its_mind_after_recording(
    llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    """Single rows are never recorded; the proof finds that they are treated in another way."""
    embed = llama.embedding.forward
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: embed(ids) * 2 if ids.shape[0] == 1 else embed(ids))
    assert "gives other numbers" in refusal(llama, load_ops("cpu"), caplog)


def test_a_tensor_that_outlives_the_step(llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    count = torch.zeros(())
    embed = llama.embedding.forward
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: embed(ids) + count.add_(1))
    assert "outlives the step" in refusal(llama, load_ops("cpu"), caplog)


def test_a_failing_forward_is_left_alone(llama: Any, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(llama.embedding, "forward", lambda ids: 1 / 0)
    assert "recording it failed" in refusal(llama, load_ops("cpu"), caplog)


def test_tokens_outside_the_table_raise(tmp_path: Path) -> None:
    ops = load_ops("cpu")
    model = build(write_tiny(tmp_path, "llama", tokenizer=False), "native", ops)
    loop = PagedLoop(model, ops, PAGE, PAGES)
    loop.model = recorded(model, loop, ops)
    with pytest.raises(IndexError, match="outside the model's table"):
        loop.step([(loop.start(0, [1, 2, 320]), 3)])
    assert loop.step([(loop.start(1, [1, 2, 319]), 3)])[0].isfinite().all()


def test_tables_grow_with_the_sequences(tmp_path: Path) -> None:
    ops = load_ops("cpu")
    model = build(write_tiny(tmp_path, "llama", tokenizer=False, max_position_embeddings=8192), "native", ops)
    tokens = [index % 300 for index in range(2100)]
    found = []
    for program in (False, True):
        loop = PagedLoop(model, ops, 64, 64)
        if program:
            loop.model = with_program(model, Plan([64], 64, loop.caches), ops)
            assert isinstance(loop.model, RecordedModel)
        sequence = loop.start(0, tokens)
        found.append(torch.cat([*loop.step([(sequence, 2040)]), *loop.step([(sequence, 60)], all_rows=True)]))
    assert torch.equal(found[0], found[1])


def test_large_steps_run_as_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("quire.models.programs.recorded.MOST_ARENA", 32 << 10)
    ops = load_ops("cpu")
    model = build(write_tiny(tmp_path, "llama", tokenizer=False), "native", ops)
    loop = PagedLoop(model, ops, PAGE, PAGES)
    loop.model = recorded(model, loop, ops)
    assert isinstance(loop.model, RecordedModel)
    monkeypatch.setattr(loop.model, "program", None)
    assert loop.step([(loop.start(0, list(range(3, 60))), 50)])[0].isfinite().all()


@pytest.mark.parametrize("case", ["native qwen3", "llama", "gemma2, windows and softcaps", "youtu, latents"])
def test_its_memory_is_counted(tmp_path: Path, case: str) -> None:
    """What a program works in is no more than what is set aside for a step's activations, logits left out."""
    path, family, changes, _ = CASES[case]
    folder = write_tiny(tmp_path, family, tokenizer=False, **changes, hidden_size=256, intermediate_size=1024)
    ops = load_ops("cpu")
    model = build(folder, path, ops)
    found = recorded(model, PagedLoop(model, ops, PAGE, PAGES), ops)
    assert isinstance(found, RecordedModel)
    files = find_model(ModelOptions(model=str(folder)))
    assert found.program.memory(512) <= activation_bytes(files, model.layout, torch.float32, 512, 0)


def test_a_number_that_follows_from_no_size_is_refused() -> None:
    from quire.kernels.cpu.program_draft import Scaled, _Joining
    from quire.kernels.cpu.program_trace import Trace

    joining = _Joining(Trace((7, 3)), Trace((11, 4)))
    assert joining.number(21, 33) == Scaled(0, 3) and joining.number(6, 8) == Scaled(1, 2) and joining.number(5, 5) == 5
    with pytest.raises(NotRecordableError, match="follows from no size"):
        joining.number(8, 12)


def test_what_was_proved_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    proved = []
    prove = RecordedModel.prove
    monkeypatch.setattr(RecordedModel, "prove", lambda self, plan: (proved.append(1), prove(self, plan)))
    folder = write_tiny(tmp_path / "model", "llama", tokenizer=False)
    files = find_model(ModelOptions(model=str(folder)))
    ops = load_ops("cpu")

    def proofs_of_a_start(threads: int = 1, dtype: torch.dtype = torch.float32) -> int:
        proved.clear()
        model = build(folder, "native", ops)
        plan = Plan([PAGE], PAGES, PagedLoop(model, ops, PAGE, PAGES, dtype).caches)
        assert isinstance(with_program(model, plan, ops, ProvedPrograms(files, (dtype,), threads, ops)), RecordedModel)
        return len(proved)

    assert [proofs_of_a_start() for _ in range(3)] == [1, 0, 0]
    assert proofs_of_a_start(threads=2) == 1
    assert proofs_of_a_start(dtype=torch.bfloat16) == 1
    assert proofs_of_a_start() == 0
    records = list((tmp_path / "cache" / "programs").iterdir())
    assert len(records) == 3
    for record in records:
        record.write_text(record.read_text()[:-1] + "x")
    assert proofs_of_a_start() == 1, "a damaged record counts as none"
    for record in records:
        record.chmod(0o666)
    assert proofs_of_a_start() == 1, "nor does one that others may write"
    assert proofs_of_a_start() == 0
    weights = folder / "model.safetensors"
    os.utime(weights, (1, 1))
    assert proofs_of_a_start() == 1, "these may be other weights"

"""Weight files: what is read, what is refused and how the refusal reads, and how much memory loading takes."""

from __future__ import annotations

import json
import mmap
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import write_tiny

from quire.config import ModelOptions
from quire.engine.start import ShareTold
from quire.errors import CheckpointError
from quire.kernels import reference
from quire.kernels.memory import FilePages
from quire.kernels.table import load_ops, ops_of
from quire.layers.linear import Linear
from quire.layers.target import Target
from quire.models.build import build_model
from quire.models.files.headers import read_headers, weight_headers
from quire.models.files.hub import ModelFiles, find_model
from quire.models.native.decoder import NativeDecoder
from quire.models.weights.checkpoint import Checkpoint, stream_weights
from quire.models.weights.load import LoadRules, dummy_weights, load_into

CPU = torch.device("cpu")


def find(folder: Path, **options: object) -> ModelFiles:
    return find_model(ModelOptions(model=str(folder), **options))  # type: ignore[arg-type]


def load(folder: Path, **options: object) -> NativeDecoder:
    files = find(folder, **options)
    model = NativeDecoder(files, torch.float32, CPU, ops_of(reference))
    model.load(files, seed=0)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama", tokenizer=False)


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Write model.safetensors again with some tensors replaced, added or (None) left out."""
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def change_header(path: Path, name: str, **changes: object) -> None:
    """Change one entry of a safetensors header in place, leaving the data alone."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    header[name].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# ---------------------------------------------------------------- reading


def test_tensors_are_those_of_the_library(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    read = {name: tensor.clone() for name, tensor in stream_weights(Checkpoint(find(folder)))}
    assert read.keys() == expected.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, expected[name]), name


def test_every_dtype_and_odd_offsets(folder: Path) -> None:
    extra = {
        "a.bytes": torch.arange(3, dtype=torch.uint8),
        "b.bfloat": torch.randn(5).bfloat16(),
        "c.half": torch.randn(3, 2).half(),
        "d.bool": torch.tensor([True, False, True]),
        "e.float8": torch.randn(7).to(torch.float8_e4m3fn),
        "f.int": torch.arange(4),
        "g.empty": torch.empty(0, 4),
        "h.scalar": torch.tensor(2.5),
    }
    save_file(extra, folder / "model.safetensors")
    checkpoint = Checkpoint(find(folder))
    for name, tensor in extra.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)), name


def test_a_view_stays_valid_after_its_pages_were_let_go(folder: Path) -> None:
    checkpoint = Checkpoint(find(folder))
    view = checkpoint.read("model.embed_tokens.weight")
    before = view.clone()
    checkpoint.forget("model.embed_tokens.weight")
    del checkpoint
    assert torch.equal(view, before)


def test_headers_alone(folder: Path) -> None:
    headers = weight_headers(find(folder))
    expected = load_file(folder / "model.safetensors")
    assert {name: (h.dtype, h.shape, h.nbytes) for name, h in headers.items()} == {
        name: (t.dtype, tuple(t.shape), t.numel() * t.element_size()) for name, t in expected.items()
    }


def test_shards_with_an_index(tmp_path: Path) -> None:
    whole = load(write_tiny(tmp_path / "one", tokenizer=False))
    folder = write_tiny(tmp_path / "many", tokenizer=False, max_shard_size="40KB")
    files = find(folder)
    assert len(files.weights) > 1 and files.index is not None
    assert torch.equal(load(folder).head.packed.data, whole.head.packed.data)


def test_a_name_in_two_shards_counts_where_the_index_says(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "many", tokenizer=False, max_shard_size="40KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    right = index["model.norm.weight"]
    wrong = next(file for file in sorted(set(index.values())) if file != right)
    tensors = load_file(folder / wrong)
    save_file({**tensors, "model.norm.weight": torch.zeros(32)}, folder / wrong)
    checkpoint = Checkpoint(find(folder))
    assert checkpoint.headers["model.norm.weight"].path.name == right
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is in two files.*no index"):
        Checkpoint(find(folder))


def test_other_formats_beside_the_model_are_left_alone(folder: Path) -> None:
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "model.fp16.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    (folder / "original").mkdir()
    save_file({"x": torch.zeros(1)}, folder / "original" / "model.safetensors")
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    assert [path.name for path in find(folder).weights] == ["model.safetensors"]


def test_a_base_model_without_its_prefix_loads(folder: Path) -> None:
    expected = load(folder).head.packed.data.clone()
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / "model.safetensors")
    assert torch.equal(load(folder).head.packed.data, expected)


# ---------------------------------------------------------------- .bin and .pt


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(folder: Path, legacy: bool) -> None:
    expected = load(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    (folder / "training_args.bin").write_bytes(b"not weights")
    files = find(folder)
    assert files.weight_format == "pt"
    assert torch.equal(load(folder).head.packed.data, expected.head.packed.data)


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.target, "w"))


def test_code_in_a_torch_file_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    target = tmp_path / "was-run"
    torch.save({"x": torch.zeros(1), "evil": Evil(str(target))}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*does not run code"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(str(target))))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        load(folder)
    assert not target.exists()


def test_truncated_torch_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    raw = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is corrupt or truncated"):
        load(folder)


def test_a_torch_file_that_is_no_dictionary(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not hold a dictionary of tensors"):
        load(folder)


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, 0.999])
def test_truncated_file(folder: Path, kept: float) -> None:
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(kept if kept > 1 else len(raw) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt or truncated.*Download"):
        load(folder)


def test_truncation_names_the_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    last = max(read_headers(path).values(), key=lambda header: header.start)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=f"tensor '{last.name}' ends at byte .* has only"):
        load(folder)


def test_header_that_is_not_json(folder: Path) -> None:
    path = folder / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[8:40] = b"\xff" * 32
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [32, 33]}, "needs 4224 bytes but has"),
        ({"dtype": "F13"}, "has data type 'F13', which quire cannot read"),
        ({"data_offsets": [8, 4]}, "needs .* bytes but has"),
        ({"data_offsets": "all"}, "is malformed"),
        ({"data_offsets": [-128, 0], "shape": [32]}, "is malformed"),
    ],
)
def test_header_that_lies(folder: Path, change: dict[str, object], message: str) -> None:
    change_header(folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight", **change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "model.safetensors" in str(caught.value)


def test_index_that_names_a_missing_shard(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "many", tokenizer=False, max_shard_size="40KB")
    shard = find(folder).weights[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"1 of \d+ weight files are missing.*{shard.name}"):
        find(folder)


def test_index_that_names_what_no_shard_has(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "many", tokenizer=False, max_shard_size="40KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra.weight"] = find(folder).weights[0].name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'model.extra.weight' is in .* does not contain it"):
        load(folder)
    index["weight_map"]["model.extra.weight"] = "../../secrets.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its own folder"):
        find(folder)


# ---------------------------------------------------------------- names and shapes


def test_wrong_shape_names_file_and_tensor(folder: Path) -> None:
    rewrite(folder, **{"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 31)})
    with pytest.raises(
        CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' in .*model\.safetensors.*\[48, 31\]"
    ):
        load(folder)


def test_missing_weight(folder: Path) -> None:
    rewrite(folder, **{"model.layers.2.self_attn.k_proj.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks 1 of 30 weights.*'model.layers.2.self_attn.k_proj.weight'"):
        load(folder)


def test_unexpected_weight(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"no place for: 'model.layers.0.self_attn.q_proj.bias' in .*safetensors"):
        load(folder)


def test_leftovers_of_training_are_passed_over(folder: Path) -> None:
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    files = find(folder)
    report = NativeDecoder(files, torch.float32, CPU, ops_of(reference)).load(files, 0)
    assert report.ignored == ("model.layers.0.self_attn.rotary_emb.inv_freq",)


def test_tied_head_from_either_end(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tied", "qwen2", tokenizer=False)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    model = load(folder)
    assert torch.equal(model.head.packed.data, table) and torch.equal(model.embedding.weight, table)
    rewrite(folder, **{"model.embed_tokens.weight": None, "lm_head.weight": table})
    model = load(folder)
    assert torch.equal(model.head.packed.data, table) and torch.equal(model.embedding.weight, table)


def test_a_config_that_belongs_to_other_weights(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks \d+ of \d+ weights"):
        load(folder, hf_overrides={"num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match="no place for"):
        load(folder, hf_overrides={"num_hidden_layers": 2})


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"No weights were found.*holds no weight files.*--load-format dummy"):
        find(folder)
    (folder / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"It holds model\.gguf"):
        find(folder)


# ---------------------------------------------------------------- merged linears


def test_merged_linear_packs_when_the_last_sibling_comes() -> None:
    weights = [torch.randn(n, 6) for n in (4, 2, 2)]
    biases = [torch.randn(n) for n in (4, 2, 2)]
    linear = Linear(ops_of(reference), 6, (4, 2, 2), True, torch.float32, CPU)
    for index in (2, 0, 1):
        linear.load_bias_shard(index, biases[index])
        assert linear.packed is None
        linear.load_shard(index, weights[index])
    x = torch.randn(3, 6)
    expected = torch.cat([x @ w.T + b for w, b in zip(weights, biases, strict=True)], -1)
    assert torch.allclose(linear(x), expected, atol=1e-6)
    assert not linear._waiting


# ---------------------------------------------------------------- dummy weights


def test_dummy_weights_depend_on_seed_and_name_alone() -> None:
    def made(seed: int, names: list[str]) -> dict[str, torch.Tensor]:
        targets = {name: Target((300, 70), torch.bfloat16, lambda tensor: None) for name in names}
        return dict(dummy_weights(targets, seed))

    first, again, other = made(0, ["a", "b"]), made(0, ["b", "a"]), made(1, ["a", "b"])
    assert torch.equal(first["a"], again["a"]) and torch.equal(first["b"], again["b"])
    assert not torch.equal(first["a"], first["b"]) and not torch.equal(first["a"], other["a"])
    assert 0.015 < first["a"].float().std() < 0.025


def test_dummy_weights_cost_no_memory_of_their_own() -> None:
    targets = {"w": Target((8, 300, 1100), torch.float32, lambda tensor: None)}
    _, tensor = next(dummy_weights(targets, 0))
    assert torch.isfinite(tensor).all() and abs(float(tensor.mean())) < 1e-3
    assert tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size() / 4
    rows = tensor.reshape(-1, 1100)
    assert rows.unique(dim=0).shape == rows.shape


def test_dummy_model_loads_without_weight_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = load(folder, load_format="dummy")
    assert torch.equal(model.head.packed.data, load(folder, load_format="dummy").head.packed.data)


def test_a_target_is_filled_once() -> None:
    targets = {"w": Target((2,), torch.float32, lambda tensor: None)}
    rules = LoadRules(rename=lambda name: "w")
    with pytest.raises(CheckpointError, match="fills 'w' a second time"):
        load_into(targets, [("one", torch.zeros(2)), ("two", torch.zeros(2))], rules)


# ---------------------------------------------------------------- memory

PEAK = """
import sys, threading, time, torch
from pathlib import Path
from quire.config import ModelOptions
from quire.kernels import reference
from quire.kernels.table import ops_of
from quire.models.files.hub import find_model
from quire.models.native.decoder import NativeDecoder

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

class Copying:
    # Packs as a native backend does, into memory of its own.
    pack_linear = staticmethod(lambda w, b, dtype: reference.pack_linear(torch.cat(w), b, dtype))

files = find_model(ModelOptions(model=sys.argv[1]))
model = NativeDecoder(files, torch.float32, torch.device("cpu"), ops_of(Copying))
torch.zeros(1).clone()
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch); watcher.start()
report = model.load(files, 0)
done.set(); watcher.join()
print(report.nbytes, max(peak[0], anonymous()) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_loading_needs_the_weights_and_one_tensor(tmp_path: Path) -> None:
    folder = write_tiny(
        tmp_path / "wide", tokenizer=False, hidden_size=512, intermediate_size=2048, num_hidden_layers=12
    )
    ran = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder)], capture_output=True, text=True, timeout=120, check=True
    )
    weights, peak = map(int, ran.stdout.split())
    largest = 2 * 2048 * 512 * 4  # gate and up, merged
    assert weights > 100e6
    assert peak < weights + 2 * largest, (weights, peak)


@pytest.mark.parametrize("path", ["native", "transformers"])
def test_the_share_that_is_loaded_is_told(folder: Path, path: str) -> None:
    shares: list[float] = []
    options = ModelOptions(model=str(folder), model_impl=path)
    build_model(find_model(options), options, torch.float32, CPU, load_ops("cpu"), shares.append)
    assert len(shares) == len(load_file(folder / "model.safetensors"))
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1


def test_the_share_is_told_in_words_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("quire.engine.start.time.perf_counter", iter([0.0, 0.1, 0.6, 0.7, 11.0]).__next__)
    caplog.set_level("INFO", "quire.engine.start")
    told: list[tuple[str, float | None]] = []
    share_told = ShareTold(lambda name, seconds: told.append((name, seconds)))
    for share in (0.1, 0.25, 0.3, 0.9):
        share_told(share)
    assert told == [("loading the model: 25% of the weights", None), ("loading the model: 90% of the weights", None)]
    assert [record.message for record in caplog.records] == ["90 % of the weights are loaded"]


def test_pages_of_a_file_are_let_go_and_come_back(tmp_path: Path) -> None:
    """What was written to a page in this process is gone with it; other memory is left alone."""
    path, page = tmp_path / "weights", mmap.PAGESIZE
    path.write_bytes(b"a" * (3 * page + 10))
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    view = torch.frombuffer(memory, dtype=torch.uint8)
    other = torch.full((page,), 7, dtype=torch.uint8)
    view.fill_(ord("b"))
    pages = FilePages()
    pages.add(memory)
    pages.let_go(other.data_ptr(), page)
    pages.let_go(view[page:].data_ptr(), page)
    assert bytes(view[::page].tolist()) == b"babb" and bool((other == 7).all())
    pages.let_go(view.data_ptr(), len(memory) + page)
    assert bool((view == ord("a")).all())

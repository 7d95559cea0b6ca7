"""What quire's own code never does: advisories about deserializing, evaluating, foreign code and open ports.

Read from the sources, so that a new file is covered, too.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quire.core.pages import PageNames
from quire.engine import child
from quire.serve import api_processes

SOURCE = Path(__file__).parent.parent.parent / "src" / "quire"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path.relative_to(SOURCE): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

# What came over a socket or with a request was unpickled.
PICKLED = [
    "CVE-2024-9052",
    "CVE-2024-9053",
    "CVE-2024-11041",
    "CVE-2025-29783",
    "CVE-2025-32444",
    "CVE-2025-47277",
    "CVE-2025-30165",
    "GHSA-5vqr-wprc-cpp7",
    "CVE-2026-3059",
    "CVE-2026-3060",
    "CVE-2026-3989",
    "CVE-2026-86793",
    "CVE-2026-93034",
    "CVE-2026-26220",
]
UNPICKLERS = {
    "pickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "zmq",
    "multiprocessing.managers",
}


def calls(tree: ast.AST) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and [alias.name for alias in node.names] != ["UnpicklingError"]:
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("advisory", PICKLED)
def test_nothing_is_unpickled(advisory: str) -> None:
    offenders = {str(path): found for path, tree in TREES.items() if (found := imported(tree) & UNPICKLERS)}
    assert not offenders, (advisory, offenders)


def test_cve_2025_24357_ghsa_ggpf_24jw_3fcw_checkpoints_are_read_with_the_safe_reader_only() -> None:
    seen = 0
    for path, tree in TREES.items():
        for call in calls(tree):
            if ast.unparse(call.func) in ("torch.load", "torch.jit.load", "np.load", "numpy.load"):
                seen += 1
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
                safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
                assert safe, f"{path}:{call.lineno}"
    assert seen, "the reader of .bin files was not seen: this test looks for the wrong name"


def test_cve_2025_9141_nothing_is_evaluated() -> None:
    for path, tree in TREES.items():
        for call in calls(tree):
            assert ast.unparse(call.func) not in ("eval", "exec", "compile", "os.system"), f"{path}:{call.lineno}"
            shell = any(key.arg == "shell" and ast.unparse(key.value) != "False" for key in call.keywords)
            assert not shell, f"{path}:{call.lineno}"


def test_cve_2026_27893_no_file_decides_for_itself_to_trust_a_model() -> None:
    """A literal True is allowed only right behind the one check, which raises."""
    places = [
        f"{path}"
        for path, tree in TREES.items()
        for call in calls(tree)
        for keyword in call.keywords
        if keyword.arg == "trust_remote_code" and ast.unparse(keyword.value) == "True"
    ]
    assert set(places) <= {"models/files/describe.py"}, places


AUTO_MAP = {"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}}
FOREIGN = [
    {"model_type": "evil", "architectures": ["Evil"], **AUTO_MAP},
    {"model_type": "llava", "vision_config": {"model_type": "evil", **AUTO_MAP}, **AUTO_MAP},
    {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, **AUTO_MAP},
]


def test_cve_2026_41523_cve_2025_66448_cve_2026_22807_foreign_code_does_not_run(tmp_path: Path) -> None:
    """`python -O` takes asserts out, so the check must not be one; parts of a config may name code, too."""
    mark, folders = tmp_path / "ran", []
    for number, config in enumerate(FOREIGN):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
        folders.append(str(folder))
    code = (
        "from quire.config import ModelOptions\n"
        "from quire.errors import QuireError\n"
        "from quire.models.files.hub import find_model\n"
        f"for folder in {folders!r}:\n"
        "    try:\n"
        "        find_model(ModelOptions(model=folder))\n"
        "        print('read')\n"
        "    except QuireError as error:\n"
        "        print('refused', error)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, timeout=300, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) >= len(FOREIGN) and "trust" in lines[0], done.stdout + done.stderr[-2000:]
    assert lines[0].startswith("refused"), "a model of foreign code alone was taken"
    assert not mark.exists(), "code of the model ran"


def test_cve_2025_30202_sockets_are_opened_in_known_places_only() -> None:
    opened = {
        str(path)
        for path, tree in TREES.items()
        for call in calls(tree)
        if ast.unparse(call.func).endswith(
            (".bind", "create_server", "start_server", "HTTPServer", "init_process_group")
        )
        and "socket" in ast.unparse(tree)
    }
    assert "serve/listen.py" in opened
    assert opened <= {"serve/listen.py"}, f"a new listening socket: {opened}. Inherited pairs need no port."


@pytest.mark.parametrize(("one", "other"), [((-1,), (-2,)), ((2**61 - 1,), (0,)), ((1, 23), (12, 3))])
def test_cve_2025_25183_pages_are_named_by_more_than_pythons_hash(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    """hash(-1) == hash(-2), and anybody can compute others."""
    names = PageNames()
    root = names.root(b"")
    assert names.follow(root, one) != names.follow(root, other)
    assert names.follow(root, one) == names.follow(root, one)
    assert PageNames().root(b"") != root, "names can be computed outside of the process"


@pytest.mark.parametrize("command", [child.COMMAND, api_processes.COMMAND], ids=["engine", "api"])
def test_no_module_of_the_working_folder_runs(command: tuple[str, ...], tmp_path: Path) -> None:
    """A server may be started where somebody else's files lie, and a user's file may be called like a module of Python."""
    for name in ("socket", "json", "random", "torch"):
        (tmp_path / f"{name}.py").write_text("print('foreign code')\n")
    done = subprocess.run(
        [*command, "x", "x", "x"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "foreign code" not in done.stdout and "ValueError" in done.stderr, done.stderr[-500:]

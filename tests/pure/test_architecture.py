"""The rules of the house, kept by reading the sources: layers, sizes, forbidden things, and what an import costs.

Each offender is named with its file and line. A rule that must change is changed here, in the open.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "src" / "quire"
FILES = sorted(path for path in SOURCE.rglob("*.py"))
TOOLS = sorted(path for folder in ("bench", "tools") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))  # may make unsafe files, to see them refused

MOST_LINES = 500
MOST_FUNCTION_LINES = 60
MOST_KERNEL_LINES = 150
MOST_IMPORTED = 40  # modules

# Each part of quire and what it may import of the others; docs/architecture.md draws it.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "env": {"errors"},
    "placeholders": set(),
    "core": {"errors"},
    "kernels": {"errors", "env"},
    "bundled": set(),  # data
    "config": {"errors", "env", "core.params"},
    "foreign": set(),
    "text": {"errors", "env", "placeholders", "core"},
    "grammar": {"errors", "env", "core.structured"},
    "quant": {"errors", "env", "kernels"},
    "layers": {"errors", "env", "kernels", "quant"},
    "models": {"errors", "env", "placeholders", "kernels", "layers", "quant", "config"},
    "worker": {
        *("errors", "env", "kernels", "layers", "models", "quant", "grammar", "config"),
        *("core.params", "core.plan"),
    },
    # Page groups are a matter of the plan's messages; the device knows the memory.
    "sizing": {"errors", "core.plan", "layers.spec"},
    "resolve": {
        *("errors", "env", "config", "sizing", "core.plan", "models", "layers.spec", "kernels.table", "worker.device"),
    },
    "roofline": {"config", "core.picture", "kernels", "models", "resolve"},
    "engine": {"errors", "env", "core", "text", "grammar", "config", "sizing", "resolve", "roofline"},
    "llm": {"errors", "env", "config", "foreign", "core", "text", "engine", "resolve"},
    "serve": {"errors", "env", "config", "core", "text", "engine", "resolve", "llm"},
}
TOP = {"cli", "__init__"}  # may import everything
# The parts of models/, each of which imports only from those before it.
MODELS = (
    *("served", "files", "registry", "weights", "native", "transformers", "twin", "replacements", "probing"),
    *("assemble", "build", "footprint", "programs", "speculation"),
)
# Only these files of engine/ know that a worker exists: they start it and carry plans to it.
WORKER_FILES = {"engine/executor.py", "engine/prefetch.py", "engine/start.py", "engine/engine_process.py"}

NAMES_THAT_SAY_NOTHING = ("Manager", "Helper", "Mixin", "Impl", "Utils")
TORCH_FREE = ("core", "text", "grammar", "config", "cli.main", "cli.chat")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def part_of(path: Path) -> str:
    """The part of quire that a file belongs to: its folder, or its own name at the top."""
    inner = path.relative_to(SOURCE)
    return inner.parts[0] if len(inner.parts) > 1 else inner.stem


def quire_imports(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """(module below quire, node) for each import of quire in a file, wherever it stands."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("quire."):
                    yield alias.name.removeprefix("quire."), node
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{place(path, node)}: imports are written in full"
            if node.module == "quire":
                for alias in node.names:
                    if (SOURCE / alias.name).is_dir() or (SOURCE / f"{alias.name}.py").is_file():
                        yield alias.name, node
            elif node.module.startswith("quire."):
                yield node.module.removeprefix("quire."), node


def allowed(importer: Path, part: str, module: str) -> bool:
    target = module.split(".")[0]
    if target == part or part in TOP:
        return True
    if part == "engine" and str(importer.relative_to(SOURCE)) in WORKER_FILES:
        return target in LAYERS["worker"] | {"worker"} | LAYERS["engine"]
    return any(module == entry or module.startswith(entry + ".") for entry in LAYERS[part])


def test_each_part_is_in_the_table() -> None:
    unknown = sorted({part_of(path) for path in FILES} - set(LAYERS) - TOP)
    assert not unknown, f"parts of quire that have no place in the layers: {unknown}"


def test_each_part_is_described() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    parts = {part_of(path) for path in FILES} - {"__init__"}
    missing = sorted(part for part in parts if f"`{part}/`" not in text and f"`{part}.py`" not in text)
    assert not missing, f"docs/architecture.md does not name {missing}"


def test_files_import_only_from_lower_layers() -> None:
    offenders = [
        f"{place(path, node)}: {part_of(path)} may not import quire.{module}"
        for path in FILES
        for module, node in quire_imports(path)
        if not allowed(path, part_of(path), module)
    ]
    assert not offenders, "\n".join(offenders)


def test_parts_of_models_import_only_from_those_before() -> None:
    folder, offenders = SOURCE / "models", []
    for path in sorted(folder.rglob("*.py")):
        part = path.relative_to(folder).parts[0].removesuffix(".py")
        for module, node in quire_imports(path):
            names = module.split(".")
            if part != "__init__" and names[0] == "models" and MODELS.index(names[1]) > MODELS.index(part):
                offenders.append(f"{place(path, node)}: models.{part} may not import quire.{module}")
    assert not offenders, "\n".join(offenders)


def test_core_needs_the_standard_library_only() -> None:
    offenders = []
    for path in (SOURCE / "core").glob("*.py"):
        for node in ast.walk(tree_of(path)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = [node.module]
            for name in names:
                if name.split(".")[0] not in sys.stdlib_module_names | {"quire"}:
                    offenders.append(f"{place(path, node)}: {name}")
    assert not offenders, "\n".join(offenders)


def test_files_are_short() -> None:
    offenders = []
    for path in FILES + TOOLS + TESTS:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            offenders.append(f"{path.relative_to(ROOT)} has {lines} lines, at most {MOST_LINES} are allowed")
    assert not offenders, "\n".join(offenders)


def test_functions_are_short() -> None:
    offenders = []
    for path in FILES:
        most = MOST_KERNEL_LINES if part_of(path) == "kernels" else MOST_FUNCTION_LINES
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > most:
                    offenders.append(f"{place(path, node)}: {node.name} has {lines} lines, at most {most} are allowed")
    assert not offenders, "\n".join(offenders)


def test_every_file_says_what_it_holds() -> None:
    offenders = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(tree_of(path))]
    assert not offenders, f"files without a docstring: {offenders}"


def test_no_names_that_say_nothing() -> None:
    offenders = [str(path.relative_to(ROOT)) for path in FILES if path.stem in ("utils", "util", "helpers", "common")]
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef) and node.name.endswith(NAMES_THAT_SAY_NOTHING):
                offenders.append(f"{place(path, node)}: class {node.name}")
    assert not offenders, "\n".join(offenders)


def test_no_global_statement() -> None:
    offenders = [
        place(path, node) for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.Global)
    ]
    assert not offenders, "\n".join(offenders)


def test_the_environment_is_read_in_one_place() -> None:
    offenders = []
    for path in FILES:
        if path == SOURCE / "env.py":
            continue
        for node in ast.walk(tree_of(path)):
            attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            if attribute or (imported and any(alias.name in ("environ", "getenv") for alias in node.names)):
                offenders.append(f"{place(path, node)}: only env.py reads the environment")
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("path", FILES + TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_unsafe(path: Path) -> None:
    offenders = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] in UNSAFE_MODULES for a in node.names):
            offenders.append(f"{place(path, node)}: unsafe module")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNSAFE_MODULES:
            # The error that a safe reader raises may be named.
            if any(alias.name != "UnpicklingError" for alias in node.names):
                offenders.append(f"{place(path, node)}: unsafe module")
        elif isinstance(node, ast.Call):
            offenders += [f"{place(path, node)}: {reason}" for reason in unsafe_call(node)]
    assert not offenders, "\n".join(offenders)


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def unsafe_call(node: ast.Call) -> Iterator[str]:
    function = node.func
    if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
        yield f"{function.id}()"
    if isinstance(function, ast.Attribute) and ast.unparse(function) == "torch.load":
        safe = [key.value for key in node.keywords if key.arg == "weights_only"]
        if not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True):
            yield "torch.load without weights_only=True"


def test_no_settings_without_a_name() -> None:
    """A function that takes **anything cannot say what is wrong with it."""
    offenders = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.args, *node.args.kwonlyargs]
                if any(arg.arg == "params" and ast.unparse(arg.annotation or arg) == "dict" for arg in named):
                    offenders.append(f"{place(path, node)}: {node.name}(params: dict)")
    assert not offenders, "\n".join(offenders)


def test_nothing_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
    offenders = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(mark in line for mark in marks) or "NotImplementedError" in line:
                offenders.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not offenders, "\n".join(offenders)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_text_and_decisions_need_no_torch() -> None:
    there = [name for name in TORCH_FREE if (SOURCE / name.split(".")[0] / "__init__.py").is_file() or name == "config"]
    modules = ", ".join(f"quire.{name}" for name in there)
    found = run_python(f"import sys; import {modules}; print('torch' in sys.modules, 'transformers' in sys.modules)")
    assert found == "False False", f"torch, transformers imported: {found}"


def test_import_is_quick() -> None:
    """A few milliseconds: it brings little, and nothing of others."""
    found = run_python("import sys; before = {*sys.modules}; import quire; print(*{*sys.modules} - before)").split()
    packages = {name.split(".")[0] for name in found} - sys.stdlib_module_names
    assert packages == {"quire"} and len(found) <= MOST_IMPORTED, sorted(found)

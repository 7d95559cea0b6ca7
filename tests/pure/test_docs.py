"""What the documents say of the repository: links lead somewhere, files that are named exist, flags are those of quire."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from quire.cli.main import COMMANDS, main

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "peers.md"]
FOLDERS = ("src", "csrc", "tests", "bench", "tools", "docs", "deploy")
NAMED = re.compile(r"`([\w./-]+\.(?:py|cpp|h|sh|md))`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"^\s*quire +([a-z][a-z-]*(?: (?:latency|throughput|serve)\b)?)(.*)", re.MULTILINE)
SCRIPT = re.compile(r"python +((?:bench|tests|tools)/[a-z_/0-9]+\.py)([^`\n#]*)")
FLAG = re.compile(r"(?<!\S)--[a-z][a-z0-9-]*")
# Programs that hand the flags that they do not know to `quire serve`, or to the library that draws tests.
PASSES_ON = {"bench/fake_server.py"}


@cache
def files() -> frozenset[str]:
    """Every file of the repository's folders, as /path/from/the/root."""
    return frozenset(f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.*"))


def code(document: Path) -> str:
    """What a document has in blocks of code, and in backticks a line each."""
    text = document.read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```.*?^```|`[^`]+`", text, re.MULTILINE | re.DOTALL)).replace("`", "")


def anchors(document: Path) -> set[str]:
    """The places within a document that a link may name, as they are made of its headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document: Path) -> None:
    names = NAMED.findall(document.read_text(encoding="utf-8"))
    missing = [name for name in names if not any(path.endswith(f"/{name}") for path in files())]
    assert not missing, f"{document.name} names files that are not there: {missing}"


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in DOCUMENTS if path.parent.name == "docs" and f"({path.name})" not in index]
    assert missing == ["README.md"]


def commands() -> Iterator[tuple[str, str, str]]:
    """(document, command, flags) of every piece of code that begins with `quire`."""
    for document in DOCUMENTS:
        for name, rest in COMMAND.findall(code(document).replace("\\\n", " ")):
            command = name if name.split()[0] == "bench" else name.split()[0]
            yield document.name, command, re.split(r"\s#| {3}", rest, maxsplit=1)[0]


def test_flags_of_commands_are_those_of_quire(capsys: pytest.CaptureFixture[str]) -> None:
    @cache
    def known(command: str) -> set[str]:
        with pytest.raises(SystemExit):
            main([*command.split(), "--help"])
        return set(FLAG.findall(capsys.readouterr().out.replace("[", " ").replace(",", " ")))

    found = list(commands())
    assert len(found) > 20
    for document, command, rest in found:
        assert command.split()[0] in COMMANDS, f"{document}: quire {command}"
        for flag in FLAG.findall(rest):
            assert flag in known(command), f"{document}: quire {command} has no {flag}"


def test_flags_of_scripts_are_theirs() -> None:
    for document in DOCUMENTS:
        for script, rest in SCRIPT.findall(document.read_text(encoding="utf-8").replace("\n", " ")):
            assert (ROOT / script).is_file(), f"{document.name}: {script}"
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in FLAG.findall(rest.partition("`")[0]):
                assert f'"{flag}"' in source or script in PASSES_ON, f"{document.name}: {script} has no {flag}"


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"^make ([a-z-]+)", code(document), re.MULTILINE))
        assert named <= targets, f"{document.name}: {named - targets}"

"""The table of advisories in docs/security.md: every id has a test that carries it, or a reason why it cannot apply."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from served import Running, Setup, refused, served
from test_security_sources import PICKLED, TREES, imported

from quire.worker.sampler import Choices, Sampler

TESTS = Path(__file__).parent.parent
TABLE = (TESTS.parent / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    line.strip("| ").split(" | ") for line in TABLE.splitlines() if line.startswith(("| CVE", "| PYSEC", "| sglang"))
]


def found_tests() -> dict[str, str]:
    """Names of all tests, with what stands before each: its parameters, whose ids count as its name."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for match in re.finditer(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[match[1]] = match[1]
    found["test_nothing_is_unpickled"] = " ".join(PICKLED)
    found["test_every_route_but_the_public_ones_needs_a_key"] = "CVE-2025-63389"
    return found


def plain(text: str) -> str:
    return re.sub(r"\W", "_", text).lower()


@pytest.mark.parametrize(("ids", "here"), [(row[0], row[-1]) for row in ROWS], ids=[row[0][:16] for row in ROWS])
def test_every_advisory_has_a_test_or_a_reason(ids: str, here: str) -> None:
    tests = found_tests()
    if here.startswith("cannot apply"):
        assert ":" in here
        return
    names = re.findall(r"`(test_\w+)`", here)
    assert names
    for advisory in ids.split(", "):
        assert any(plain(advisory) in plain(tests[name]) for name in names), advisory


def test_pysec_2026_3933_grammars_are_compiled_in_one_place() -> None:
    """The only compiler is behind quire.grammar, whose budget of size and time so holds for every grammar."""
    users = {str(path) for path, tree in TREES.items() if any(name.startswith("llguidance") for name in imported(tree))}
    assert users and all(path.startswith("grammar/") for path in users), users
    others = {"xgrammar", "outlines", "outlines_core", "lmformatenforcer", "guidance"}
    assert not [path for path, tree in TREES.items() if imported(tree) & others]


def test_cve_2026_54234_a_token_that_was_not_chosen_is_never_said() -> None:
    """-1 stands for a row that could not choose. Alone it is the request's error; behind others it is left out."""
    for tokens, drafts, said in (
        ([-1], (), [-1]),
        ([-1, 6, 7], (5, 6), [-1]),
        ([5, -1, 7], (5, 6), [5]),
        ([5, 6, -1], (5, 6), [5, 6]),
        ([5, 6, 7], (5, 6), [5, 6, 7]),
    ):
        assert Sampler.verify(Choices(None, tokens, {}), 0, drafts) == said  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def server() -> Running:
    with served(Setup()) as running:
        yield running  # type: ignore[misc]


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/../../b", "parrot/../bird"])
def test_cve_2024_37032_names_are_no_paths(server: Running, name: str) -> None:
    refused(server.http.post("/v1/completions", json={"model": name, "prompt": "x"}), 404)
    for route in ("/v1/models/", "/v1/responses/", "/v1/requests/"):
        found = server.http.get(route + name.replace("/", "%2f").replace(".", "%2e"))
        assert found.status_code in (404, 405) and "root:" not in found.text

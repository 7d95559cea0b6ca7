"""Check every causal LM of the installed Transformers against its own generate, and renew docs/models.md.

python tools/enumerate_models.py                 all of them, renews the document's table and the expected tiers
python tools/enumerate_models.py llama,qwen3     some of them, writes nothing
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "models"))  # the check itself is a test, too

from enumerate_architectures import enumerate_architectures  # noqa: E402
from parity import Outcome, architectures  # noqa: E402

DOCUMENT = ROOT / "docs" / "models.md"
EXPECTED = ROOT / "tests" / "models" / "expected_tiers.json"
TIERS = ("A", "A+mixer", "B", "C", "none")

TABLE = """| model type | class | tier | equal | largest difference | replaced | remarks |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else list(architectures())
    outcomes = enumerate_architectures(chosen, report=_tell)
    counts = Counter(tier_of(outcome) for outcome in outcomes)
    print({tier: counts[tier] for tier in TIERS}, f"{sum(outcome.seconds for outcome in outcomes):.0f} s of work")
    if len(sys.argv) == 1:
        DOCUMENT.write_text(document(DOCUMENT.read_text(), outcomes))
        expected = {outcome.model_type: tier_of(outcome) for outcome in outcomes if not outcome.error}
        EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    return 0


def tier_of(outcome: Outcome) -> str:
    """The tier on which an architecture is equal; "none" when it is not."""
    return "none" if outcome.error else outcome.tier


def document(text: str, outcomes: list[Outcome]) -> str:
    """The text of docs/models.md with these outcomes: its words stay, its counts, versions and table are new."""
    counts = Counter(tier_of(outcome) for outcome in outcomes)
    head = text[: text.index(TABLE)]
    for tier in TIERS:
        head = re.sub(rf"^(\| {re.escape(tier)} \|.*\|) \d+ \|$", rf"\1 {counts[tier]} |", head, flags=re.MULTILINE)
    head = re.sub(r"\d+ of \d+ are equal", f"{len(outcomes) - counts['none']} of {len(outcomes)} are equal", head)
    head = re.sub(r"of Transformers [\w.+]+\w", f"of Transformers {transformers.__version__}", head)
    head = re.sub(r"with torch [\w.+]+\w", f"with torch {torch.__version__}", head)
    return head + TABLE + "".join(_row(outcome) for outcome in outcomes)


def _row(outcome: Outcome) -> str:
    replaced = " ".join(f"{kind[0]}{count}" for kind, count in outcome.replaced.items() if count)
    remarks = [outcome.error] if outcome.error else list(outcome.notes)
    if not outcome.chunked:
        remarks.append("prompts stay whole")
    cells = (
        outcome.model_type,
        outcome.architecture,
        tier_of(outcome),
        "no" if outcome.error else "yes",
        f"{outcome.difference:.1e}" if outcome.tier != "none" else "",
        replaced,
        " ".join(remarks).replace("|", "/"),
    )
    return f"| {' | '.join(cells)} |\n"


def _tell(outcome: Outcome) -> None:
    state = outcome.error or f"equal, {outcome.difference:.1e}"
    print(f"{outcome.model_type:24} {outcome.tier:8} {outcome.seconds:5.1f} s  {state}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

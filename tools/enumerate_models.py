"""Check every causal LM of the installed Transformers against its own generate, and write docs/models.md.

python tools/enumerate_models.py                 all of them, writes the document and the expected tiers
python tools/enumerate_models.py llama,qwen3     some of them, writes nothing
"""

from __future__ import annotations

import json
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

INTRODUCTION = """# Models

Every entry of the causal language model mapping of Transformers {version}, checked by `tools/enumerate_models.py`: a
tiny random model, three prompts together in odd chunks, one on a prefix hit, one preempted and computed again, float32,
greedy. *Equal* means the same tokens as the library's own `generate`.

| tier | meaning | equal |
|---|---|---|
| A | packed row, paged attention; the library's code unchanged | {A} |
| A+mixer | the same, with recurrent mixers on paged state | {A+mixer} |
| B | attention modules one sequence at a time, the rest packed; slow, and without prefix cache | {B} |
| C | the whole model one sequence at a time; slowest | {C} |
| none | does not run, or its tokens differ | {none} |

{equal} of {tried} are equal. The tier of a model is found on your machine, on a tiny twin of its own config; this table
is what the default configs gave with torch {torch}. *Replaced* counts the kinds of modules whose replacement was proved
equal: merged linears (m), linears (l), norms (n), gated blocks (g), rotary functions (r), expert blocks (e), products with
a parameter of routers (p), attention that keeps latents (k).

## Latent attention

Nine model types (axk1, bailing_hybrid, deepseek_v2, deepseek_v3, glm4_moe_lite, kimi_linear, longcat_flash, minicpm3,
youtu) make the keys and values of all heads of a position from one latent. Their pages keep the latent and the rotated part
of the key, once for all heads: LayerSpec.shared. The linear that expands them is split by head when it is loaded
(`layers/latent.py`), its first half multiplied to the queries, its second to the results. It keeps the model's dtype where
other linears are quantized, and is widened where the checkpoint stores it with few bits.

`models/replacements/latent.py` recognises such a module by what its method `expand_kv` computes on the twin. Where that is
anything else than one linear and a copy, or the twin's answers change, keys and values are written out as before. Prompts
and decoded tokens are computed in the same way, because expanding only where many rows come together would make bits depend
on how a prompt was cut. That costs prompts something: a score is a product of 576 numbers instead of 192 for DeepSeek's
sizes.
Prefix cache, drafts, copies of pages and a cache of int8 (one scale for latent and rotated part of a position) work as with
other models. Models with a sparse indexer (deepseek_v32, glm_moe_dsa, hy_v4, axk2, dots3_note) run per sequence on the
library's own cache.

Measured with `python bench/latent.py` (DeepSeek-V2-Lite's attention, 3 layers, bfloat16, two cores of a Zen 3 that others
used too, both ways in alternation in one process): a position takes 3,456 bytes instead of 30,720; a token behind 4,096
positions comes 1.11 times as fast, behind 16,384 1.48 times; 512 tokens of a prompt take 1.2 of the time at its beginning
and 1.9 behind 3,584. AVX2 multiplies bfloat16 as float32, and there 16 heads on one latent are bound by products; what a
processor with bfloat16 products makes of it is not measured.

## Routers

Many mixtures of experts multiply with a parameter of their own where others have a linear (deepseek_v3, qwen3_moe, mixtral
and most of the library's newer ones). That product is replaced, too (`OwnProduct` in `models/replacements/replaced.py`):
the forward is the library's, and finds our product under the name of PyTorch's. So a row's bits do not depend on how its
prompt was cut.
What follows is PyTorch's: its sigmoid computes numbers behind the last whole vector of 16 in another way, so that with a
number of experts that is no multiple of 16 last digits may still depend on the cut (`tests/models/test_chunks.py`).

## Where answers are not those of `generate`

- **Longrope across the original length** (phi3 and its kind). The library computes all keys of a sequence anew when it
  grows past the length that the model was first trained with. quire keeps the keys of positions before it as they were,
  because they may be shared with others; a prompt that is longer from the start is the same in both.

What the library's attention gives is the yardstick, and some models have two that disagree: for Falcon with ALiBi the eager
one adds the biases twice (to the scores, and with the mask), the default one once. Both are tried on the twin; where they
disagree the default one counts, and the model runs on it as a whole (tier C).

| model type | class | tier | equal | largest difference | replaced | remarks |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else list(architectures())
    outcomes = enumerate_architectures(chosen, report=_tell)
    counts = Counter(tier_of(outcome) for outcome in outcomes)
    print({tier: counts[tier] for tier in TIERS}, f"{sum(outcome.seconds for outcome in outcomes):.0f} s of work")
    if len(sys.argv) == 1:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(outcomes))
        expected = {outcome.model_type: tier_of(outcome) for outcome in outcomes if not outcome.error}
        EXPECTED.write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")
    return 0


def tier_of(outcome: Outcome) -> str:
    """The tier on which an architecture is equal; "none" when it is not."""
    return "none" if outcome.error else outcome.tier


def document(outcomes: list[Outcome]) -> str:
    """The text of docs/models.md."""
    counts = Counter(tier_of(outcome) for outcome in outcomes)
    head = INTRODUCTION.format(
        version=transformers.__version__,
        torch=torch.__version__,
        equal=len(outcomes) - counts["none"],
        tried=len(outcomes),
        **{tier: counts[tier] for tier in TIERS},
    )
    return head + "".join(_row(outcome) for outcome in outcomes)


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

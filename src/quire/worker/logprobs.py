"""Log-probabilities and ranks of chosen, top and prompt tokens.

Functions of logits alone; which rows want them, and from which logits, is decided in sampler.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from quire.core.plan import TokenLogprobs
from quire.kernels.table import Ops

FEW = 256  # tokens of a row that are compared with all the others each, which takes memory; more are looked up in order

LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]


def token_logprobs(
    ops: Ops,
    logits: torch.Tensor,
    chosen: torch.Tensor,
    wanted: list[int],
    mode: LogprobsMode,
    named: Mapping[int, Sequence[int]] | None = None,
) -> list[TokenLogprobs]:
    """For each row of `logits` [R, V]: the chosen token (int64 [R]), then the wanted[row] best (-1: all of them).

    `named` has the rows that want certain tokens instead of the best. In the two logits modes the raw scores take the
    place of log-probabilities. The rank of a token is the number of those at least as likely, itself included.
    """
    vocab = logits.shape[1]
    counts = [vocab if count == -1 else min(count, vocab) for count in wanted]
    ranked = ops.rank(logits, chosen, max(counts, default=0))
    ids = torch.cat([chosen[:, None], ranked.best], 1)
    scores = logits.gather(1, ids).double()
    if not mode.endswith("logits"):
        scores -= ranked.log_sums[:, None]
    found = [
        TokenLogprobs(tuple(row_ids[: count + 1]), tuple(row_scores[: count + 1]), (rank, *range(1, count + 1)))
        for row_ids, row_scores, rank, count in zip(
            ids.tolist(), scores.float().tolist(), ranked.ranks.tolist(), counts, strict=True
        )
    ]
    for row, tokens in (named or {}).items():
        shift = 0.0 if mode.endswith("logits") else ranked.log_sums[row]
        found[row] = _of_ids(logits[row], [int(chosen[row]), *tokens], shift)
    return found


def _of_ids(logits: torch.Tensor, ids: list[int], log_sum: torch.Tensor | float) -> TokenLogprobs:
    """The entry of a row [V] for these tokens."""
    picked = logits[ids]
    if len(ids) > FEW:
        ranks = len(logits) - torch.searchsorted(logits.sort().values, picked)
    else:
        ranks = (logits[None, :] >= picked[:, None]).sum(-1)
    return TokenLogprobs(tuple(ids), tuple((picked.double() - log_sum).float().tolist()), tuple(ranks.tolist()))


def filtered(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor
) -> torch.Tensor:
    """Float32 logits [R, V] divided by the temperature, with what min_p, top_k and top_p drop at -inf.

    The same rules as the op `sample`, for reporting the distribution that it draws from. Rows of temperature 0 are
    returned as they are.
    """
    greedy = (temperature == 0)[:, None]
    scaled = logits / torch.where(greedy, 1.0, temperature[:, None])
    weights = torch.exp(scaled - scaled.amax(-1, keepdim=True))
    kept = weights >= min_p[:, None]
    ordered, order = torch.where(kept, weights, 0.0).sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, logits.shape[1]).clamp(max=logits.shape[1]).long() - 1
    ordered = torch.where(ordered >= ordered.gather(1, last[:, None]), ordered, 0.0).double()
    before = ordered.cumsum(-1) - ordered
    share = top_p.double()[:, None]
    chosen = ((before < share * ordered.sum(-1, keepdim=True)) | (share >= 1)) & (ordered > 0)
    chosen[:, 0] = True
    kept = torch.zeros_like(chosen).scatter_(1, order, chosen)
    return torch.where(kept | greedy, scaled, float("-inf"))

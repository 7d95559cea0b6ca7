"""Log-probabilities and ranks of chosen, top and prompt tokens.

Functions of logits alone; which rows want them, and from which logits, is decided in sampler.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from quire.core.plan import TokenLogprobs

LogprobsMode = Literal["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]

ROWS_AT_ONCE = 64  # bounds the float32 copies when a long prompt asks for all of its log-probabilities


def token_logprobs(
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
    found: list[TokenLogprobs] = []
    for first in range(0, logits.shape[0], ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        scores = _scores(logits[part], mode)
        found.extend(_part(scores, chosen[part], wanted[part]))
        for row in range(first, first + scores.shape[0]):
            if named and row in named:
                found[row] = _of_ids(scores[row - first], [int(chosen[row]), *named[row]])
    return found


def _scores(logits: torch.Tensor, mode: LogprobsMode) -> torch.Tensor:
    return logits.float() if mode.endswith("logits") else torch.log_softmax(logits.float(), dim=-1)


def _of_ids(scores: torch.Tensor, ids: list[int]) -> TokenLogprobs:
    """The entry of a row [V] for these tokens."""
    picked = scores[ids]
    ranks = (scores[None, :] >= picked[:, None]).sum(-1)
    return TokenLogprobs(tuple(ids), tuple(picked.tolist()), tuple(ranks.tolist()))


def _part(scores: torch.Tensor, chosen: torch.Tensor, wanted: list[int]) -> list[TokenLogprobs]:
    picked = scores.gather(1, chosen[:, None])
    ranks = (scores >= picked).sum(-1).tolist()
    vocab = scores.shape[1]
    counts = [vocab if count == -1 else min(count, vocab) for count in wanted]
    most = max(counts)
    best = _best(scores, most) if most else None
    ids = best.tolist() if best is not None else [[]] * len(counts)
    values = scores.gather(1, best).tolist() if best is not None else [[]] * len(counts)
    tokens, firsts = chosen.tolist(), picked[:, 0].tolist()
    return [
        TokenLogprobs(
            (tokens[row], *ids[row][:count]),
            (firsts[row], *values[row][:count]),
            (ranks[row], *range(1, count + 1)),
        )
        for row, count in enumerate(counts)
    ]


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The ids [R, count] of the largest of each row [V], of equals the lowest id first.

    The ids of topk will not do: how it breaks ties depends on `count`, and so on what the neighbours in the batch want.
    """
    least = scores.topk(count, dim=-1).values[:, -1:]
    # Row by row, ids in order; more than `count` where there are ties. In a row with NaN they count as the largest.
    rows, ids = (scores < least).logical_not_().nonzero(as_tuple=True)
    order = scores[rows, ids].sort(descending=True, stable=True).indices
    order = order[rows[order].sort(stable=True).indices]
    rows, ids = rows[order], ids[order]
    places = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    return ids[places < count].view(len(scores), count)


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

"""Choosing tokens in plain PyTorch: arg-max, random numbers, sampling, what log-probabilities are made of, and scores: what
is forbidden, penalties.

A part of reference.py, which says what holds for all ops.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Ranked:
    """Of each row of logits: log(sum(exp(logits))), how many are at least as large as the chosen one, and the ids of the
    largest, of equals the lowest id first."""

    log_sums: torch.Tensor  # float64 [R]: float32 would lose the digits of what is nearly certain
    ranks: torch.Tensor  # int64 [R]
    best: torch.Tensor  # int64 [R, count]


@dataclass(slots=True)
class Said:
    """Rows of logits with penalties and where the tokens that they said lie, all [n] on the host: row of the logits, row
    of the tokens, the end of the prompt and of the output there (int64), and the penalties (float32)."""

    rows: torch.Tensor
    slots: torch.Tensor
    firsts: torch.Tensor
    ends: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> int64 [R]: the first of equals; -1 where nothing can be chosen, see usable."""
    return torch.where(usable(logits), torch.argmax(logits, dim=-1), -1)


def _mix(z: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 on int64 bits; `>>` is made logical by masking the copied sign bits."""
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """seeds int64 [R], positions int64 [R] -> float64 [R] in [0, 1). A pure function of the two, 53 bits, the same on
    every device, so that any position can be drawn again anywhere."""
    golden = -0x61C8864680B583EB
    bits = _mix(_mix(seeds + golden) + (positions + 1) * golden)
    return ((bits >> 11) & 0x1FFFFFFFFFFFFF).double() * 2.0**-53


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """logits [R, V], the others [R] -> int64 [R]. Temperature 0 is argmax; -1 where nothing can be chosen, see usable.

    Of the weights exp((logit - largest) / temperature) in float32 those stay that are at least min_p of the largest;
    of these the top_k largest with all that equal the last of them (0: all); of these the smallest set of largest
    ones, lower ids first among equals, that holds top_p of their sum (1: all), at least one. The token is the first
    kept id, in vocabulary order, whose cumulative weight exceeds uniform * sum.
    """
    greedy = temperature == 0
    wide = logits.float()
    divisor = torch.where(greedy, 1.0, temperature.float())[:, None]
    weights = torch.exp((wide - wide.amax(-1, keepdim=True)) / divisor)
    weights = torch.where(weights >= min_p.to(weights)[:, None], weights, 0.0)
    scores, order = wide.sort(dim=-1, descending=True, stable=True)
    last = torch.where(top_k > 0, top_k, logits.shape[1]).clamp(max=logits.shape[1]).long() - 1
    bound = scores.gather(1, last[:, None])
    ordered = torch.where(scores >= bound, weights.gather(1, order), 0.0).double()
    before = ordered.cumsum(-1) - ordered
    share = top_p.double()[:, None]
    chosen = (before < share * ordered.sum(-1, keepdim=True)) | (share >= 1)
    chosen[:, 0] = True
    ordered = torch.where(chosen, ordered, 0.0)
    kept = torch.zeros_like(ordered).scatter_(1, order, ordered)
    total = kept.cumsum(-1)
    drawn = (total > uniform.double()[:, None] * total[:, -1:]).int().argmax(-1)
    return torch.where(greedy, argmax(logits), torch.where(usable(logits), drawn, -1))


def usable(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> bool [R]: whether a token can be chosen, none being NaN and the largest finite. It is not where a
    model went wrong, or where every token is forbidden."""
    return torch.isfinite(logits.amax(-1))


def rank(logits: torch.Tensor, chosen: torch.Tensor, count: int) -> Ranked:
    """logits [R, V], chosen int64 [R] -> what the log-probabilities of a row are made of; see Ranked."""
    wide = logits.float()
    ranks = (wide >= wide.gather(1, chosen[:, None])).sum(-1)
    best = _best(wide, count) if count else torch.empty(len(wide), 0, dtype=torch.int64, device=wide.device)
    largest = wide.amax(-1, keepdim=True)
    log_sums = largest[:, 0].double() + (wide - largest).exp().sum(-1).double().log()
    return Ranked(log_sums, ranks, best)


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


def scores(logits: torch.Tensor) -> torch.Tensor:
    """logits [R, V] -> a contiguous float32 copy, to be changed before tokens are chosen from it."""
    return logits.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def forbid(scores: torch.Tensor, allowed: torch.Tensor, rows: torch.Tensor) -> None:
    """Add minus infinity, in the contiguous float32 `scores` [R, V] in place, to the tokens of row rows[i] whose bits are 0
    in allowed[i]; allowed int32 [n, words of 32 tokens], the lowest bit first; rows int64 [n], each another one."""
    bits = allowed[:, :, None] >> torch.arange(32, dtype=torch.int32, device=allowed.device) & 1
    kept = bits.view(len(allowed), -1)[:, : scores.shape[1]] != 0
    scores.index_add_(0, rows, torch.where(kept, 0.0, float("-inf")))


def penalize(logits: torch.Tensor, tokens: torch.Tensor, said: Said) -> None:
    """Lower, in the contiguous float32 `logits` [R, V] in place, what rows have said before; tokens int32 [slots, width].

    Of each token of prompt and output once: a positive logit is divided by `repetition`, others are multiplied. Of each
    token of the output: `presence` is taken away, and `frequency` as often as it was said.
    """
    flat, device, vocab = logits.view(-1), logits.device, logits.shape[1]
    places = _places(logits, tokens, said, torch.zeros_like(said.ends))
    penalty = said.repetition.repeat_interleave(said.ends).to(device)
    scores = flat.index_select(0, places)
    # A token that comes twice is written twice, with the same value.
    flat.index_copy_(0, places, torch.where(scores > 0, scores / penalty, scores * penalty))
    places, counts = torch.unique(_places(logits, tokens, said, said.firsts), return_counts=True)
    by_row = torch.zeros(2, logits.shape[0])
    by_row[0, said.rows], by_row[1, said.rows] = said.presence, said.frequency
    presence, frequency = by_row.to(device)[:, places // vocab]
    flat.index_add_(0, places, -(presence + frequency * counts.float()))


def _places(logits: torch.Tensor, tokens: torch.Tensor, said: Said, firsts: torch.Tensor) -> torch.Tensor:
    """Where, in the flattened logits, the tokens from `firsts` to the ends of the rows lie; row after row."""
    counts = said.ends - firsts
    before = counts.cumsum(0) - counts
    starts = said.slots * tokens.stride(0) + firsts - before
    index = torch.arange(int(counts.sum())) + starts.repeat_interleave(counts)
    offsets = (said.rows * logits.shape[1]).repeat_interleave(counts)
    return tokens.view(-1).index_select(0, index.to(logits.device)).long() + offsets.to(logits.device)

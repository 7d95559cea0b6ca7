"""Choosing tokens on a native library: arg-max, sampling, random numbers, log-probabilities, scores and penalties.

A part of CpuOps; kernels/choosing.py says what each op means.
"""

from __future__ import annotations

from ctypes import byref

import torch

from quire.kernels import choosing
from quire.kernels.choosing import Ranked, Said
from quire.kernels.cpu import native
from quire.kernels.cpu.packing import CODES


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] whose elements lie side by side; the rows themselves may stand apart."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


class NativeChoosing:
    """The ops that end a step, on one library."""

    def __init__(self, library: native.Library) -> None:
        self._lib = library

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        code = CODES.get(logits.dtype)
        if code is None:
            return choosing.argmax(logits)
        rows, out = _rows(logits), torch.empty(logits.shape[0], dtype=torch.int64)
        self._lib.quire_argmax(code, rows.data_ptr(), rows.stride(0), out.data_ptr(), rows.shape[0], rows.shape[1])
        return out

    def uniform(self, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seeds, positions = seeds.contiguous(), positions.contiguous()
        out = torch.empty(seeds.shape, dtype=torch.float64)
        self._lib.quire_uniform(seeds.data_ptr(), positions.data_ptr(), out.data_ptr(), seeds.shape[0])
        return out

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        code = CODES.get(logits.dtype)
        if code is None:
            return choosing.sample(logits, temperature, top_k, top_p, min_p, uniform)
        rows, out = _rows(logits), torch.empty(logits.shape[0], dtype=torch.int64)
        temperature, top_p, min_p = (x.float().contiguous() for x in (temperature, top_p, min_p))
        top_k, uniform = top_k.long().contiguous(), uniform.double().contiguous()
        self._lib.quire_sample(
            code,
            rows.data_ptr(),
            rows.stride(0),
            temperature.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            uniform.data_ptr(),
            out.data_ptr(),
            rows.shape[0],
            rows.shape[1],
        )
        return out

    def rank(self, logits: torch.Tensor, chosen: torch.Tensor, count: int) -> Ranked:
        code = CODES.get(logits.dtype)
        if code is None:
            return choosing.rank(logits, chosen, count)
        rows, chosen = _rows(logits), chosen.contiguous()
        height, vocab = rows.shape
        ids, places = torch.empty(height, count, dtype=torch.int64), torch.empty(height, dtype=torch.int64)
        found = Ranked(torch.empty(height, dtype=torch.float64), places, ids)
        call = native.RankStruct(
            rows.data_ptr(),
            chosen.data_ptr(),
            found.log_sums.data_ptr(),
            found.ranks.data_ptr(),
            found.best.data_ptr(),
            rows.stride(0),
            count,
            height,
            vocab,
            code,
        )
        self._lib.quire_rank(byref(call))
        return found

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        code = CODES.get(logits.dtype)
        if code is None:
            return choosing.scores(logits)
        rows, out = _rows(logits), torch.empty(logits.shape, dtype=torch.float32)
        self._lib.quire_scores(code, rows.data_ptr(), rows.stride(0), out.data_ptr(), rows.shape[0], rows.shape[1])
        return out

    def forbid(self, scores: torch.Tensor, allowed: torch.Tensor, rows: torch.Tensor) -> None:
        allowed, rows = allowed.contiguous(), rows.contiguous()
        count, words = allowed.shape
        self._lib.quire_forbid(scores.data_ptr(), allowed.data_ptr(), words, rows.data_ptr(), count, scores.shape[1])

    def penalize(self, logits: torch.Tensor, tokens: torch.Tensor, said: Said) -> None:
        parts = [said.rows, said.slots, said.firsts, said.ends, said.repetition, said.presence, said.frequency]
        parts = [part.contiguous() for part in parts]
        call = native.PenaltiesStruct(
            logits.data_ptr(),
            tokens.data_ptr(),
            *(part.data_ptr() for part in parts),
            logits.shape[1],
            tokens.stride(0),
            len(said.rows),
        )
        self._lib.quire_penalize(byref(call))

"""How far the candidate's next-token distribution is from the reference's, position by position.

    accumulator = Accumulator()
    accumulator.add(reference_logits, candidate_logits)     # [n, vocab] each, as often as needed
    accumulator.metrics()

KL(reference || candidate) = sum_v p_v (log p_v - log q_v), in nats, over log-softmax in float64. Its own
rounding noise is about 1e-16, which can fall below zero; values are clipped at 0. Only a few rows are ever
held in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits

ROWS_AT_ONCE = 16

TIE_ULPS = 2
"""Two tokens are tied where the reference's logits of them are at most so many float32 ulps of the larger
apart."""


@dataclass(frozen=True)
class Metrics:
    """Positions compared and what came out.

    positions = agreements + ties + disagreements. A disagreement is a position where the candidate's best
    token is not the reference's; a tie is one where it is not, yet the reference itself holds both equal
    (TIE_ULPS). Positions with a NaN or an infinity count as disagreements and enter no other figure. kl_*
    are in nats, p99 by nearest rank; logit_diff_* are |candidate - reference|. All five are None when no
    position was finite. non_finite counts logits, of either side.
    """

    positions: int
    agreements: int
    ties: int
    disagreements: int
    kl_mean: float | None
    kl_p99: float | None
    kl_max: float | None
    logit_diff_mean: float | None
    logit_diff_max: float | None
    non_finite: int

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where both sides' best token is the same, ties aside; None without positions."""
        return (self.agreements + self.ties) / self.positions if self.positions else None


class Accumulator:
    """Takes pairs of logits chunk by chunk; holds eight bytes a position."""

    def __init__(self) -> None:
        self._kl: list[float] = []
        self._agreements = self._ties = self._disagreements = self._non_finite = 0
        self._diff_sum = self._diff_max = 0.0
        self._diff_count = 0

    def add(self, reference: Logits, candidate: Logits) -> None:
        """Compares logits [n, vocab] float32 of the same n positions. Raises ValueError when the shapes
        differ."""
        if reference.shape != candidate.shape or reference.ndim != 2:
            raise ValueError(f"logits of shapes {reference.shape} and {candidate.shape} cannot be compared")
        for row in range(0, len(reference), ROWS_AT_ONCE):
            self._add(reference[row : row + ROWS_AT_ONCE], candidate[row : row + ROWS_AT_ONCE])

    def _add(self, reference: Logits, candidate: Logits) -> None:
        bad_r, bad_c = ~np.isfinite(reference), ~np.isfinite(candidate)
        self._non_finite += int(bad_r.sum()) + int(bad_c.sum())
        finite = ~(bad_r | bad_c).any(axis=-1)
        self._disagreements += int((~finite).sum())
        reference, candidate = reference[finite], candidate[finite]
        if not len(reference):
            return
        self._top1(reference, candidate)

        r, c = reference.astype(np.float64), candidate.astype(np.float64)
        diff = np.abs(c - r)
        self._diff_sum += float(diff.sum())
        self._diff_max = max(self._diff_max, float(diff.max()))
        self._diff_count += diff.size
        log_p, log_q = _log_softmax(r), _log_softmax(c)
        kl = np.einsum("nv,nv->n", np.exp(log_p), log_p - log_q)
        self._kl.extend(np.maximum(kl, 0.0).tolist())

    def _top1(self, reference: Logits, candidate: Logits) -> None:
        rows = np.arange(len(reference))
        best = reference.max(axis=-1)
        chosen = reference[rows, candidate.argmax(axis=-1)]
        same = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
        tied = ~same & (best - chosen <= TIE_ULPS * np.spacing(np.abs(best)))
        self._agreements += int(same.sum())
        self._ties += int(tied.sum())
        self._disagreements += int((~same & ~tied).sum())

    def metrics(self) -> Metrics:
        """The figures of everything added so far."""
        kl = np.array(self._kl)
        some = len(kl) > 0
        return Metrics(
            positions=self._agreements + self._ties + self._disagreements,
            agreements=self._agreements,
            ties=self._ties,
            disagreements=self._disagreements,
            kl_mean=float(kl.mean()) if some else None,
            kl_p99=float(np.quantile(kl, 0.99, method="inverted_cdf")) if some else None,
            kl_max=float(kl.max()) if some else None,
            logit_diff_mean=self._diff_sum / self._diff_count if some else None,
            logit_diff_max=self._diff_max if some else None,
            non_finite=self._non_finite,
        )


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log softmax over the last axis, in place."""
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x

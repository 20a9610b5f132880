"""How far the candidate's next-token distribution is from the reference's, position by position.

    accumulator = Accumulator()
    accumulator.add(reference_logits, candidate_logits,           # [n, vocab] each, as often as needed
                    where=[Where(probe, position), ...], following=[next token of the text or None, ...])
    accumulator.metrics()
    accumulator.worst(16)

KL(reference || candidate) = sum_v p_v (log p_v - log q_v), in nats; `streaming` says how it is computed. Figures
depend on no order: quantiles and means are taken over all positions at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits
from gptoss_export.validators.binomial import median_below
from gptoss_export.validators.streaming import NO_TEXT, ROW, Float64, Rows, compare

TIE_ULPS = 2
"""Two tokens are tied where the reference's logits of them are at most so many float32 ulps of the larger
apart."""

HISTOGRAM_EDGES = tuple(float(f"{10.0 ** (k / 4):.6e}") for k in range(-64, 9))
"""Edges of `Metrics.kl_histogram`: quarter decades of nats from 1e-16 to 1e2."""

BUCKETS = 256
UNPLACED = -1


@dataclass(frozen=True)
class Metrics:
    """Positions compared and what came out.

    positions = agreements + ties + disagreements. A disagreement is a position where the candidate's best token is
    not the reference's; a tie is one where it is not, yet the reference itself holds both equal (TIE_ULPS).
    Positions with a NaN or an infinity count as disagreements and enter no other figure; non_finite counts such
    logits, of either side. Every float is None when no position was finite.

    kl_*, reverse_kl_*: nats; quantiles by nearest rank. Reverse is KL(candidate || reference). kl_median_low: what the
    median of all positions of such texts is at least, by the sign test (`binomial.median_below`); 0 where they are too
    few to say.
    top5_overlap, top10_overlap: mean share of the candidate's k best tokens that are the reference's too, of
    min(k, vocabulary). rank_*: place of the reference's best token in the candidate's order, 1 the best, equals in
    its favour. logit_diff_*: |candidate - reference| after each row's mean difference is removed (it has no effect).
    cosine_*: of a position's logits, each side's mean removed.

    text_positions: positions whose next token of the text is known; without any, text_* and perplexity_* are None.
    text_prob_diff_mean: signed mean of q - p at that token; text_prob_diff_max: largest |q - p|.
    perplexity_ratio: exp(mean(log p - log q)), candidate's over reference's; _se: its standard error by the delta
    method, None below two positions. A perplexity beyond what a float holds is None.

    kl_histogram: positions by KL between HISTOGRAM_EDGES, a value on an edge above it; the first count is of
    everything below, zero included, the last of everything from the last edge on.
    """

    positions: int
    agreements: int
    ties: int
    disagreements: int
    non_finite: int
    kl_mean: float | None
    kl_median: float | None
    kl_median_low: float | None
    kl_p99: float | None
    kl_p999: float | None
    kl_max: float | None
    reverse_kl_mean: float | None
    reverse_kl_max: float | None
    top5_overlap: float | None
    top10_overlap: float | None
    rank_mean: float | None
    rank_max: float | None
    logit_diff_mean: float | None
    logit_diff_max: float | None
    cosine_mean: float | None
    cosine_min: float | None
    text_positions: int
    text_prob_diff_mean: float | None
    text_prob_diff_max: float | None
    perplexity_reference: float | None
    perplexity_candidate: float | None
    perplexity_ratio: float | None
    perplexity_ratio_se: float | None
    kl_histogram: tuple[int, ...]

    @property
    def top1_agreement(self) -> float | None:
        """Share of positions where both sides' best token is the same, ties aside; None without positions."""
        return (self.agreements + self.ties) / self.positions if self.positions else None


@dataclass(frozen=True)
class Where:
    """Which position of which probe, by index, a row of logits belongs to."""

    probe: int
    position: int


@dataclass(frozen=True)
class WorstPosition:
    """One of the positions with the largest KL (nats), the best token of either side, and the text's own."""

    probe: int
    position: int
    kl: float
    reference_token: int
    candidate_token: int
    following: int | None


@dataclass(frozen=True)
class PositionBucket:
    """KL (nats) over the positions of one probe from start up to, not including, stop."""

    start: int
    stop: int
    kl_mean: float
    kl_max: float


class Accumulator:
    """Takes pairs of logits chunk by chunk; holds 108 bytes a position, no logits."""

    def __init__(self) -> None:
        self._rows: list[Rows] = []
        self._agreements = self._ties = self._disagreements = self._non_finite = 0

    def add(
        self,
        reference: Logits,
        candidate: Logits,
        *,
        where: Sequence[Where] | None = None,
        following: Sequence[int | None] | None = None,
    ) -> None:
        """Compares logits [n, vocab] float32 of the same n positions.

        where [n]: what `worst` and `by_position` name them by; rows without it are in neither. following [n]: the
        text's token after each position, None where the text ends. Raises ValueError when shapes or lengths differ
        or a following token is outside of the vocabulary.
        """
        if reference.shape != candidate.shape or reference.ndim != 2:
            raise ValueError(f"logits of shapes {reference.shape} and {candidate.shape} cannot be compared")
        n, vocab = reference.shape
        if any(given is not None and len(given) != n for given in (where, following)):
            raise ValueError(f"`where` or `following` is not about {n} positions")
        if following is not None and not all(token is None or 0 <= token < vocab for token in following):
            raise ValueError(f"a following token is outside of the vocabulary of {vocab}")
        tokens = np.array([NO_TEXT if t is None else t for t in following or [None] * n], np.int64)

        finite = _finite(reference) & _finite(candidate)
        if not finite.all():
            self._disagreements += int((~finite).sum())
            self._non_finite += sum(int((~np.isfinite(side[~finite])).sum()) for side in (reference, candidate))
            reference, candidate, tokens = reference[finite], candidate[finite], tokens[finite]
        if not len(reference):
            return
        rows = compare(reference, candidate, tokens)
        at = [Where(UNPLACED, 0)] * n if where is None else where
        rows["probe"] = np.array([w.probe for w in at])[finite]
        rows["position"] = np.array([w.position for w in at])[finite]
        self._rows.append(rows)
        self._top1(reference, rows)

    def _top1(self, reference: Logits, rows: Rows) -> None:
        each = np.arange(len(rows))
        best, chosen = (reference[each, rows[name]] for name in ("reference_token", "candidate_token"))
        same = rows["reference_token"] == rows["candidate_token"]
        # spacing() is negative for negative numbers, and best - chosen may overflow to infinity: no tie.
        with np.errstate(over="ignore"):
            margin = best - chosen
            tied = ~same & (margin <= TIE_ULPS * np.spacing(np.abs(best)))
        rows["margin"] = np.where(same | tied, 0.0, np.minimum(margin, np.finfo(np.float32).max))
        self._agreements += int(same.sum())
        self._ties += int(tied.sum())
        self._disagreements += int((~same & ~tied).sum())

    def metrics(self) -> Metrics:
        """The figures of everything added so far."""
        rows = self._all()
        kl = rows["kl"]
        text = rows[rows["following"] != NO_TEXT]
        ratio = _exp(text["log_ratio"].mean()) if len(text) else None
        spread = text["log_ratio"].std(ddof=1) / np.sqrt(len(text)) if len(text) > 1 else None
        return Metrics(
            positions=self._agreements + self._ties + self._disagreements,
            agreements=self._agreements,
            ties=self._ties,
            disagreements=self._disagreements,
            non_finite=self._non_finite,
            kl_mean=_mean(kl),
            kl_median=_quantile(kl, 0.5),
            kl_median_low=_median_low(kl),
            kl_p99=_quantile(kl, 0.99),
            kl_p999=_quantile(kl, 0.999),
            kl_max=_max(kl),
            reverse_kl_mean=_mean(rows["reverse_kl"]),
            reverse_kl_max=_max(rows["reverse_kl"]),
            top5_overlap=_mean(rows["top5"]),
            top10_overlap=_mean(rows["top10"]),
            rank_mean=_mean(rows["rank"]),
            rank_max=_max(rows["rank"]),
            logit_diff_mean=_mean(rows["diff_mean"]),
            logit_diff_max=_max(rows["diff_max"]),
            cosine_mean=_mean(rows["cosine"]),
            cosine_min=float(rows["cosine"].min()) if len(rows) else None,
            text_positions=len(text),
            text_prob_diff_mean=_mean(text["prob_diff"]),
            text_prob_diff_max=_max(np.abs(text["prob_diff"])),
            perplexity_reference=_exp(-text["log_p"].mean()) if len(text) else None,
            perplexity_candidate=_exp(max((text["log_ratio"] - text["log_p"]).mean(), 0.0)) if len(text) else None,
            perplexity_ratio=ratio,
            perplexity_ratio_se=None if ratio is None or spread is None else _finite_float(ratio * spread),
            kl_histogram=_histogram(kl),
        )

    def worst(self, count: int) -> tuple[WorstPosition, ...]:
        """The `count` positions with the largest KL, worst first; each once, however often it was compared."""
        rows = self.placed()
        found: dict[tuple[int, int], WorstPosition] = {}
        for row in rows[np.lexsort((rows["position"], rows["probe"], -rows["kl"]))]:
            if len(found) >= count:
                break
            place = int(row["probe"]), int(row["position"])
            following = None if row["following"] == NO_TEXT else int(row["following"])
            tokens = int(row["reference_token"]), int(row["candidate_token"])
            found.setdefault(place, WorstPosition(*place, float(row["kl"]), *tokens, following))
        return tuple(found.values())

    def by_position(self) -> Mapping[int, tuple[PositionBucket, ...]]:
        """KL along each probe that was compared, in at most BUCKETS equal spans from position 0 to the last one
        compared; spans without a compared position are left out."""
        rows = self.placed()
        found = {}
        for probe in np.unique(rows["probe"]):
            mine = rows[rows["probe"] == probe]
            length = int(mine["position"].max()) + 1
            width = -(-length // BUCKETS)
            mine = mine[np.argsort(mine["position"], kind="stable")]
            spans, firsts = np.unique(mine["position"] // width, return_index=True)
            found[int(probe)] = tuple(
                PositionBucket(int(k) * width, min((int(k) + 1) * width, length), float(kl.mean()), float(kl.max()))
                for k, kl in zip(spans, np.split(mine["kl"], firsts[1:]), strict=True)
            )
        return found

    def _all(self) -> Rows:
        self._rows = [np.concatenate([np.empty(0, ROW), *self._rows])]
        return self._rows[0]

    def placed(self) -> Rows:
        """A row for each comparison that `where` was given for, as `streaming.ROW` says."""
        rows = self._all()
        placed: Rows = rows[rows["probe"] != UNPLACED]
        return placed


def _finite(logits: Logits) -> NDArray[np.bool_]:
    """Whether each row is finite throughout; a NaN is both its largest and its smallest entry."""
    finite: NDArray[np.bool_] = np.isfinite(logits.max(axis=-1)) & np.isfinite(logits.min(axis=-1))
    return finite


def _mean(values: Float64) -> float | None:
    return float(values.mean()) if len(values) else None


def _max(values: Float64) -> float | None:
    return float(values.max()) if len(values) else None


def _quantile(values: Float64, q: float) -> float | None:
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else None


def _median_low(values: Float64) -> float | None:
    if not len(values):
        return None
    rank = median_below(len(values))
    return 0.0 if rank is None else float(np.partition(values, rank)[rank])


def _exp(value: float) -> float | None:
    with np.errstate(over="ignore"):
        return _finite_float(np.exp(value))


def _finite_float(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _histogram(kl: Float64) -> tuple[int, ...]:
    bins = np.searchsorted(HISTOGRAM_EDGES, kl, side="right")
    return tuple(np.bincount(bins, minlength=len(HISTOGRAM_EDGES) + 1).tolist())

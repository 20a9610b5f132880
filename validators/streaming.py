"""Logits against logits, row by row, in float64 over slices of the vocabulary.

With d = candidate - reference and x = d - d[best token of the reference], a row's divergences are

    KL(p || q) = log1p(E_p[expm1(x)]) - E_p[x]
    KL(q || p) = (E_p[x] + E_p[x expm1(x)]) / (1 + E_p[expm1(x)]) - log1p(E_p[expm1(x)])

which is sum_v p_v (log p_v - log q_v) rearranged so that rounding is relative to x, not to 1: a divergence of
1e-13 keeps nine digits, where a difference of two log-softmaxes keeps two. Of a row no more than a slice is ever
held in float64; where expm1 overflows (logits hundreds of nats apart) the row is done again by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.runner import Logits

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

ROWS_AT_ONCE = 32
SLICE = 1024
"""Five buffers of 32 x 1024 in float64, 1.3 MB, about fit a core's second-level cache."""

FOLDS = 16
"""Of a long row this many strands are laid over each other, whose maxima bound the k-th largest from below."""

NO_TEXT = -1
TOP = (5, 10)

ROW = np.dtype(
    [
        ("probe", "<i4"),
        ("position", "<i4"),
        ("reference_token", "<i4"),
        ("candidate_token", "<i4"),
        ("following", "<i4"),
        ("rank", "<i4"),
        ("margin", "<f4"),
        ("kl", "<f8"),
        ("reverse_kl", "<f8"),
        ("top5", "<f8"),
        ("top10", "<f8"),
        ("diff_mean", "<f8"),
        ("diff_max", "<f8"),
        ("cosine", "<f8"),
        ("log_p", "<f8"),
        ("log_ratio", "<f8"),
        ("prob_diff", "<f8"),
    ]
)
"""What is kept of a row: 108 bytes. margin: how much larger the reference holds its best token than the candidate's, 0
where both are the same; left to the caller, as `probe` and `position` are. log_p: the reference's log-probability of
the text's next token, log_ratio: log p - log q of it, prob_diff: q - p of it; NaN where `following` is NO_TEXT."""

Rows = NDArray[np.void]


def compare(reference: Logits, candidate: Logits, following: Indices) -> Rows:
    """Figures [n] ROW of finite logits [n, vocab] float32; following [n]: the text's next tokens or NO_TEXT.

    `probe`, `position` and `margin` are left to the caller.
    """
    rows = np.zeros(len(reference), ROW)
    # Once for all blocks: fresh memory costs more than what is computed in it.
    scratch = np.empty((5, ROWS_AT_ONCE * SLICE))
    for at in range(0, len(rows), ROWS_AT_ONCE):
        block = slice(at, at + ROWS_AT_ONCE)
        rows["following"][block] = following[block]
        _block(np.ascontiguousarray(reference[block]), np.ascontiguousarray(candidate[block]), rows[block], scratch)
    return rows


def _block(r: Logits, c: Logits, rows: Rows, scratch: Float64) -> None:
    each, vocab = np.arange(len(r)), r.shape[1]
    best = r.argmax(axis=-1)
    rows["reference_token"], rows["candidate_token"] = best, c.argmax(axis=-1)
    top = r[each, best].astype(np.float64)[:, None]
    shift = c[each, best].astype(np.float64)[:, None] - top
    _order(r, c, rows)

    total, mean_x, mean_u, mean_xu, sum_r, sum_c = np.zeros((6, len(r)))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for r64, c64, x, w, u in _slices(r, c, scratch):
            np.subtract(c64, r64, out=x)
            x -= shift
            np.subtract(r64, top, out=w)
            np.exp(w, out=w)
            np.expm1(x, out=u)
            total += w.sum(axis=-1)
            mean_x += np.vecdot(w, x)
            mean_u += np.vecdot(w, u)
            w *= u
            mean_xu += np.vecdot(w, x)
            sum_r += r64.sum(axis=-1)
            sum_c += c64.sum(axis=-1)
        for sums in (mean_x, mean_u, mean_xu):
            sums /= total
        gain = np.log1p(mean_u)  # log E_p[e^x] = log-sum-exp(c) - log-sum-exp(r) - shift
        kl = gain - mean_x
        reverse = (mean_x + mean_xu) / (1 + mean_u) - gain
    for row in np.flatnonzero(~np.isfinite(kl) | ~np.isfinite(reverse)):
        kl[row], reverse[row], gain[row] = _far(r[row], c[row], float(shift[row, 0]), scratch)
    rows["kl"], rows["reverse_kl"] = np.maximum(kl, 0.0), np.maximum(reverse, 0.0)

    _text(r, c, rows, log_sum=top[:, 0] + np.log(total), shift=shift[:, 0], gain=gain)
    _plain(r, c, rows, sum_r / vocab, sum_c / vocab, scratch)


def _slices(r: Logits, c: Logits, scratch: Float64) -> Iterator[tuple[Float64, Float64, Float64, Float64, Float64]]:
    """Slice after slice of the vocabulary: both sides in float64, and three more buffers of that size."""
    n, vocab = r.shape
    # SLICE for a full block, more for fewer rows, yet so few that BLAS starts no threads for their products.
    most = min(scratch.shape[1] // n, 8 * SLICE)
    for at in range(0, vocab, most):
        width = min(most, vocab - at)
        r64, c64, x, w, u = scratch[:, : n * width].reshape(5, n, width)
        r64[...], c64[...] = r[:, at : at + width], c[:, at : at + width]
        yield r64, c64, x, w, u


def _far(r: Logits, c: Logits, shift: float, scratch: Float64) -> tuple[float, float, float]:
    """KL, reverse KL and gain of a row [vocab] whose logits are too far apart for expm1."""
    top_r, top_c = float(r.max()), float(c.max())
    sum_p = sum_q = d_p = d_q = 0.0
    with np.errstate(under="ignore"):
        for r64, c64, d, w, _ in _slices(r[None], c[None], scratch):
            np.subtract(c64, r64, out=d)
            np.exp(np.subtract(r64, top_r, out=w), out=w)
            sum_p, d_p = sum_p + float(w.sum()), d_p + float(np.vecdot(w, d)[0])
            np.exp(np.subtract(c64, top_c, out=w), out=w)
            sum_q, d_q = sum_q + float(w.sum()), d_q + float(np.vecdot(w, d)[0])
    change = float(top_c - top_r + np.log(sum_q) - np.log(sum_p))
    return change - d_p / sum_p, d_q / sum_q - change, change - shift


def _text(r: Logits, c: Logits, rows: Rows, *, log_sum: Float64, shift: Float64, gain: Float64) -> None:
    """Log-probabilities of the text's next tokens."""
    known = rows["following"] != NO_TEXT
    each, token = np.arange(len(r)), np.where(known, rows["following"], 0)
    r_t, c_t = r[each, token].astype(np.float64), c[each, token].astype(np.float64)
    log_p, log_ratio = r_t - log_sum, gain - (c_t - r_t - shift)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        p, q = np.exp(log_p), np.exp(np.minimum(log_p - log_ratio, 0.0))
        # q - p would lose small changes; the other form overflows for large ones.
        prob_diff = np.where(np.abs(log_ratio) < 1, p * np.expm1(-log_ratio), q - p)
    for name, value in (("log_p", log_p), ("log_ratio", log_ratio), ("prob_diff", prob_diff)):
        rows[name] = np.where(known, value, np.nan)


def _plain(r: Logits, c: Logits, rows: Rows, mean_r: Float64, mean_c: Float64, scratch: Float64) -> None:
    """What is said of the logits themselves after each row's mean has been removed."""
    rr, cc, rc, diff_sum, diff_max = np.zeros((5, len(r)))
    for a, b, diff, _, _ in _slices(r, c, scratch):
        a -= mean_r[:, None]
        b -= mean_c[:, None]
        rr += np.vecdot(a, a)
        cc += np.vecdot(b, b)
        rc += np.vecdot(a, b)
        np.abs(np.subtract(b, a, out=diff), out=diff)
        diff_sum += diff.sum(axis=-1)
        np.maximum(diff_max, diff.max(axis=-1), out=diff_max)
    rows["diff_mean"], rows["diff_max"] = diff_sum / r.shape[1], diff_max
    norms = np.sqrt(rr) * np.sqrt(cc)
    # A row without any spread has no direction: it is like another such row, and like nothing else.
    flat = np.where((rr == 0) & (cc == 0), 1.0, 0.0)
    rows["cosine"] = np.clip(np.divide(rc, norms, out=flat, where=norms > 0), -1.0, 1.0)


def _order(r: Logits, c: Logits, rows: Rows) -> None:
    """Overlaps of the best tokens, and the rank of the reference's best one.

    Ties at the k-th place are in the candidate's favour: a token counts whose logit of the reference is not below
    the reference's k-th largest, and of the candidate's own equals those count first. Where the reference holds
    several tokens best, the rank is that of whichever the candidate likes best.
    """
    vocab = r.shape[1]
    most = min(TOP[-1], vocab)
    row_r, token_r, first_r = _candidates(r, most)
    row_c, token_c, first_c = _candidates(c, most)
    values_r, values_c = r[row_r, token_r], c[row_c, token_c]
    best_r, best_c = _descending(values_r, row_r, first_r, most), _descending(values_c, row_c, first_c, most)

    for name, k in zip(("top5", "top10"), TOP, strict=True):
        k = min(k, vocab)
        shared = r[row_c, token_c] >= best_r[row_c, k - 1]
        above, equal = values_c > best_c[row_c, k - 1], values_c == best_c[row_c, k - 1]
        sure, places, rivals = (_count(of, first_c) for of in (above & shared, above, equal & shared))
        rows[name] = (sure + np.minimum(k - places, rivals)) / k

    liked = np.maximum.reduceat(np.where(values_r == best_r[row_r, 0], c[row_r, token_r], -np.inf), first_r)
    better = _count(values_c > liked[row_c], first_c)
    for row in np.flatnonzero(liked < best_c[:, -1]):  # beyond the candidates
        better[row] = np.count_nonzero(c[row] > liked[row])
    rows["rank"] = better + 1


def _count(flags: NDArray[np.bool_], first: Indices) -> Indices:
    counts: Indices = np.add.reduceat(flags.astype(np.int64), first)
    return counts


def _descending(values: Logits, row: Indices, first: Indices, k: int) -> Logits:
    """The k largest values [n, k] of each row, largest first."""
    largest: Logits = values[np.lexsort((-values, row))][first[:, None] + np.arange(k)]
    return largest


def _candidates(logits: Logits, k: int) -> tuple[Indices, Indices, Indices]:
    """The k largest entries of each row [vocab], and few more: their rows, their tokens, and where each row's begin.

    A row is cut into FOLDS equal parts laid over each other; the k largest of the columns' maxima are k entries of
    the row, so the least of them is no more than its k-th largest.
    """
    n, vocab = logits.shape
    width = vocab // FOLDS
    if width < k:
        maxima = logits
    else:
        folded = logits[:, :width].copy()
        for at in range(width, width * FOLDS, width):
            np.maximum(folded, logits[:, at : at + width], out=folded)
        maxima = np.concatenate([folded, logits[:, width * FOLDS :]], axis=1)
    bound = np.partition(maxima, -k, axis=-1)[:, -k]
    row, token = np.divmod(np.flatnonzero(logits >= bound[:, None]), vocab)
    return row, token, np.searchsorted(row, np.arange(n))

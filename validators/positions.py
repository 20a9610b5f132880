"""Positions of texts as events: each counted once, however often it was asked for, and told apart by whether rounding
alone can send its token to another expert.

    texts = Texts(reference, noise)                      # noise: of each layer's router, see RoutingLayer.replay_error
    texts.settled_figures(accumulator.placed())          # of one scenario
    texts.pool([a.placed() for a in accumulators])       # all ways of asking, the worst of each position

A router picks the top-k of its logits, so where the last that it takes and the first that it leaves are nearly equal,
the last bit decides, and what follows is another text's hidden state. No kernel is exact enough to prevent that, and it
is no error. Whether it can happen is known beforehand, from the reference's own margins and from how noisy the
artifact's routers are. A position is settled where it cannot, in no layer, neither there nor before it in its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.routing import NOISE_FACTOR
from gptoss_export.validators.streaming import Rows

T = TypeVar("T", np.bool_, np.int64)


@dataclass(frozen=True)
class SettledFigures:
    """Of the settled positions among those that were compared: the largest KL (nats) and |logit difference|, None
    without any."""

    positions: int
    kl_max: float | None
    logit_diff_max: float | None


@dataclass(frozen=True)
class TextsRecord:
    """Every distinct position of the texts once, by the worst of all ways in which the artifact was asked for it.

    Positions are the same where the whole text up to there is. settled: how many of them are. kl_mean, kl_max: nats,
    None without a finite position. margins: by how much the reference prefers its best token at each position where
    another was the artifact's, largest first; ties are none.
    """

    positions: int
    settled: int
    kl_mean: float | None
    kl_max: float | None
    margins: tuple[float, ...]


class Texts:
    """The positions of a reference's probes, by the noise of an artifact's routers.

    noise: of each layer, None where it could not be measured: nothing is settled then.
    """

    def __init__(self, reference: Reference, noise: Sequence[float | None]) -> None:
        self._numbers = distinct(reference.probes)
        self._settled = [settled(reference, probe, noise) for probe in range(len(reference.probes))]

    def settled_figures(self, rows: Rows) -> SettledFigures:
        """rows: of one scenario, as `Accumulator.placed` gives them."""
        mine = rows[lookup(rows, self._settled)]
        if not len(mine):
            return SettledFigures(0, None, None)
        return SettledFigures(len(mine), float(mine["kl"].max()), float(mine["diff_max"].max()))

    def pool(self, scenarios: Sequence[Rows]) -> TextsRecord:
        """rows of every scenario."""
        rows = np.concatenate(scenarios)
        numbers = lookup(rows, self._numbers)
        count = 1 + max((int(row.max()) for row in self._numbers), default=-1)
        kl, margin, seen = np.zeros(count), np.zeros(count), np.zeros(count, np.bool_)
        np.maximum.at(kl, numbers, rows["kl"])
        np.maximum.at(margin, numbers, rows["margin"].astype(np.float64))
        seen[numbers] = True
        calm = np.ones(count, np.bool_)
        for places, flags in zip(self._numbers, self._settled, strict=True):
            calm[places] &= flags
        found = int(seen.sum())
        return TextsRecord(
            positions=found,
            settled=int((calm & seen).sum()),
            kl_mean=float(kl[seen].mean()) if found else None,
            kl_max=float(kl[seen].max()) if found else None,
            margins=tuple(np.sort(margin[margin > 0])[::-1].tolist()),
        )


def lookup(rows: Rows, of_probes: Sequence[NDArray[T]]) -> NDArray[T]:
    """For each row, as of `Accumulator.placed`, what is noted at its probe and position: [n] a probe, [rows]."""
    starts = np.cumsum([0, *map(len, of_probes)])[:-1]
    together: NDArray[T] = np.concatenate(of_probes)[starts[rows["probe"]] + rows["position"]]
    return together


def distinct(probes: Sequence[Probe]) -> list[NDArray[np.int64]]:
    """A number for each position of each probe: the same where the tokens up to there are the same."""
    known: dict[tuple[int, int], int] = {}
    found = []
    for probe in probes:
        at, numbers = -1, []
        for token in probe.ids:
            at = known.setdefault((at, token), len(known))
            numbers.append(at)
        found.append(np.array(numbers, np.int64))
    return found


def settled(reference: Reference, probe: int, noise: Sequence[float | None]) -> NDArray[np.bool_]:
    """Which positions of the probe are; see the module's first lines."""
    calm = np.ones(len(reference.probes[probe].ids), np.bool_)
    for layer, of_layer in enumerate(noise):
        least = np.inf if of_layer is None else NOISE_FACTOR * of_layer
        calm &= router_margins(reference.router_logits(layer, probe), reference.config.top_k) > least
    return np.logical_and.accumulate(calm)


def router_margins(logits: NDArray[np.float32], k: int) -> NDArray[np.float64]:
    """By how much the last of the k experts that are taken is above the best of those that are not: logits [n, E], [n];
    infinite where none is left out."""
    if k >= logits.shape[1]:
        return np.full(len(logits), np.inf)
    largest = -np.partition(-logits.astype(np.float64), (k - 1, k), axis=-1)
    margins: NDArray[np.float64] = largest[:, k - 1] - largest[:, k]
    return margins

"""Which experts the artifact sends its tokens to, layer by layer, against those of the reference.

    layers, worst = compare_layers(reference_logits, experts, router_errors, replay_errors)

The router picks the top-k of E logits, so a difference in the last bit can exchange an expert for another, and what
follows then differs by far more than a bit. A flip is therefore classed by its margin: how much larger the reference
held the logit of the expert that was left out than the one that was taken instead.

    tie          the reference itself holds both equal, to TIE_ULPS float32 ulps
    near-tie     within NEAR_ULPS bfloat16 ulps, or within NOISE_FACTOR times what the artifact's router is off by when
                 all layers before it send every token where the reference does
    consequence  more than that, after a flip in a lower layer at this position or one before it: its input is another
    divergence   more than that, and nothing below it flipped: an error came in, or the router is wrong
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_export.validators.metrics import TIE_ULPS, Metrics

NEAR_ULPS = 2
NOISE_FACTOR = 4.0
"""A margin of so many times a router's noise cannot be closed by it: both logits may be off, either way, and by twice
of what the positions at hand happen to show."""

WORST_FLIPS = 20
"""So many flips a record names, those of the largest margin."""

FlipKind = Literal["tie", "near-tie", "consequence", "divergence"]


@dataclass(frozen=True)
class Flip:
    """A token that went to `taken` instead of `left`; of several exchanged, those farthest apart.

    margin: reference logit of `left` minus that of `taken`. mass: share of the reference's weights that its experts
    lose by the exchange, 0 to 1.
    """

    layer: int
    probe: int
    position: int
    kind: FlipKind
    left: int
    taken: int
    margin: float
    mass: float


@dataclass(frozen=True)
class RoutingLayer:
    """One layer over all tokens of all probes.

    same_order: the same experts in the same order; same_set: in any order, so it counts those as well; the rest are
    ties + near_ties + consequences + diverged. margin_max, mass_mean: over the rest, None where nothing was flipped.
    router_error: the largest difference of a log weight of the artifact's router from the reference's, both given the
    reference's input; replay_error: the same in the replay, where it has what rounding made of that input in the layers
    before, which is the noise that decides near-ties. visits: tokens that the reference sends to each expert.
    """

    layer: int
    tokens: int
    same_order: int
    same_set: int
    ties: int
    near_ties: int
    consequences: int
    diverged: int
    margin_max: float | None
    mass_mean: float | None
    router_error: float | None
    replay_error: float | None
    visits: tuple[int, ...]


@dataclass(frozen=True)
class RoutingRecord:
    """All layers, the flips with the largest margins, and the replay.

    replay: the artifact over all positions of all probes with the reference's experts in every layer. What is left of
    the difference then is the kernels' alone; what it is smaller by is what flips amplify.
    """

    layers: tuple[RoutingLayer, ...]
    worst: tuple[Flip, ...]
    replay: Metrics

    @property
    def token_layers(self) -> int:
        return sum(layer.tokens for layer in self.layers)

    @property
    def diverged(self) -> int:
        return sum(layer.diverged for layer in self.layers)

    @property
    def flipped(self) -> int:
        """Tokens x layers that go to other experts, whatever the reason."""
        return sum(layer.tokens - layer.same_set for layer in self.layers)

    @property
    def diverged_share(self) -> float | None:
        """Share of tokens x layers whose experts differ by neither a tie nor a near-tie nor what follows from one; None
        where none was compared."""
        return self.diverged / self.token_layers if self.token_layers else None

    @property
    def untested(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) that no probe visits: nothing here speaks of them."""
        return tuple((row.layer, e) for row in self.layers for e, visits in enumerate(row.visits) if not visits)


def compare_layers(
    logits: Sequence[Sequence[NDArray[np.float32]]],
    experts: Sequence[Sequence[NDArray[np.int64]]],
    router_errors: Sequence[float | None],
    replay_errors: Sequence[float | None],
) -> tuple[tuple[RoutingLayer, ...], tuple[Flip, ...]]:
    """Every layer from the first on, and the WORST_FLIPS flips: `compare_layer`, a sequence of layers of probes each.

    A flip changes what the layers above see at its position and, by attention, at all that follow.
    """
    reached: list[int | None] = [None] * len(experts[0])
    layers: list[RoutingLayer] = []
    worst: list[Flip] = []
    of_layers = zip(logits, experts, router_errors, replay_errors, strict=True)
    for n, (of_reference, taken, error, noise) in enumerate(of_layers):
        layer, flips = compare_layer(n, of_reference, taken, error, noise, tuple(reached))
        layers.append(layer)
        worst = sorted([*worst, *flips], key=lambda flip: -flip.margin)[:WORST_FLIPS]
        for flip in flips:
            before = reached[flip.probe]
            reached[flip.probe] = flip.position if before is None else min(before, flip.position)
    return tuple(layers), tuple(worst)


def compare_layer(
    layer: int,
    logits: Sequence[NDArray[np.float32]],
    experts: Sequence[NDArray[np.int64]],
    router_error: float | None,
    replay_error: float | None,
    reached: Sequence[int | None] | None = None,
) -> tuple[RoutingLayer, list[Flip]]:
    """logits: the reference's [n, E] a probe; experts: the artifact's [n, K] a probe. All flips, largest margin first.

    reached: the first position of each probe at which a lower layer flipped, None where none did. Raises ValueError
    where shapes do not belong together.
    """
    flips: list[Flip] = []
    same_order = same_set = 0
    visits = np.zeros(logits[0].shape[1], np.int64)
    for probe, (of_reference, taken) in enumerate(zip(logits, experts, strict=True)):
        if of_reference.ndim != 2 or taken.ndim != 2 or len(of_reference) != len(taken):
            raise ValueError(f"logits {of_reference.shape} and experts {taken.shape} are not of the same tokens")
        chosen = choose(of_reference, taken.shape[1])
        visits += np.bincount(chosen.ravel(), minlength=len(visits))
        in_order = (chosen == taken).all(axis=-1)
        in_set = same_experts(of_reference, taken)
        same_order += int(in_order.sum())
        same_set += int(in_set.sum())
        for position in np.flatnonzero(~in_set):
            row = of_reference[position].astype(np.float64)
            flip = _flip(layer, probe, int(position), row, chosen[position], taken[position], replay_error)
            first = None if reached is None else reached[probe]
            if flip.kind == "divergence" and first is not None and position >= first:
                flip = replace(flip, kind="consequence")
            flips.append(flip)
    flips.sort(key=lambda flip: -flip.margin)
    kinds = [flip.kind for flip in flips]
    record = RoutingLayer(
        layer=layer,
        tokens=sum(map(len, logits)),
        same_order=same_order,
        same_set=same_set,
        ties=kinds.count("tie"),
        near_ties=kinds.count("near-tie"),
        consequences=kinds.count("consequence"),
        diverged=kinds.count("divergence"),
        margin_max=flips[0].margin if flips else None,
        mass_mean=float(np.mean([flip.mass for flip in flips])) if flips else None,
        router_error=router_error,
        replay_error=replay_error,
        visits=tuple(visits.tolist()),
    )
    return record, flips


def _flip(
    layer: int,
    probe: int,
    position: int,
    logits: NDArray[np.float64],
    chosen: NDArray[np.int64],
    taken: NDArray[np.int64],
    noise: float | None,
) -> Flip:
    weights = np.exp(logits[chosen] - logits[chosen].max())
    lost = ~np.isin(chosen, taken)
    gained = taken[~np.isin(taken, chosen)]
    left = int(chosen[lost][np.argmax(logits[chosen[lost]])])
    # An artifact that names one expert twice leaves one out and takes none instead: as far off as the worst of all.
    worst = int(gained[np.argmin(logits[gained])]) if len(gained) else int(np.argmin(logits))
    margin = float(logits[left] - logits[worst])
    largest = np.float32(max(abs(logits[left]), abs(logits[worst])))
    near = max(NEAR_ULPS * bfloat16_ulp(float(largest)), NOISE_FACTOR * (noise or 0.0))
    kind: FlipKind = "divergence"
    if margin <= TIE_ULPS * float(np.spacing(largest)):
        kind = "tie"
    elif margin <= near:
        kind = "near-tie"
    return Flip(layer, probe, position, kind, left, worst, margin, float(weights[lost].sum() / weights.sum()))


def bfloat16_ulp(value: float) -> float:
    """The distance of bfloat16 numbers of this size: 8 bits of significand."""
    return float(2.0 ** (np.floor(np.log2(abs(value))) - 7)) if value else 2.0**-133


def choose(logits: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The k largest of logits [n, E], largest first, ties to the lower expert: [n, k]."""
    return np.argsort(-logits, axis=-1, kind="stable")[:, :k]


def same_experts(logits: NDArray[np.float32], experts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whose experts [n, K] are those of the reference's logits [n, E], in whatever order: [n]."""
    chosen = np.sort(choose(logits, experts.shape[1]), axis=-1)
    same: NDArray[np.bool_] = (chosen == np.sort(experts, axis=-1)).all(axis=-1)
    return same


def log_weight_error(
    logits: NDArray[np.float32], weights: NDArray[np.float32], experts: NDArray[np.int64]
) -> float | None:
    """The largest |difference| of log weights of tokens whose experts are the reference's; None where no token's are.

    logits [n, E]: the reference's. weights, experts [n, K]: the artifact's, of the same input.
    """
    same = same_experts(logits, experts)
    if not same.any():
        return None
    picked = np.take_along_axis(logits[same].astype(np.float64), experts[same], axis=-1)
    log_weights = picked - np.log(np.exp(picked - picked.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_weights -= picked.max(-1, keepdims=True)
    # A weight that float32 holds as 0 says nothing of its logarithm.
    held = weights[same] > 0
    if not held.any():
        return None
    found = np.log(np.where(held, weights[same], 1).astype(np.float64))
    return float(np.abs(np.where(held, found - log_weights, 0)).max())

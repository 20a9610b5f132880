"""What a target must hold to be called the model: absolute limits, and limits that follow from the noise floor.

gates = GATES["trt-fp16"].resolve(floor)        # a target in 16 bits is judged by what rounding costs
gates = override(gates, {"max_kl_mean": 1e-6})
judge(evidence, gates)                          # validators.verdict
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.floor import FloorDtype, FloorRecord


@dataclass(frozen=True)
class Gates:
    """Limits that an artifact has to keep.

    Of every scenario: max_kl_mean in nats, max_logit_diff on |candidate - reference| with each row's mean difference
    removed, min_top1_agreement as a share with ties aside. spare_positions of a scenario may disagree whatever share
    that is, because one of three positions says nothing about a share; each of them may add spare_kl nats to the
    scenario's sum, because where rounding exchanges an expert one position makes the whole mean. A replay of the
    reference's routing keeps the same limits.
    Of every layer, given the reference's input: max_layer_error, relative, of either half; max_router_error on a log
    weight of the router. Of the embedding, the final norm and lm_head: max_layer_error as well.
    Of all tokens x layers: max_diverged, the share whose experts differ beyond ties and near-ties.
    Of the number format: min_headroom_bits between the largest value and the type's limit.
    Of the engine against itself: max_self_diff on logits by another way, max_repeat_diff of the same call twice.
    Where tokens changed experts and routing keeps its limit all the same, the scenarios that run with the artifact's
    own routing get flip_kl_mean, flip_logit_diff and flip_top1 where these are wider (`with_flips`): near-ties decide
    what comes after them, in a deep network more than any rounding does. The replay, where nothing flips, keeps the
    narrow ones.
    That every logit is finite, that nothing saturates and that everything was measured is no limit but a condition, the
    same for all.
    """

    max_kl_mean: float
    max_logit_diff: float
    min_top1_agreement: float
    max_layer_error: float
    max_self_diff: float
    max_router_error: float = 1e-3
    max_diverged: float = 0.0
    min_headroom_bits: float = 1.0
    max_repeat_diff: float = 0.0
    spare_positions: int = 0
    spare_kl: float = 0.0
    flip_kl_mean: float = 0.0
    flip_logit_diff: float = 0.0
    flip_top1: float = 1.0

    def with_flips(self) -> Gates:
        """The limits of scenarios in which tokens changed experts; of a short one, one position may be all of it."""
        if self.flip_top1 == 1.0:
            return self
        return replace(
            self,
            max_kl_mean=max(self.max_kl_mean, self.flip_kl_mean),
            max_logit_diff=max(self.max_logit_diff, self.flip_logit_diff),
            min_top1_agreement=min(self.min_top1_agreement, self.flip_top1),
            spare_positions=max(self.spare_positions, 1),
        )

    def kl_limit(self, positions: int) -> float:
        """Of the mean KL of a scenario of so many positions."""
        return self.max_kl_mean + self.spare_positions * self.spare_kl / positions


EXACT = Gates(
    max_kl_mean=1e-9,
    max_logit_diff=1e-4,
    min_top1_agreement=1.0,
    max_layer_error=1e-5,
    max_self_diff=1e-4,
    flip_kl_mean=1e-3,
    flip_logit_diff=4.0,
    flip_top1=0.95,
)
"""For targets that compute in float32 with the weights as stored: what is left is the order of summation."""

SIXTEEN_BITS = replace(EXACT, max_kl_mean=2e-8, max_logit_diff=2e-3, max_layer_error=1e-4)
"""For kernels that hold activations in 16 bits a group of 32: five times what they show, and below what rounding the
smallest constant of the network (alpha, 1.702) to bfloat16 does. 24 random layers of 20b's shape show a mean KL of 5e-9
in the replay, and of 1e-4 to 3e-4 where 57 of 12,288 tokens x layers had changed experts."""

EIGHT_BIT_WEIGHTS = Gates(
    max_kl_mean=1e-3,
    max_logit_diff=2.0,
    min_top1_agreement=0.99,
    max_layer_error=2e-2,
    max_self_diff=1e-4,
    max_diverged=0.05,
    spare_positions=1,
)
"""For attention and lm_head in int8. The small checkpoint shows a mean KL of 1.9e-4, a logit difference of 0.76 and a
top-1 agreement of 0.9945 in the worst scenario; a difference that large is one position where the rounding exchanged an
expert for another that is nearly as good. These gates find what is wrong and not what is inexact: alpha rounded to
bfloat16 changes less than int8 does. Of 27 positions one that disagrees says nothing about a share. Logits of random
weights are so flat that 1.2 % of their best tokens change at a mean KL of 1.4e-4: there it fails, and rightly so."""

FLOAT32_ENGINE = replace(EXACT, max_kl_mean=1e-8, max_logit_diff=1e-3, max_self_diff=1e-3, max_repeat_diff=1e-3)
"""For an engine in float32 that picks its own kernels: another order of summation in every matrix product."""

FLOAT16_ENGINE = Gates(
    max_kl_mean=2e-8,
    max_logit_diff=2e-3,
    min_top1_agreement=0.99,
    max_layer_error=2.5e-3,
    max_self_diff=2e-3,
    max_repeat_diff=2e-3,
    spare_positions=1,
)
"""For an engine in float16, the least that is asked however small the noise floor: what 16-bit activations show on a
CPU, and an agreement that one position in a hundred may break. A layer may be off by three times what the small
checkpoint shows."""

BFLOAT16_ENGINE = replace(FLOAT16_ENGINE, max_layer_error=2e-2)
"""The same with three bits less."""

FACTOR = 3.0
"""How many times the noise floor a target may show, in each figure. The largest logit difference needs the same factor
as the mean KL, though KL grows with its square: it is one position, at which a token changed experts or did not, and
transformers in float16 shows 0.65 or 1.26 on the small checkpoint by the order of summation alone, so that a factor of
2 would decide by luck."""

MOST_KL = 1.0
LEAST_AGREEMENT = 0.5
"""Where gates that follow from a floor would be looser than these (nats, share), the floor is no rounding any more."""


@dataclass(frozen=True)
class GatePolicy:
    """From what the gates of a target follow: absolute limits alone, or those and a noise floor.

    With a floor_dtype the limit of mean KL is max(absolute, factor * floor's), those of the logit differences
    likewise, and a spare position may add factor * floor's worst KL. The limit of top-1 agreement is
    min(absolute, 1 - factor * flips), where flips is the floor's share of positions with another top-1 by
    Laplace's rule of succession, (disagreements + 1) / (positions + 2): one flip in 69 positions is no
    measurement to three digits. The share of diverged routing follows from the floor's in the same way. Raises
    ValueError for a factor that is none.
    """

    absolute: Gates
    floor_dtype: FloorDtype | None = None
    factor: float = FACTOR

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"a factor of {self.factor} on the noise floor gates nothing, or everything")

    def resolve(self, floor: FloorRecord | None) -> Gates:
        """The gates, given the floor measured over the same probes; None where the policy needs none.

        Where transformers itself leaves the type's range, rounding is no excuse: the absolute gates stay alone.
        Raises NotValidatedError for a floor that is missing, of another type, of nothing, or so large that its
        gates would let anything pass: never gates that are looser than what was measured.
        """
        if floor is None and self.floor_dtype is None:
            return self.absolute
        if floor is None or floor.dtype != self.floor_dtype:
            found = "none" if floor is None else f"one of {floor.dtype}"
            needed = "none" if self.floor_dtype is None else f"one of {self.floor_dtype}"
            raise _no_floor(f"the gates need {needed}, and {found} was measured")
        m = floor.metrics
        kl, worst, diff, agreement = m.kl_mean, m.kl_max, m.logit_diff_max, m.top1_agreement
        if m.non_finite != 0:
            return self.absolute
        if m.positions < 1 or agreement is None or kl is None or worst is None or diff is None:
            raise _no_floor(f"no position was compared in {floor.dtype}")
        # Written so that NaN fails.
        if not (0 <= kl < math.inf and 0 <= worst < math.inf and 0 <= diff < math.inf and 0 <= agreement <= 1):
            raise _no_floor(f"mean KL {kl}, logit difference {diff} and agreement {agreement} cannot be")
        if not 0 <= floor.diverged <= floor.token_layers or floor.token_layers < m.positions:
            raise _no_floor(f"{floor.diverged} of {floor.token_layers} tokens x layers cannot have changed experts")
        a = self.absolute
        gates = replace(
            a,
            max_kl_mean=max(a.max_kl_mean, self.factor * kl),
            max_logit_diff=max(a.max_logit_diff, self.factor * diff),
            min_top1_agreement=min(a.min_top1_agreement, 1 - self.factor * (m.disagreements + 1) / (m.positions + 2)),
            max_self_diff=max(a.max_self_diff, self.factor * diff),
            max_repeat_diff=max(a.max_repeat_diff, self.factor * diff) if a.max_repeat_diff else 0.0,
            max_diverged=max(a.max_diverged, self.factor * (floor.diverged + 1) / (floor.token_layers + 2)),
            spare_kl=max(a.spare_kl, self.factor * worst),
        )
        if gates.max_kl_mean > MOST_KL or gates.min_top1_agreement < LEAST_AGREEMENT:
            raise _no_floor(
                f"transformers in {floor.dtype} is itself too far from the model (mean KL {kl:.3g}, top-1 agreement "
                f"{agreement:.3g})"
            )
        return gates


def _no_floor(reason: str) -> NotValidatedError:
    return NotValidatedError(
        f"there is no noise floor to judge by: {reason}",
        "Export to a target in another type, such as trt-fp32, or report this as a bug.",
    )


GATES: Mapping[str, GatePolicy] = {
    "onnx": GatePolicy(EXACT),
    "ort-cpu": GatePolicy(SIXTEEN_BITS),
    "ort-cpu-int8": GatePolicy(EIGHT_BIT_WEIGHTS),
    "trt-fp32": GatePolicy(FLOAT32_ENGINE),
    "trt-fp16": GatePolicy(FLOAT16_ENGINE, "float16"),
    "trt-bf16": GatePolicy(BFLOAT16_ENGINE, "bfloat16"),
}
"""By target."""

GATE_NAMES = tuple(f.name for f in fields(Gates) if not f.name.startswith(("spare_", "flip_")))
"""The gates that can be set one by one."""

_DISTRIBUTION = ("max_kl_mean", "max_logit_diff", "min_top1_agreement")


def override(gates: Gates, values: Mapping[str, float]) -> Gates:
    """The gates with some set to other values. Raises ValueError for a name that is none, or a value that is no limit.

    Where max_kl_mean is set, no position is spared any KL; where min_top1_agreement is, none may disagree beyond it;
    and where a gate of the distribution is set, it holds whether tokens change experts or not.
    """
    for name, value in values.items():
        if name not in GATE_NAMES:
            raise ValueError(f"there is no gate {name!r}; there are {', '.join(GATE_NAMES)}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{value} is no limit for {name}")
        if name == "min_top1_agreement" and value > 1:
            raise ValueError(f"an agreement of {value} is more than all")
    changed = replace(gates, **values)  # type: ignore[arg-type]
    if not values.keys().isdisjoint(_DISTRIBUTION):
        changed = replace(changed, flip_kl_mean=0.0, flip_logit_diff=0.0, flip_top1=1.0)
    if "max_kl_mean" in values:
        changed = replace(changed, spare_kl=0.0)
    return replace(changed, spare_positions=0) if "min_top1_agreement" in values else changed


def loosened(table: Gates, used: Gates) -> tuple[str, ...]:
    """The gates that let more pass in `used` than in `table`."""

    def looser(name: str) -> bool:
        before, after = getattr(table, name), getattr(used, name)
        return bool(after < before if name.startswith("min_") else after > before)

    return tuple(name for name in GATE_NAMES if looser(name))

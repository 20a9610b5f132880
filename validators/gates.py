"""What a target must hold to be called the model, and the verdict: a pure function of stored metrics and
limits.

    gates = GATES["trt-fp16"].resolve(floor)        # a target in 16 bits is judged by what rounding costs
    judge({"prefill": metrics, ...}, gates)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_export.exporter.errors import NotValidatedError
from gptoss_export.validators.floor import FloorDtype, FloorRecord
from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import SCENARIOS


@dataclass(frozen=True)
class Gates:
    """Limits that every scenario has to keep.

    max_kl_mean in nats, max_logit_diff on |candidate - reference|, min_top1_agreement as a share with ties
    aside; spare_positions of a scenario may disagree whatever share that is, because one of three positions
    says nothing about a share; each of them may add spare_kl nats to the scenario's sum, because where rounding
    exchanges an expert one position makes the whole mean. That every logit is finite and that every scenario
    ran is no limit but a condition, the same for all.
    """

    max_kl_mean: float
    max_logit_diff: float
    min_top1_agreement: float
    spare_positions: int = 0
    spare_kl: float = 0.0

    def kl_limit(self, positions: int) -> float:
        """Of the mean KL of a scenario of so many positions."""
        return self.max_kl_mean + self.spare_positions * self.spare_kl / positions


EXACT = Gates(max_kl_mean=1e-9, max_logit_diff=1e-4, min_top1_agreement=1.0)
"""For targets that compute in float32 with the weights as stored: what is left is the order of summation."""

SIXTEEN_BITS = Gates(max_kl_mean=2e-8, max_logit_diff=2e-3, min_top1_agreement=1.0)
"""For kernels that hold activations in 16 bits a group of 32: five times what they show, and below what rounding the
smallest constant of the network (alpha, 1.702) to bfloat16 does."""

EIGHT_BIT_WEIGHTS = Gates(max_kl_mean=1e-3, max_logit_diff=2.0, min_top1_agreement=0.99)
"""For attention and lm_head in int8. The small checkpoint shows a mean KL of 1.9e-4, a logit difference of 0.76 and a
top-1 agreement of 0.9945 in the worst scenario; a difference that large is one position where the rounding exchanged an
expert for another that is nearly as good. These gates find what is wrong and not what is inexact: alpha rounded to
bfloat16 changes less than int8 does."""

FLOAT32_ENGINE = Gates(max_kl_mean=1e-8, max_logit_diff=1e-3, min_top1_agreement=1.0)
"""For an engine in float32 that picks its own kernels: another order of summation in every matrix product."""

ROUNDED_ENGINE = Gates(max_kl_mean=2e-8, max_logit_diff=2e-3, min_top1_agreement=0.99, spare_positions=1)
"""For an engine in 16 bits, the least that is asked however small the noise floor: what 16-bit activations show on a
CPU, and an agreement that one position in a hundred may break."""

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

    With a floor_dtype the limit of mean KL is max(absolute, factor * floor's), that of the logit difference
    likewise, and a spare position may add factor * floor's worst KL. The limit of top-1 agreement is
    min(absolute, 1 - factor * flips), where flips is the floor's share of positions with another top-1 by
    Laplace's rule of succession, (disagreements + 1) / (positions + 2): one flip in 69 positions is no
    measurement to three digits. Raises ValueError for a factor that is none.
    """

    absolute: Gates
    floor_dtype: FloorDtype | None = None
    factor: float = FACTOR

    def __post_init__(self) -> None:
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"a factor of {self.factor} on the noise floor gates nothing, or everything")

    def resolve(self, floor: FloorRecord | None) -> Gates:
        """The gates, given the floor measured over the same probes; None where the policy needs none.

        Raises NotValidatedError for a floor that is missing, of another type, of nothing, not finite, or so
        large that its gates would let anything pass: never gates that are looser than what was measured.
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
            raise _no_floor(f"transformers in {floor.dtype} gives {m.non_finite} logits that are not finite")
        if m.positions < 1 or agreement is None or kl is None or worst is None or diff is None:
            raise _no_floor(f"no position was compared in {floor.dtype}")
        # Written so that NaN fails.
        if not (0 <= kl < math.inf and 0 <= worst < math.inf and 0 <= diff < math.inf and 0 <= agreement <= 1):
            raise _no_floor(f"mean KL {kl}, logit difference {diff} and agreement {agreement} cannot be")
        a = self.absolute
        gates = Gates(
            max_kl_mean=max(a.max_kl_mean, self.factor * kl),
            max_logit_diff=max(a.max_logit_diff, self.factor * diff),
            min_top1_agreement=min(a.min_top1_agreement, 1 - self.factor * (m.disagreements + 1) / (m.positions + 2)),
            spare_positions=a.spare_positions,
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
    "trt-fp16": GatePolicy(ROUNDED_ENGINE, "float16"),
    "trt-bf16": GatePolicy(ROUNDED_ENGINE, "bfloat16"),
}
"""By target."""


@dataclass(frozen=True)
class Failure:
    """One gate that one scenario did not keep; measured is None where nothing could be measured."""

    scenario: str
    gate: str
    measured: float | None
    limit: float


@dataclass(frozen=True)
class Verdict:
    """passed exactly when failures is empty."""

    passed: bool
    failures: tuple[Failure, ...]


def judge(metrics: Mapping[str, Metrics], gates: Gates) -> Verdict:
    """The verdict on metrics by scenario.

    Nothing measured is a failure, never a pass: a scenario that is absent, one without positions, a figure
    that is missing or not a number. Scenarios beyond the known ones are held to the same gates.
    """
    failures: list[Failure] = []
    for scenario in (*SCENARIOS, *sorted(set(metrics) - set(SCENARIOS))):
        m = metrics.get(scenario)
        if m is None or m.positions < 1:
            failures.append(Failure(scenario, "positions", 0.0, 1.0))
            continue
        if m.non_finite != 0:
            failures.append(Failure(scenario, "non_finite", float(m.non_finite), 0.0))
        # Written so that NaN, for which every comparison is false, fails.
        for gate, measured, limit in (
            ("max_kl_mean", m.kl_mean, gates.kl_limit(m.positions)),
            ("max_logit_diff", m.logit_diff_max, gates.max_logit_diff),
        ):
            if measured is None or not measured <= limit:
                failures.append(Failure(scenario, gate, measured, limit))
        top1 = m.top1_agreement
        if top1 is None or not (top1 >= gates.min_top1_agreement or m.disagreements <= gates.spare_positions):
            failures.append(Failure(scenario, "min_top1_agreement", top1, gates.min_top1_agreement))
    return Verdict(not failures, tuple(failures))

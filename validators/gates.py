"""What a target must hold to be called the model, and the verdict: a pure function of stored metrics and
limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gptoss_export.validators.metrics import Metrics
from gptoss_export.validators.scenarios import SCENARIOS


@dataclass(frozen=True)
class Gates:
    """Limits that every scenario has to keep.

    max_kl_mean in nats, max_logit_diff on |candidate - reference|, min_top1_agreement as a share with ties
    aside. That every logit is finite and that every scenario ran is no limit but a condition, the same for
    all.
    """

    max_kl_mean: float
    max_logit_diff: float
    min_top1_agreement: float


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

GATES: Mapping[str, Gates] = {"onnx": EXACT, "ort-cpu": SIXTEEN_BITS, "ort-cpu-int8": EIGHT_BIT_WEIGHTS}
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
            ("max_kl_mean", m.kl_mean, gates.max_kl_mean),
            ("max_logit_diff", m.logit_diff_max, gates.max_logit_diff),
        ):
            if measured is None or not measured <= limit:
                failures.append(Failure(scenario, gate, measured, limit))
        top1 = m.top1_agreement
        if top1 is None or not top1 >= gates.min_top1_agreement:
            failures.append(Failure(scenario, "min_top1_agreement", top1, gates.min_top1_agreement))
    return Verdict(not failures, tuple(failures))

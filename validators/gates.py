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
class FloorCounts:
    """What a noise floor counts, beside which an artifact's counts are judged: of `positions` distinct ones, `margins`
    of those with another best token; tokens x layers and those diverged."""

    positions: int
    margins: tuple[float, ...]
    token_layers: int
    diverged: int


@dataclass(frozen=True)
class Gates:
    """Limits that an artifact has to keep.

    Of the replay, in which the reference's experts are given, so that nothing but rounding is left: max_kl_mean in
    nats, max_logit_diff on |candidate - reference| with each row's mean difference removed.
    Of every scenario: max_kl_median in nats, kept unless the median of its positions is surely larger
    (`Metrics.kl_median_low`); max_kl_position and max_logit_diff at each settled position, where rounding cannot send a
    token to other experts (`validators.positions`).
    Of all distinct positions of the texts, each by the worst way of asking: max_text_kl_mean in nats;
    min_top1_agreement, the share at which the best token is the reference's, near-ties aside.
    Of every layer, given the reference's input: max_layer_error, relative, of either half; max_router_error on a log
    weight of the router. Of the embedding, the final norm and lm_head: max_layer_error as well.
    Of all tokens x layers: max_diverged, the share whose experts differ beyond ties and near-ties.
    Of the number format: min_headroom_bits between the largest value and the type's limit.
    Of the engine against itself: max_self_diff on logits by another way, max_repeat_diff of the same call twice.
    That every logit is finite, that nothing saturates and that everything was measured is no limit but a condition, the
    same for all.

    Shares are rates: so many positions as are seen by chance at that rate, once in a thousand runs, may be beyond
    (`validators.binomial`), and with `beside` so many as are no evidence of a higher rate than the noise floor's.
    by_hand: gates that were set by their user; these hold as they stand, of every scenario whole, and by no statistics.
    """

    max_kl_mean: float
    max_logit_diff: float
    max_kl_median: float
    max_kl_position: float
    max_layer_error: float
    max_self_diff: float
    max_text_kl_mean: float = 1e-2
    min_top1_agreement: float = 0.99
    max_router_error: float = 1e-3
    max_diverged: float = 0.0
    min_headroom_bits: float = 1.0
    max_repeat_diff: float = 0.0
    beside: FloorCounts | None = None
    by_hand: tuple[str, ...] = ()


POSITION = 10.0
"""The KL of one position may be so many times what the mean of all may: within a text it varies with how sure the model
is, by up to eight times its mean on the small checkpoint."""


def _gates(kl: float, logit_diff: float, layer_error: float, self_diff: float) -> Gates:
    """Limits whose KL is of one size."""
    return Gates(
        max_kl_mean=kl,
        max_logit_diff=logit_diff,
        max_kl_median=kl,
        max_kl_position=POSITION * kl,
        max_layer_error=layer_error,
        max_self_diff=self_diff,
    )


EXACT = _gates(1e-9, 1e-4, 1e-5, 1e-4)
"""For targets that compute in float32 with the weights as stored: what is left is the order of summation. Where a
near-tie sends tokens elsewhere, whole texts may show 1e-2 nats: 24 random layers of 20b's shape show 2.7e-4."""

SIXTEEN_BITS = _gates(2e-8, 2e-3, 1e-4, 1e-4)
"""For kernels that hold activations in 16 bits a group of 32: five times what they show, and below what rounding the
smallest constant of the network (alpha, 1.702) to bfloat16 does."""

EIGHT_BIT_WEIGHTS = replace(_gates(1e-3, 2.0, 2e-2, 1e-3), max_kl_median=5e-3, max_diverged=0.01)
"""For attention and lm_head in int8. With the reference's experts the small checkpoint shows a mean KL of 8e-5, and
24 random layers of 20b's shape 3.5e-5; with its own, whose near-ties int8 decides otherwise, 5e-3 in those, where 7 %
of tokens x layers change experts. These gates find what is wrong and not what is inexact: alpha rounded to bfloat16
changes less than int8 does. By another way (bf16 experts have no kernel) the engine's own logits move by 2.3e-4."""

FLOAT32_ENGINE = replace(_gates(1e-8, 1e-3, 1e-5, 1e-3), max_repeat_diff=1e-3)
"""For an engine in float32 that picks its own kernels: another order of summation in every matrix product."""

FLOAT16_ENGINE = replace(_gates(2e-8, 2e-3, 2.5e-3, 2e-3), max_repeat_diff=2e-3)
"""For an engine in float16, the least that is asked however small the noise floor: what 16-bit activations show on a
CPU. A layer may be off by three times what the small checkpoint shows."""

BFLOAT16_ENGINE = replace(FLOAT16_ENGINE, max_layer_error=2e-2)
"""The same with three bits less."""

FACTOR = 3.0
"""How many times the noise floor a target may show in figures; its counts are compared by `binomial.most_beside`."""

MOST_KL = 1.0
LEAST_AGREEMENT = 0.5
"""Where gates that follow from a floor would be looser than these (nats, share), the floor is no rounding any more."""


@dataclass(frozen=True)
class GatePolicy:
    """From what the gates of a target follow: absolute limits alone, or those and a noise floor.

    With a floor_dtype the limits of KL and of logit differences are max(absolute, factor * floor's): the replay's,
    settled positions' and the engine's against itself by the positions at which the floor changed no expert, the median
    by its median, that of whole texts by its mean. Counts are judged beside the floor's. Raises ValueError for a factor
    that is none.
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
        m, texts = floor.metrics, floor.texts
        if m.non_finite != 0:
            return self.absolute
        figures = (m.kl_mean, m.kl_median, texts.kl_mean, floor.bulk_kl_mean, floor.bulk_logit_diff_max)
        agreement = m.top1_agreement
        if m.positions < 1 or texts.positions < 1 or agreement is None or any(figure is None for figure in figures):
            raise _no_floor(f"no position was compared in {floor.dtype}")
        kl, median, text, bulk, diff = (figure for figure in figures if figure is not None)
        # Written so that NaN fails.
        if not (all(0 <= figure < math.inf for figure in (kl, median, text, bulk, diff)) and 0 <= agreement <= 1):
            raise _no_floor(f"mean KL {kl}, logit difference {diff} and agreement {agreement} cannot be")
        if not 0 <= floor.diverged <= floor.token_layers or floor.token_layers < m.positions:
            raise _no_floor(f"{floor.diverged} of {floor.token_layers} tokens x layers cannot have changed experts")
        if not len(texts.margins) <= texts.positions <= m.positions:
            raise _no_floor(f"its {texts.positions} positions cannot be so many of {m.positions}")
        if self.factor * kl > MOST_KL or agreement < LEAST_AGREEMENT:
            raise _no_floor(
                f"transformers in {floor.dtype} is itself too far from the model (mean KL {kl:.3g}, top-1 agreement "
                f"{agreement:.3g})"
            )
        a, f = self.absolute, self.factor
        return replace(
            a,
            max_kl_mean=max(a.max_kl_mean, f * bulk),
            max_logit_diff=max(a.max_logit_diff, f * diff),
            max_kl_median=max(a.max_kl_median, f * median),
            max_kl_position=max(a.max_kl_position, POSITION * f * bulk),
            max_text_kl_mean=max(a.max_text_kl_mean, f * text),
            max_self_diff=max(a.max_self_diff, f * diff),
            max_repeat_diff=max(a.max_repeat_diff, f * diff) if a.max_repeat_diff else 0.0,
            beside=FloorCounts(texts.positions, texts.margins, floor.token_layers, floor.diverged),
        )


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

GATE_NAMES = tuple(f.name for f in fields(Gates) if f.name.startswith(("max_", "min_")))
"""The gates that can be set one by one."""


def override(gates: Gates, values: Mapping[str, float]) -> Gates:
    """The gates with some set by hand. Raises ValueError for a name that is none, or a value that is no limit."""
    for name, value in values.items():
        if name not in GATE_NAMES:
            raise ValueError(f"there is no gate {name!r}; there are {', '.join(GATE_NAMES)}")
        if not 0 <= value < math.inf:
            raise ValueError(f"{value} is no limit for {name}")
        if name == "min_top1_agreement" and value > 1:
            raise ValueError(f"an agreement of {value} is more than all")
    by_hand = tuple(sorted({*gates.by_hand, *values}))
    return replace(gates, by_hand=by_hand, **values)  # type: ignore[arg-type]


def loosened(table: Gates, used: Gates) -> tuple[str, ...]:
    """The gates that let more pass in `used` than in `table`."""

    def looser(name: str) -> bool:
        before, after = getattr(table, name), getattr(used, name)
        return bool(after < before if name.startswith("min_") else after > before)

    return tuple(name for name in GATE_NAMES if looser(name))

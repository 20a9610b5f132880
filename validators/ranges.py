"""How near activations and weights come to the limit of the type that the artifact holds them in.

    meter = RangeMeter(reference.trace.peaks)
    meter.add(layer, outputs)                  # of `engines.inspector`, run with ops=True: for each layer and probe
    records = meter.records(checkpoint)

What lies inside the experts no artifact shows; there the reference's largest values stand in, in the type of the
experts' input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptoss_export.engines.inspector import LayerOutputs
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.progress import Progress
from gptoss_export.validators.extent import LIMITS, Extent, extent
from gptoss_export.validators.trace import Peak
from gptoss_export.validators.weight_ranges import WeightRange, weight_ranges

__all__ = ["LIMITS", "RangeMeter", "RangeRecord", "type_of"]

INSIDE_EXPERTS = "experts."
"""How the names of peaks begin that are of values inside the experts."""


@dataclass(frozen=True)
class RangeRecord:
    """One layer in one type.

    activation: the largest finite |value| of what the layer holds in this type, of `activation_op`; weight: of its
    weights as decoded, of the tensor `weight_name`; 0 and "" where it holds none. headroom_bits: log2 of the type's
    limit over the larger of both, None where that is not finite. saturated: activations and weights at the limit or
    beyond, infinite or NaN. subnormal: those that are not 0 and below the smallest normal number, which lose bits.
    """

    layer: int
    type: str
    activation: float
    activation_op: str
    weight: float
    weight_name: str
    headroom_bits: float | None
    saturated: int
    subnormal: int


class RangeMeter:
    """Takes what the layers of an artifact give out; holds a few numbers of each operation.

    peaks: the reference's, see `trace.Trace`; used are those of what lies inside the experts.
    """

    def __init__(self, peaks: Mapping[str, Sequence[Peak]]) -> None:
        self._inside = {name: row for name, row in peaks.items() if name.startswith(INSIDE_EXPERTS)}
        self._types: dict[int, dict[str, str]] = {}
        self._extents: dict[int, dict[str, Extent]] = {}

    def add(self, layer: int, outputs: LayerOutputs) -> None:
        """One run of a layer with ops=True. The residual stream counts as float32."""
        types, extents = self._types.setdefault(layer, {}), self._extents.setdefault(layer, {})
        stream = {"residual": outputs.attention, "output": outputs.output}
        for name, values in (*stream.items(), *outputs.ops.items()):
            types[name] = "float32" if name in stream else outputs.types[name]
            extents[name] = extents.get(name, Extent()).merge(extent(values, types[name]))

    def records(self, checkpoint: Checkpoint, progress: Progress | None = None) -> tuple[RangeRecord, ...]:
        """One record for each layer that was added and type that it holds anything in, in order.

        checkpoint: the artifact's weights. Raises what reading them raises.
        """
        weights = weight_ranges(checkpoint, progress)
        return tuple(record for layer in sorted(self._types) for record in self._layer(layer, weights[layer]))

    def _layer(self, layer: int, weights: Sequence[WeightRange]) -> Iterator[RangeRecord]:
        types = self._types[layer]
        values = [(types[name], name, found) for name, found in self._extents[layer].items()]
        inside = type_of("mlp.experts", types)
        values += [(inside, name, _of_peak(row[layer], inside)) for name, row in self._inside.items()]
        tensors = [(held, w.name, w.extents[held]) for w in weights for held in [type_of(w.name, types)]]
        for held, limit in LIMITS.items():
            of_values = [(name, found) for type_, name, found in values if type_ == held]
            of_tensors = [(name, found) for type_, name, found in tensors if type_ == held]
            if not of_values and not of_tensors:
                continue
            (activation, op), (weight, tensor) = _largest(of_values), _largest(of_tensors)
            largest = max(activation, weight)
            both = [found for _, found in (*of_values, *of_tensors)]
            yield RangeRecord(
                layer=layer,
                type=held,
                activation=activation,
                activation_op=op,
                weight=weight,
                weight_name=tensor,
                headroom_bits=math.log2(limit / largest) if largest else None,
                saturated=sum(found.saturated for found in both),
                subnormal=sum(found.subnormal for found in both),
            )


def type_of(weight: str, types: Mapping[str, str]) -> str:
    """What a weight is held in where it is used; types: of the operations, as the artifact's graph shows them.

    Matrices and their biases have the type of their product, experts that of their input, and sinks stand beside the
    scores. Norms and the router are float32 in every target.
    """
    for part, ops in _TYPE_FROM.items():
        if part in weight:
            return next((types[op] for op in ops if op in types), "float32")
    return "float32"


_TYPE_FROM = {
    ".q_proj.": ("q_proj", "input_layernorm"),
    ".k_proj.": ("k_proj", "input_layernorm"),
    ".v_proj.": ("v_proj", "input_layernorm"),
    ".o_proj.": ("o_proj", "attention"),
    ".sinks": ("attention",),
    "mlp.experts": ("post_attention_layernorm", "experts"),
}
"""By part of a weight's name, the operations whose type is its own: the first that the graph shows."""


def _largest(found: Sequence[tuple[str, Extent]]) -> tuple[float, str]:
    if not found:
        return 0.0, ""
    name, best = max(found, key=lambda pair: pair[1].largest)
    return best.largest, name


def _of_peak(peak: Peak, held: str) -> Extent:
    """Of a peak it is only known whether the largest value is beyond the limit, not how many others are."""
    return Extent(peak.largest, peak.non_finite + int(peak.largest >= LIMITS[held]), 0)

"""Where an error starts: every layer of the artifact, given what the reference's layer before it gave.

    records = measure_layers(inspector, reference, look)

Both halves of a layer are teacher-forced: attention gets the reference's hidden state, the experts the reference's
residual stream after attention. So no layer inherits an error, and the first that is beyond its gate is where one is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_export.engines.inspector import Inspector, LayerInspector, LayerOutputs
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.deviation import Deviation
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.routing import log_weight_error, same_experts

CACHED_STEPS = 6
"""Positions that come out of the cache, around the window's edge."""


@dataclass(frozen=True)
class LayerRecord:
    """One layer over all positions of all probes.

    Errors are relative: root mean square of the difference over that of what the half adds to the residual stream.
    attention: in one call. cached: the last positions token by token through the cache, across the window's edge; None
    where the probes are too short. experts: over tokens that the router sends where the reference does; None where
    there are none. flipped: the other tokens. router: see RoutingLayer.router_error. A half that is not finite has no
    error, and is counted in non_finite.
    """

    layer: int
    kind: str
    tokens: int
    attention: float | None
    cached: float | None
    experts: float | None
    flipped: int
    router: float | None
    non_finite: int


@dataclass(frozen=True)
class Finding:
    """What a bisection says of one layer: the first operation beyond the gate, by how much, and what speaks for it.

    half: attention or experts. op: a name of OPS, with what narrows it down in words (`attention: the window`). layer:
    None for what is none: half is `ends` then, and op embedding, norm or lm_head.
    """

    layer: int | None
    half: str
    op: str
    error: float | None
    limit: float
    detail: str


@dataclass(frozen=True)
class Bisection:
    """findings: of every layer beyond its gate, in order. sentence: layer, op and magnitude of the first."""

    findings: tuple[Finding, ...]
    sentence: str


def measure_layers(
    inspector: Inspector,
    reference: Reference,
    look: Callable[[int, LayerOutputs], None] | None = None,
    *,
    progress: Progress | None = None,
) -> tuple[LayerRecord, ...]:
    """Every layer over all probes, one layer of the artifact in memory at a time.

    look: called with the layer's index and what came out of it, a probe at a time. Raises what the inspector raises.
    """
    records = []
    with (progress or SilentProgress()).task("layers", total=inspector.num_layers) as task:
        for index in range(inspector.num_layers):
            records.append(_measure(index, inspector.layer(index), reference, look))
            task.advance(1)
    return tuple(records)


def cached_calls(length: int, window: int) -> tuple[int, ...]:
    """A prefill up to two tokens before the window's edge, then single steps across it; shorter for a short text."""
    first = max(1, min(window - 2, length - CACHED_STEPS))
    return (first, *[1] * min(CACHED_STEPS, length - first))


def _measure(
    index: int,
    layer: LayerInspector,
    reference: Reference,
    look: Callable[[int, LayerOutputs], None] | None,
) -> LayerRecord:
    trace, config = reference.trace, reference.config
    attention, cached, experts = Deviation(), Deviation(), Deviation()
    tokens = flipped = 0
    router: float | None = None
    for probe in range(len(reference.probes)):
        hidden, residual = trace.hidden(index, probe), trace.residual(index, probe)
        following, logits = trace.hidden(index + 1, probe), trace.router_logits(index, probe)
        out = layer.run(hidden, residual, ops=look is not None)
        if look is not None:
            look(index, out)
        attention.add(out.attention, residual, hidden)
        same = same_experts(logits, out.experts)
        experts.add(out.output[same], following[same], residual[same])
        # What is not finite is no less so at a token whose experts differ.
        experts.non_finite += int((~np.isfinite(out.output[~same])).sum())
        tokens += len(hidden)
        flipped += int((~same).sum())
        error = log_weight_error(logits, out.weights, out.experts)
        router = max((e for e in (router, error) if e is not None), default=None)
    _add_cached(index, layer, reference, cached)
    return LayerRecord(
        layer=index,
        kind=config.layer_types[index],
        tokens=tokens,
        attention=attention.relative,
        cached=cached.relative,
        experts=experts.relative,
        flipped=flipped,
        router=router,
        non_finite=attention.non_finite + cached.non_finite + experts.non_finite,
    )


def _add_cached(index: int, layer: LayerInspector, reference: Reference, cached: Deviation) -> None:
    """The longest probe, its first positions in one call and the next ones singly."""
    lengths = [len(probe.ids) for probe in reference.probes]
    longest = int(np.argmax(lengths))
    if lengths[longest] < 2:
        return
    calls = cached_calls(lengths[longest], reference.config.sliding_window)
    n, first = sum(calls), calls[0]
    hidden, residual = (part(index, longest)[:n] for part in (reference.trace.hidden, reference.trace.residual))
    out = layer.run(hidden, residual, calls)
    cached.add(out.attention[first:], residual[first:], hidden[first:])


def failing_halves(record: LayerRecord, limit: float, router_limit: float) -> Sequence[str]:
    """Which of attention, cache, router and experts are beyond their limits, in the order of computation."""

    def beyond(value: float | None, most: float) -> bool:
        return value is None or not value <= most

    return [
        name
        for name, value, most in (
            ("attention", record.attention, limit),
            ("cache", record.cached, limit),
            ("router", record.router, router_limit),
            ("experts", record.experts, limit),
        )
        if beyond(value, most)
    ]

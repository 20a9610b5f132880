"""From a layer that is beyond its gate to the operation in it, and to what is wrong with that, as far as it shows.

    bisection = bisect(inspector, checkpoint, reference, evidence, gates)
    bisection.sentence      # "Layer 3, attention (the window): relative error 0.12 where 1e-05 is allowed; ..."

The reference's own layer is run again, module by module, on the reference's hidden state; the artifact's is run on the
same. The first operation in the order of computation whose result is off is the one named: those after it inherit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.inspector import OPS, Inspector, LayerInspector, LayerOutputs
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.deviation import Deviation
from gptoss_export.validators.ends import EndsRecord, failing_ends
from gptoss_export.validators.evidence import Evidence
from gptoss_export.validators.gates import Gates
from gptoss_export.validators.layer_ops import layer_ops
from gptoss_export.validators.layers import Bisection, Finding, LayerRecord, cached_calls, failing_halves
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.routing import log_weight_error, same_experts
from gptoss_export.validators.verdict import judge
from gptoss_export.validators.whose import blame_attention, blame_cache, blame_experts

ATTENTION_OPS = OPS[: OPS.index("o_proj") + 1]

_ENDS = {"embedding": "The embedding", "norm": "The final norm", "lm_head": "lm_head"}

Array = NDArray[np.float32]


def bisect(
    inspector: Inspector,
    checkpoint: Checkpoint,
    reference: Reference,
    evidence: Evidence,
    gates: Gates,
    *,
    progress: Progress | None = None,
) -> Bisection:
    """What is wrong in every layer that is beyond its gate, before them and behind them; the first of it in a sentence.

    evidence: as measured with this inspector against this reference. Raises what the inspector and transformers raise.
    """
    failing = [(r, halves) for r in evidence.layers if (halves := _halves(r, gates))]
    before, behind = ([], []) if evidence.ends is None else _ends_findings(evidence.ends, gates.max_layer_error)
    findings = before
    with (progress or SilentProgress()).task("bisect", total=len(failing)) as task:
        for record, halves in failing:
            findings += _explain(inspector.layer(record.layer), checkpoint, reference, record, halves, gates)
            task.advance(1)
    findings += behind
    return Bisection(tuple(findings), _sentence(findings, evidence, gates))


def _ends_findings(record: EndsRecord, limit: float) -> tuple[list[Finding], list[Finding]]:
    """Before the layers and behind them; lm_head inherits what the final norm does wrong."""
    found = [Finding(None, "ends", op, record.errors[op], limit, "") for op in failing_ends(record, limit)]
    return [f for f in found if f.op == "embedding"], [f for f in found if f.op != "embedding"][:1]


def _halves(record: LayerRecord, gates: Gates) -> Sequence[str]:
    return failing_halves(record, gates.max_layer_error, gates.max_router_error)


def _explain(
    layer: LayerInspector,
    checkpoint: Checkpoint,
    reference: Reference,
    record: LayerRecord,
    halves: Sequence[str],
    gates: Gates,
) -> list[Finding]:
    index, probes = record.layer, range(len(reference.probes))
    hidden = [reference.trace.hidden(index, probe) for probe in probes]
    residual = [reference.trace.residual(index, probe) for probe in probes]
    found: list[Finding] = []
    if halves == ["cache"]:
        return [_cache_finding(layer, reference, record, gates)]
    expected = layer_ops(checkpoint, index, hidden, residual)
    outputs = [layer.run(h, r, ops=True) for h, r in zip(hidden, residual, strict=True)]
    if "attention" in halves:
        found.append(_attention_finding(reference, record, expected, outputs, gates))
    elif "cache" in halves:
        found.append(_cache_finding(layer, reference, record, gates))
    if "router" in halves or "experts" in halves:
        found.append(_experts_finding(reference, record, expected, outputs, gates))
    return found


def _attention_finding(
    reference: Reference,
    record: LayerRecord,
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[LayerOutputs],
    gates: Gates,
) -> Finding:
    limit = gates.max_layer_error
    for op in ATTENTION_OPS:
        error, infinite = _op_error(op, expected, outputs)
        if infinite:
            return Finding(record.layer, "attention", op, None, limit, _not_finite(op, infinite, outputs))
        if error is not None and not error <= limit:
            detail = ""
            if op == "attention":
                pairs = [(out.ops[op], ops[op]) for out, ops in zip(outputs, expected, strict=True)]
                window = reference.config.sliding_window if record.kind == "sliding_attention" else 0
                detail = blame_attention(pairs, window)
            return Finding(record.layer, "attention", op, error, limit, detail)
    return Finding(record.layer, "attention", "residual", record.attention, limit, "the sum after o_proj")


def _experts_finding(
    reference: Reference,
    record: LayerRecord,
    expected: Sequence[Mapping[str, Array]],
    outputs: Sequence[LayerOutputs],
    gates: Gates,
) -> Finding:
    limit = gates.max_layer_error
    error, infinite = _op_error("post_attention_layernorm", expected, outputs)
    op = "post_attention_layernorm"
    if infinite:
        return Finding(record.layer, "experts", op, None, limit, _not_finite(op, infinite, outputs))
    if error is not None and not error <= limit:
        return Finding(record.layer, "experts", op, error, limit, "")
    router = _router_error(reference, record.layer, outputs)
    if router is None or not router <= gates.max_router_error:
        detail = f"{record.flipped} of {record.tokens} tokens go to other experts on the same input"
        return Finding(record.layer, "experts", "router", router, gates.max_router_error, detail)
    op = "experts"
    error, infinite = _op_error(op, expected, outputs)
    if infinite:
        return Finding(record.layer, "experts", op, None, limit, _not_finite(op, infinite, outputs))
    detail = blame_experts(_token_errors(reference, record.layer, outputs), limit)
    return Finding(record.layer, "experts", op, record.experts, limit, detail)


def _cache_finding(layer: LayerInspector, reference: Reference, record: LayerRecord, gates: Gates) -> Finding:
    """The first position that comes out of the cache otherwise than out of one call."""
    longest = max(range(len(reference.probes)), key=lambda probe: len(reference.probes[probe].ids))
    calls = cached_calls(len(reference.probes[longest].ids), reference.config.sliding_window)
    n, first = sum(calls), calls[0]
    hidden = reference.trace.hidden(record.layer, longest)[:n]
    residual = reference.trace.residual(record.layer, longest)[:n]
    out = layer.run(hidden, residual, calls)
    errors = []
    for position in range(first, n):
        row, deviation = slice(position, position + 1), Deviation()
        deviation.add(out.attention[row], residual[row], hidden[row])
        errors.append(deviation.relative)
    window = reference.config.sliding_window if record.kind == "sliding_attention" else 0
    detail = blame_cache(errors, first, window, gates.max_layer_error)
    return Finding(record.layer, "attention", "attention", record.cached, gates.max_layer_error, detail)


def _op_error(
    op: str, expected: Sequence[Mapping[str, Array]], outputs: Sequence[LayerOutputs]
) -> tuple[float | None, int]:
    """Relative error of an operation's result over all probes, and values that are not finite; None if not shown."""
    deviation = Deviation()
    for ops, out in zip(expected, outputs, strict=True):
        if op in out.ops and op in ops:
            deviation.add(out.ops[op], ops[op])
    return deviation.relative, deviation.non_finite


def _not_finite(op: str, count: int, outputs: Sequence[LayerOutputs]) -> str:
    return f"{count} values are infinite or NaN in {outputs[0].types.get(op, 'its type')}"


def _router_error(reference: Reference, layer: int, outputs: Sequence[LayerOutputs]) -> float | None:
    errors = [
        log_weight_error(reference.trace.router_logits(layer, probe), out.weights, out.experts)
        for probe, out in enumerate(outputs)
    ]
    return max((error for error in errors if error is not None), default=None)


def _token_errors(
    reference: Reference, layer: int, outputs: Sequence[LayerOutputs]
) -> list[tuple[float, NDArray[np.int64]]]:
    """Relative error of what the experts add and the experts visited, of every token that goes where it should."""
    found = []
    for probe, out in enumerate(outputs):
        residual = reference.trace.residual(layer, probe)
        added = reference.trace.hidden(layer + 1, probe).astype(np.float64) - residual
        difference = out.output.astype(np.float64) - residual - added
        same = same_experts(reference.trace.router_logits(layer, probe), out.experts)
        errors = np.sqrt(np.square(difference).sum(-1) / np.maximum(np.square(added).sum(-1), 1e-300))
        found += [(float(errors[token]), out.experts[token]) for token in np.flatnonzero(same)]
    return found


def _sentence(findings: Sequence[Finding], evidence: Evidence, gates: Gates) -> str:
    """Layer, operation and magnitude of the first finding; without one, what the evidence says instead."""
    if findings:
        f = findings[0]
        what = f.op + (f" ({f.detail})" if f.detail else "")
        where = _ENDS[f.op] if f.layer is None else f"Layer {f.layer}, {what}"
        error = "no figure, it is not finite," if f.error is None else f"error {f.error:.2g}"
        layers = len({finding.layer for finding in findings} - {None})
        return (
            f"{where}: {error} where {f.limit:.2g} is allowed; "
            f"{layers} of {evidence.num_layers} layers are beyond their gate."
        )
    verdict = judge(evidence, gates)
    if verdict.passed:
        return "Every layer keeps its gate, and so does the whole."
    failing = {failure.where for failure in verdict.failures}
    if "prefill" not in failing:
        where = ", ".join(dict.fromkeys(f.where for f in verdict.failures))
        return f"Every layer keeps its gate and so does a prefill: what is wrong shows in {where} only."
    if "routing replay" in failing:
        return "Every layer and both ends keep their gates, and the whole does not: what hands on between them."
    return "Every layer keeps its gate, and with the reference's routing so does the whole: flips of experts alone."

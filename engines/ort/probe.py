"""Is this runtime's GroupQueryAttention the SinkAttention of the dialect?

Fused operators have been wrong before: windows off by one, sinks ignored, chunks refused for batches. So before a graph
is lowered to one, a graph of a single SinkAttention is run twice on the runtime at hand, by its function body and
lowered, over prompts, chunks and single steps, with and without window, padded on the left, on the right and between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.ort.lower import lower_attention
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.ops import DOMAIN, OPSET, VERSION, functions_of

if TYPE_CHECKING:
    import onnx_ir as ir

TOLERANCE = 2e-5
"""Largest |difference| of attention outputs, whose values are averages of N(0, 1) values: fp32 rounding gives 2e-6."""

PROBE_WINDOW = 5
CASES = ((2, 1, 0), (2, 7, 0), (2, 1, 11), (1, 4, 9))
"""(batch, new, past): single tokens, prompts, steps, a chunk."""

BATCHED_CHUNKS = (2, 4, 9)
"""Known to be refused by onnxruntime 1.31; a runner can do without, by taking the rows one by one."""

MASKS = ("none", "left", "right", "between")


@dataclass(frozen=True)
class ProbeResult:
    """What the comparison said.

    cases: how many were compared. max_error: the largest difference over all. failure: what went wrong first, None if
    nothing did. batched_chunks: whether several rows may be continued by more than one position at a time.
    """

    cases: int
    max_error: float
    failure: str | None
    batched_chunks: bool

    @property
    def passed(self) -> bool:
        return self.cases > 0 and self.failure is None


def probe_attention(config: ModelConfig) -> ProbeResult:
    """Compares the two on heads of the config's shape."""
    errors: list[float] = []
    batched_chunks = True
    for window in (PROBE_WINDOW, 0):
        # Built twice, because lowering works in place.
        body = _session(_single_attention(config, window))
        fused = _session(lower_attention(_single_attention(config, window)))
        for name, feeds in _cases(config, CASES):
            try:
                errors.append(_difference(body, fused, feeds))
            except Exception as error:  # onnxruntime raises its own unexported types
                return ProbeResult(
                    len(errors), max(errors, default=0.0), f"{name}: {str(error).splitlines()[0]}", False
                )
            if not errors[-1] <= TOLERANCE:
                return ProbeResult(len(errors), max(errors), f"{name}: differs by {errors[-1]:.1e}", False)
        for _, feeds in _cases(config, (BATCHED_CHUNKS,)):
            try:
                batched_chunks &= _difference(body, fused, feeds) <= TOLERANCE
            except Exception:  # the same
                batched_chunks = False
    return ProbeResult(len(errors), max(errors), None, batched_chunks)


def _difference(body: Any, fused: Any, feeds: dict[str, NDArray[Any]]) -> float:
    """The largest |difference| of outputs and caches. What a padding position computes nobody reads."""
    expected, actual = body.run(None, feeds), fused.run(None, feeds)
    real = feeds["query_positions"] >= 0
    attention = float(np.abs(expected[0] - actual[0])[real].max())
    caches = (float(np.abs(e - a).max()) for e, a in zip(expected[1:], actual[1:], strict=True))
    return float(np.max([attention, *caches]))


def _session(model: ir.Model) -> Any:
    import onnx_ir as ir
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    content = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _single_attention(config: ModelConfig, window: int) -> ir.Model:
    """A model that is one SinkAttention; its sinks are an input."""
    import onnx_ir as ir

    f32, i64 = ir.DataType.FLOAT, ir.DataType.INT64
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    cache = ("B", config.num_kv_heads, "P", config.head_dim)
    inputs = [
        ir.val("q", f32, ("B", "S", width)),
        ir.val("k", f32, ("B", "S", kv_width)),
        ir.val("v", f32, ("B", "S", kv_width)),
        ir.val("past_key", f32, cache),
        ir.val("past_value", f32, cache),
        ir.val("sinks", f32, (config.num_heads,)),
        ir.val("query_positions", i64, ("B", "S")),
        ir.val("key_positions", i64, ("B", "T")),
    ]
    stored = ir.node("Cast", [inputs[5]], {"to": int(ir.DataType.BFLOAT16)}, name="sinks_stored")
    attributes = {
        "num_heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "scale": config.head_dim**-0.5,
        "window": window,
    }
    operands = [*inputs[:5], stored.outputs[0], *inputs[6:]]
    attention = ir.node("SinkAttention", operands, attributes, domain=DOMAIN, num_outputs=3, name="attention")
    for value, name in zip(attention.outputs, ("attention", "present_key", "present_value"), strict=True):
        value.name, value.type = name, ir.TensorType(f32)
    graph = ir.Graph(
        inputs,
        attention.outputs,
        nodes=[stored, attention],
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name="probe",
    )
    return ir.Model(graph, ir_version=11, functions=functions_of(graph))


def _cases(
    config: ModelConfig, lengths: Sequence[tuple[int, int, int]]
) -> Iterator[tuple[str, dict[str, NDArray[Any]]]]:
    rng = np.random.default_rng(0)
    D, heads, kv = config.head_dim, config.num_heads, config.num_kv_heads

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    for B, S, P in lengths:
        for padding in MASKS:
            mask = np.ones((B, P + S), np.int64)
            if padding == "left":
                mask[0, : min(3, P + S - 1)] = 0
            elif padding == "right" and S > 2:
                mask[0, -2:] = 0
            elif padding == "between" and P > 4:
                mask[0, 2:4] = 0
            elif padding != "none":
                continue
            positions = np.where(mask == 1, mask.cumsum(-1) - 1, -1)
            yield (
                f"{B} rows, {S} new, {P} past, padding {padding}",
                {
                    "q": normal(B, S, heads * D),
                    "k": normal(B, S, kv * D),
                    "v": normal(B, S, kv * D),
                    "past_key": normal(B, kv, P, D),
                    "past_value": normal(B, kv, P, D),
                    "sinks": normal(heads),
                    "query_positions": positions[:, P:],
                    "key_positions": positions,
                },
            )

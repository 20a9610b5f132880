"""The custom ops of the dialect `com.gptoss`. Importing this package registers the torch ops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_export.exporter.ops.dialect import DOMAIN, OPSET, VERSION, Op, with_calls
from gptoss_export.exporter.ops.linear import LINEAR, LINEAR_NO_BIAS, LINEAR_QKV
from gptoss_export.exporter.ops.linear_int8 import LINEAR_INT8, LINEAR_INT8_NO_BIAS
from gptoss_export.exporter.ops.moe_experts import MOE_EXPERTS, MOE_EXPERTS_DENSE
from gptoss_export.exporter.ops.moe_experts_mxfp4 import MOE_EXPERTS_MXFP4
from gptoss_export.exporter.ops.moe_router import MOE_ROUTER
from gptoss_export.exporter.ops.shared_sink_attention import SHARED_SINK_ATTENTION
from gptoss_export.exporter.ops.sink_attention import ATTEND_WITH_SINKS, POSITION_BIAS, SINK_ATTENTION

if TYPE_CHECKING:
    import onnx_ir as ir

OPS: tuple[Op, ...] = (
    LINEAR,
    LINEAR_NO_BIAS,
    LINEAR_QKV,
    LINEAR_INT8,
    LINEAR_INT8_NO_BIAS,
    MOE_ROUTER,
    MOE_EXPERTS,
    MOE_EXPERTS_DENSE,
    MOE_EXPERTS_MXFP4,
    POSITION_BIAS,
    ATTEND_WITH_SINKS,
    SINK_ATTENTION,
    SHARED_SINK_ATTENTION,
)

__all__ = ["DOMAIN", "OPS", "OPSET", "VERSION", "Op", "functions_of"]


def functions_of(graph: ir.Graph) -> list[ir.Function]:
    """The function bodies that a model with this graph has to carry."""
    import onnx_ir as ir

    names = {node.op_type for node in graph if node.domain == DOMAIN}
    return [ir.serde.deserialize_function(op.function) for op in with_calls(names, OPS)]

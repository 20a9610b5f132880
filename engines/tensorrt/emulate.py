"""The lowered graph for ONNX Runtime on CPU, which has few operators of 16 bits, and slow ones.

Such an operator reads float32 copies of its operands and its result is rounded to the type that the graph says:
products and sums are float32, as on a tensor core, and what is stored between operators has 16 bits, as in an engine.
"""

from __future__ import annotations

import onnx_ir as ir

from gptoss_export.exporter.ops.moe_experts_mxfp4 import VISITED_ONLY

_OPERATORS = ("Gemm", "Attention", "Where", "TensorScatter")
_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def emulate(model: ir.Model) -> None:
    """Wraps the operators of 16 bits, in place, and exchanges the experts' body for one that ONNX Runtime runs well.

    The body that TensorRT parses asks every expert about every token; the other one says the same.
    """
    experts = ir.serde.deserialize_function(VISITED_ONLY.function)
    if experts.identifier() in model.functions:
        experts.opset_imports[""] = model.graph.opset_imports[""]
        model.functions[experts.identifier()] = experts
    for node in list(model.graph):
        narrow = next((v.dtype for v in node.inputs if v is not None and v.dtype in _NARROW), None)
        if not node.domain and node.op_type in _OPERATORS and narrow is not None:
            _wrap(model.graph, node, narrow)


def _wrap(graph: ir.Graph, node: ir.Node, narrow: ir.DataType) -> None:
    inputs = []
    for value in node.inputs:
        if value is None or value.dtype != narrow:
            inputs.append(value)
            continue
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        graph.insert_before(node, cast)
        inputs.append(cast.outputs[0])
    (old,) = node.outputs
    wide = ir.node(node.op_type, inputs, {name: attribute.value for name, attribute in node.attributes.items()})
    rounded = ir.node("Cast", [wide.outputs[0]], {"to": int(narrow)}, name=node.name)
    new = rounded.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, wide)
    graph.insert_before(node, rounded)
    ir.convenience.replace_all_uses_with([old], [new], replace_graph_outputs=True)
    graph.remove(node, safe=True)

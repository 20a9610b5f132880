"""onnxsim on the weightless graph: what tracing left behind (shapes, casts, constants) is folded away.

onnxsim loads and folds whatever data it is given, so it is given none: every weight is a graph input while it works.
What it may do to a weight afterwards is checked: all of them are still there, each read by as many nodes as before.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from gptoss_export.exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir


def simplify(model: ir.Model) -> ir.Model:
    """The same graph with fewer nodes; weights stay initializers without data. Raises GraphError if one was touched."""
    import onnx_ir as ir
    import onnxsim

    weights = _weights(model)
    readers = _readers(model, weights)
    interface = [value.name for value in model.graph.inputs]
    defaults = {str(v.name): v.const_value for v in model.graph.inputs if v.const_value is not None}
    proto, _ = onnxsim.simplify(weightless_proto(model))
    simplified: ir.Model = ir.serde.deserialize_model(proto)

    inputs = {value.name: value for value in simplified.graph.inputs}
    missing = [name for name in weights if name not in inputs]
    if missing or _readers(simplified, weights) != readers:
        raise GraphError(
            f"simplification touched the weight {(missing or ['?'])[0]}",
            "Report this with the versions of onnx and onnxsim; the graph is not safe to use.",
        )
    del simplified.graph.inputs[:]
    simplified.graph.inputs.extend(inputs[name] for name in interface)
    for name in weights:
        simplified.graph.initializers.add(inputs[name])
    for name, tensor in defaults.items():
        inputs[name].const_value = tensor
        simplified.graph.initializers.add(inputs[name])
    return simplified


def weightless_proto(model: ir.Model) -> onnx.ModelProto:
    """The model with a graph input for every weight, and without the defaults of optional inputs.

    A weight is an initializer without data. A default is an initializer that is also an input; tools that fold
    constants take it for one.
    """
    import onnx_ir as ir

    graph = model.graph.clone()
    optional = {value.name for value in graph.inputs}
    for name, value in list(graph.initializers.items()):
        if value.const_value is None:
            graph.inputs.append(value)
        elif name not in optional:
            continue
        del graph.initializers[name]
    functions = tuple(function.clone() for function in model.functions.values())
    return ir.serde.serialize_model(ir.Model(graph, ir_version=model.ir_version, functions=functions))


def _weights(model: ir.Model) -> dict[str, ir.Value]:
    return {name: value for name, value in model.graph.initializers.items() if value.const_value is None}


def _readers(model: ir.Model, weights: dict[str, ir.Value]) -> Counter[tuple[str, str]]:
    """How often each weight is read by which operator."""
    return Counter(
        (value.name, node.op_type)
        for node in model.graph
        for value in node.inputs
        if value is not None and value.name in weights
    )

"""Linear becomes LinearInt8 for the matrices that were quantised; q, k and v of a layer become one, and a Split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gptoss_export.engines.ort.quantize import Matrix
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.ops import DOMAIN, functions_of
from gptoss_export.exporter.ops.linear_int8 import BLOCK

if TYPE_CHECKING:
    import onnx_ir as ir


def lower_int8(model: ir.Model, matrices: tuple[Matrix, ...]) -> ir.Model:
    """Replaces the Linear and LinearNoBias nodes of these matrices, in place, and returns the model with the functions
    it now needs. Its new initializers have no data; those that nothing reads any more are gone.

    Raises GraphError where a matrix is not read by exactly one such node, or stacked ones by nodes of another input.
    """
    import onnx_ir as ir

    graph = model.graph
    linears: dict[str, ir.Node] = {}
    for node in graph:
        if node.domain == DOMAIN and node.op_type in ("Linear", "LinearNoBias"):
            assert node.inputs[1] is not None
            linears[str(node.inputs[1].name)] = node
    for matrix in matrices:
        _replace(graph, matrix, _nodes_of(graph, matrix, linears))
    return ir.Model(
        graph, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions_of(graph)
    )


def _nodes_of(graph: ir.Graph, matrix: Matrix, linears: dict[str, ir.Node]) -> list[ir.Node]:
    nodes = [linears[weight.name] for weight in matrix.weights if weight.name in linears]
    stored = [graph.initializers.get(ref.name) for ref in (*matrix.weights, *matrix.biases)]
    if len(nodes) != len(matrix.weights) or any(value is None or len(value.uses()) != 1 for value in stored):
        raise _not_as_expected(matrix, "is not read by one Linear")
    if len({node.inputs[0] for node in nodes}) != 1:
        raise _not_as_expected(matrix, "has parts with different inputs")
    return nodes


def _not_as_expected(matrix: Matrix, what: str) -> GraphError:
    return GraphError(
        f"{matrix.name} {what} in the graph, and cannot become int8",
        "Report this with config.json and the versions that --version prints; ort-cpu keeps the weights as stored.",
    )


def _replace(graph: ir.Graph, matrix: Matrix, olds: list[ir.Node]) -> None:
    import onnx_ir as ir

    first = olds[0]
    rows, columns = matrix.rows, matrix.columns
    inputs = [
        first.inputs[0],
        _weight(graph, matrix.weight_name, ir.DataType.INT8, (rows, columns)),
        _weight(graph, matrix.scales_name, ir.DataType.BFLOAT16, (rows, columns // BLOCK)),
    ]
    if matrix.bias_name is None:
        op = "LinearInt8NoBias"
    else:
        op = "LinearInt8"
        bias = graph.initializers.get(matrix.bias_name)
        inputs.append(bias or _weight(graph, matrix.bias_name, ir.DataType.BFLOAT16, (rows,)))
    product = ir.node(op, inputs, domain=DOMAIN, name=matrix.name)
    news, outputs = [product], list(product.outputs)
    if len(olds) > 1:
        stacked = product.outputs[0]
        stacked.name, stacked.type = matrix.name, first.outputs[0].type
        stacked.shape = ir.Shape([*(first.outputs[0].shape or ())[:-1], rows])
        news.append(_split(graph, matrix, stacked))
        outputs = list(news[1].outputs)
    for old, new in zip(olds, outputs, strict=True):
        result = old.outputs[0]
        new.name, new.shape, new.type = result.name, result.shape, result.type
    graph.insert_before(first, news)
    ir.convenience.replace_all_uses_with([node.outputs[0] for node in olds], outputs, replace_graph_outputs=True)
    for old in olds:
        graph.remove(old, safe=True)
    for name in matrix.replaced:
        del graph.initializers[name]


def _split(graph: ir.Graph, matrix: Matrix, stacked: ir.Value) -> ir.Node:
    import onnx_ir as ir

    sizes = [weight.shape[0] for weight in matrix.weights]
    name = "split_sizes_" + "_".join(map(str, sizes))
    if name not in graph.initializers:
        graph.initializers.add(ir.val(name, const_value=ir.tensor(np.array(sizes, np.int64), name=name)))
    return ir.node(
        "Split", [stacked, graph.initializers[name]], {"axis": -1}, num_outputs=len(sizes), name=f"{matrix.name}.split"
    )


def _weight(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """A new initializer without data."""
    import onnx_ir as ir

    value = ir.val(name, dtype, shape)
    graph.initializers.add(value)
    return value

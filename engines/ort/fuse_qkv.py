"""The three Linear of a layer that read the same values become one LinearQKV: one node to start instead of three."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from gptoss_export.exporter.ops import DOMAIN, functions_of

if TYPE_CHECKING:
    import onnx_ir as ir


def fuse_qkv(model: ir.Model) -> ir.Model:
    """Fuses q, k and v of every layer, in place, and returns the model with the functions it now needs."""
    import onnx_ir as ir

    graph = model.graph
    by_input: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if node.domain == DOMAIN and node.op_type == "Linear":
            assert node.inputs[0] is not None
            by_input[node.inputs[0]].append(node)
    for x, olds in by_input.items():
        if len(olds) != 3:
            continue
        weights = [value for old in olds for value in old.inputs[1:]]
        outputs = [
            ir.Value(name=old.outputs[0].name, type=old.outputs[0].type, shape=old.outputs[0].shape) for old in olds
        ]
        fused = ir.Node(DOMAIN, "LinearQKV", [x, *weights], outputs=outputs, name=f"{olds[0].name}.qkv")
        graph.insert_before(olds[0], fused)
        ir.convenience.replace_all_uses_with([old.outputs[0] for old in olds], outputs)
        graph.remove(olds, safe=True)
    return ir.Model(
        graph, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions_of(graph)
    )

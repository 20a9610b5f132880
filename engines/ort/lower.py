"""SinkAttention becomes com.microsoft.GroupQueryAttention: fused attention with sinks, fp32 on CPU.

Who sees whom stays the dialect's business: GroupQueryAttention decides by places in the cache, the dialect by
positions, and with padding these differ. So every mask, the window included, enters as an attention bias, computed
once for each kind of layer and shared by all layers of that kind; the operator's own causal mask and lengths cover the
whole cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gptoss_export.exporter.ops import DOMAIN, functions_of

if TYPE_CHECKING:
    import onnx_ir as ir

CONTRIB = "com.microsoft"


def lower_attention(model: ir.Model) -> ir.Model:
    """Replaces every SinkAttention of the model, in place, and returns the model with the functions it now needs."""
    import onnx_ir as ir

    graph = model.graph
    attentions = [node for node in graph if node.domain == DOMAIN and node.op_type == "SinkAttention"]
    graph.opset_imports[CONTRIB] = 1
    lengths: tuple[ir.Value, ir.Value] | None = None
    biases: dict[int, ir.Value] = {}
    for attention in attentions:
        q, k, v, past_key, past_value, sinks, q_pos, k_pos = attention.inputs
        if lengths is None:
            lengths = _lengths(attention, k_pos)
        window = attention.attributes["window"].as_int()
        if window not in biases:
            name = f"window_{window}_bias" if window else "full_bias"
            biases[window] = _insert(attention, "PositionBias", [q_pos, k_pos], name, {"window": window}, DOMAIN)
        sinks_float = _insert(attention, "Cast", [sinks], f"{attention.name}.sinks_float", {"to": 1})
        attributes = {
            "num_heads": attention.attributes["num_heads"].as_int(),
            "kv_num_heads": attention.attributes["kv_heads"].as_int(),
            "scale": attention.attributes["scale"].as_float(),
        }
        inputs = [q, k, v, past_key, past_value, *lengths, None, None, None, biases[window], sinks_float]
        fused = ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB, num_outputs=3, name=attention.name)
        for old, new in zip(attention.outputs, fused.outputs, strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
        graph.insert_before(attention, fused)
        ir.convenience.replace_all_uses_with(attention.outputs, fused.outputs, replace_graph_outputs=True)
        graph.remove(attention, safe=True)
    return ir.Model(
        graph, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions_of(graph)
    )


def _lengths(node: ir.Node, key_positions: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [B] and total_sequence_length, both int32: every row uses the whole cache."""
    batch_total = _insert(node, "Shape", [key_positions], "batch_and_total")
    to_int = {"to": 6}
    dims = _insert(node, "Cast", [batch_total], "batch_and_total_int", to_int)
    first, second = (_insert(node, "Constant", [], f"index_{i}", {"value_int": i}) for i in (0, 1))
    total = _insert(node, "Gather", [dims, second], "total_length")
    batch = _insert(node, "Gather", [batch_total, first], "batch")
    one_int = _insert(node, "Cast", [second], "one_int", to_int)
    last = _insert(node, "Sub", [total, one_int], "last_place")
    vector = _insert(node, "Constant", [], "vector", {"value_ints": [-1]})
    rows = _insert(node, "Reshape", [batch, vector], "batch_shape")
    return _insert(node, "Expand", [last, rows], "last_places"), total


def _insert(
    at: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    attributes: Mapping[str, int | Sequence[int]] | None = None,
    domain: str = "",
) -> ir.Value:
    """Puts a node of one output before `at`; its output has the node's name."""
    import onnx_ir as ir

    node = ir.node(op, inputs, attributes, domain=domain, name=name)
    node.outputs[0].name = name
    assert at.graph is not None
    at.graph.insert_before(at, node)
    return node.outputs[0]

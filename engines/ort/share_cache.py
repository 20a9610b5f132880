"""SinkAttention becomes SharedSinkAttention: the cache keeps its memory, and a step writes only what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_export.engines.ort.shared_cache import WINDOWS_KEY
from gptoss_export.exporter.ops import DOMAIN, functions_of

if TYPE_CHECKING:
    import onnx_ir as ir


def share_cache(model: ir.Model) -> ir.Model:
    """Replaces every SinkAttention of the model, in place, and returns the model with the functions it now needs.

    past_key_values.N and present.N then have as many slots as the caller gives them, window_slots in a layer with a
    window and cache_slots in the others.
    """
    import onnx_ir as ir

    graph = model.graph
    windows = []
    for old in [node for node in graph if node.domain == DOMAIN and node.op_type == "SinkAttention"]:
        window = old.attributes["window"].as_int()
        windows.append(window)
        outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in old.outputs]
        new = ir.Node(DOMAIN, "SharedSinkAttention", old.inputs, old.attributes, outputs=outputs, name=old.name)
        for value in (old.inputs[3], old.inputs[4], *outputs[1:]):
            assert value is not None and value.shape is not None
            batch, heads, _, dim = value.shape
            value.shape = ir.Shape([batch, heads, "window_slots" if window else "cache_slots", dim])
        graph.insert_before(old, new)
        ir.convenience.replace_all_uses_with(old.outputs, outputs, replace_graph_outputs=True)
        graph.remove(old, safe=True)
    shared = ir.Model(
        graph, ir_version=model.ir_version, producer_name=model.producer_name, functions=functions_of(graph)
    )
    shared.metadata_props[WINDOWS_KEY] = ",".join(str(window) for window in windows)
    return shared

"""From a config to the canonical graph: trace, assemble, simplify. No weight is read or even needed.

graph = build_graph(checkpoint.config, checkpoint.layout)
bind(graph, {"weights": checkpoint.tensors})
onnx_ir.save(graph, "release/model.onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Layout

if TYPE_CHECKING:
    import onnx_ir as ir


def build_graph(config: ModelConfig, layout: Layout) -> ir.Model:
    """The canonical graph of the network; its weights are initializers without data, named as in the checkpoint."""
    from gptoss_export.exporter.graph.assemble import assemble
    from gptoss_export.exporter.graph.simplify import simplify
    from gptoss_export.exporter.graph.trace import trace

    return simplify(assemble(trace(config, layout), config))

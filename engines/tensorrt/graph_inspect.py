"""`engines.inspector` for TensorRT's targets: their lowered graph in ONNX Runtime, since an engine shows nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_export.engines.ort.inspect import ANY_INDEX, GraphInspector, load_graph, runtime_name
from gptoss_export.engines.ort.tapped import TappedSession
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.tensorrt.graph_run import GraphRunner, external_weights, start
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, read_metadata

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class GraphBackend:
    """See `engines.ort.inspect.Backend`; the graph's tokens are rows."""

    folder: Path
    metadata: EngineMetadata
    threads: int | None
    token_rows: bool = True

    @property
    def description(self) -> str:
        return f"{runtime_name('CPUExecutionProvider')}, the engine's graph"

    def session(self, model: ir.Model) -> Any:
        return start(model, self.folder, self.threads)

    def runner(self, session: TappedSession) -> Runner:
        weights = external_weights(session, self.folder, self.metadata)
        return GraphRunner(session, weights, self.metadata.limits, ANY_INDEX)


def open_graph_inspector(folder: Path, threads: int | None) -> GraphInspector:
    """The inspector of the graph in `folder`. Raises SessionError, GraphError, and what `read_metadata` raises."""
    return GraphInspector(load_graph(folder), GraphBackend(folder, read_metadata(folder), threads))

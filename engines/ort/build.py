"""The canonical graph becomes model.onnx for ONNX Runtime.

`onnx` keeps the dialect: function bodies run anywhere. `ort-cpu` is for our kernels. Where this installation has none,
it uses ONNX Runtime's own operators as far as a probe has shown on this runtime that they compute what the dialect
says, and the bodies elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.build_info import BuildInfo
from gptoss_export.engines.ort.genai import write_genai_config
from gptoss_export.engines.ort.library import kernels_work
from gptoss_export.engines.ort.lower import lower_attention
from gptoss_export.engines.ort.probe import probe_attention
from gptoss_export.engines.ort.run import BATCHED_CHUNKS_KEY
from gptoss_export.engines.ort.session import MODEL_FILE
from gptoss_export.engines.ort.share_cache import share_cache
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.graph.bind import bind
from gptoss_export.exporter.graph.simplify import weightless_proto

if TYPE_CHECKING:
    import onnx_ir as ir


def build_onnx(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    """Writes the portable model. `graph` is not changed."""
    _write(graph.clone(), checkpoint, folder, weights_dir)
    genai = write_genai_config(checkpoint.config, MODEL_FILE, folder, shared_cache=False)
    return BuildInfo(engine="any ONNX runtime", provider="CPUExecutionProvider", notes=(genai,))


def build_ort_cpu(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    """Writes the model for ONNX Runtime on CPU. `graph` is not changed."""
    import onnxruntime as ort

    why_not = kernels_work()
    if why_not is None:
        model, notes = share_cache(graph.clone()), ["kernels: our own, cache updated in place"]
    else:
        model, attention = _stock_operators(graph.clone(), checkpoint)
        notes = [f"kernels: none, {why_not}", attention, "experts: function body, one expert in float32 at a time"]
    _write(model, checkpoint, folder, weights_dir)
    notes.append(write_genai_config(checkpoint.config, MODEL_FILE, folder, shared_cache=why_not is None))
    return BuildInfo(f"onnxruntime {ort.__version__}", "CPUExecutionProvider", tuple(notes))


def _stock_operators(model: ir.Model, checkpoint: Checkpoint) -> tuple[ir.Model, str]:
    """The model with ONNX Runtime's own attention, if that is what the dialect says, and a note on it."""
    probe = probe_attention(checkpoint.config)
    if not probe.passed:
        return model, f"attention: function body, GroupQueryAttention is not its definition here ({probe.failure})"
    model = lower_attention(model)
    model.metadata_props[BATCHED_CHUNKS_KEY] = str(probe.batched_chunks).lower()
    return (
        model,
        f"attention: GroupQueryAttention, within {probe.max_error:.1e} of its definition in {probe.cases} cases",
    )


def _write(model: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> None:
    """Checks the graph, points it at its weights, writes it and checks the file. Raises GraphError."""
    import onnx
    import onnx_ir as ir

    path = folder / MODEL_FILE
    try:
        onnx.checker.check_model(weightless_proto(model), full_check=True)
        bind(model, checkpoint.tensors, weights_dir)
        ir.save(model, path)
        # The checker refuses external data with several hard links, and so does every tool that loads through it.
        if all((path.parent / weights_dir / f.name).stat().st_nlink == 1 for f in checkpoint.weight_files):
            onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise GraphError(
            f"the graph is not valid ONNX: {str(error).splitlines()[0]}",
            "Report this with config.json and the versions that --version prints.",
        ) from error

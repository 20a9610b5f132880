"""The canonical graph becomes model.onnx for ONNX Runtime.

`onnx` keeps the dialect: function bodies run anywhere. `ort-cpu` is for our kernels. Where this installation has none,
it uses ONNX Runtime's own operators as far as a probe has shown on this runtime that they compute what the dialect
says, and the bodies elsewhere. `ort-cpu-int8` is the same with its dense matrices in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.build_info import BuildInfo
from gptoss_export.engines.ort.fuse_qkv import fuse_qkv
from gptoss_export.engines.ort.genai import write_genai_config
from gptoss_export.engines.ort.library import kernels_work
from gptoss_export.engines.ort.lower import lower_attention
from gptoss_export.engines.ort.lower_int8 import lower_int8
from gptoss_export.engines.ort.probe import probe_attention
from gptoss_export.engines.ort.quantize import INT8_DIR, INT8_FILE, int8_matrices, plan_file, write_file
from gptoss_export.engines.ort.run import BATCHED_CHUNKS_KEY
from gptoss_export.engines.ort.session import MODEL_FILE
from gptoss_export.engines.ort.share_cache import share_cache
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import GraphError, WeightsModeError
from gptoss_export.exporter.graph.bind import bind
from gptoss_export.exporter.graph.simplify import weightless_proto

if TYPE_CHECKING:
    import onnx_ir as ir


def build_onnx(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    """Writes the portable model. `graph` is not changed."""
    _write(graph.clone(), {weights_dir: checkpoint.tensors}, folder)
    genai = write_genai_config(checkpoint.config, MODEL_FILE, folder, shared_cache=False)
    return BuildInfo(engine="any ONNX runtime", provider="CPUExecutionProvider", notes=(genai,))


def build_ort_cpu(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    """Writes the model for ONNX Runtime on CPU. `graph` is not changed."""
    return _build_ort_cpu(graph.clone(), {weights_dir: checkpoint.tensors}, checkpoint, folder, ())


def build_ort_cpu_int8(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    """Quantises q, k, v, o and lm_head into INT8_DIR/INT8_FILE of the folder and writes the model that reads them.

    Everything else is read from the checkpoint's own files. `graph` is not changed.
    """
    if weights_dir == INT8_DIR:
        raise WeightsModeError(
            f"--weights in-place: the checkpoint's folder is named {INT8_DIR}, as that of the int8 weights has to be",
            "rename the checkpoint's folder, or use --weights copy",
        )
    matrices = int8_matrices(checkpoint)
    file = plan_file(matrices, folder / INT8_DIR / INT8_FILE)
    write_file(matrices, file)
    replaced = {name for matrix in matrices for name in matrix.replaced}
    stored = {name: ref for name, ref in checkpoint.tensors.items() if name not in replaced}
    note = f"{INT8_DIR}/{INT8_FILE}: {len(matrices)} matrices (q, k and v as one, o, lm_head), 32 weights a scale"
    model = lower_int8(graph.clone(), matrices)
    return _build_ort_cpu(model, {weights_dir: stored, INT8_DIR: file.tensors}, checkpoint, folder, (note,))


def int8_bytes(checkpoint: Checkpoint) -> int:
    """The size of the file that `build_ort_cpu_int8` adds to the artifact."""
    return plan_file(int8_matrices(checkpoint), Path(INT8_FILE)).nbytes


def _build_ort_cpu(
    model: ir.Model,
    weights: Mapping[str, Mapping[str, TensorRef]],
    checkpoint: Checkpoint,
    folder: Path,
    notes: tuple[str, ...],
) -> BuildInfo:
    """Lowers what the ort-cpu targets have in common. `model` is changed; weights: as `bind` takes them."""
    import onnxruntime as ort

    why_not = kernels_work()
    if why_not is None:
        model, how = share_cache(fuse_qkv(model)), ["kernels: our own, cache updated in place"]
    else:
        model, attention = _stock_operators(model, checkpoint)
        bodies = "linear layers and experts: function bodies, in float32, one expert at a time"
        how = [f"kernels: none, {why_not}", attention, bodies]
    _write(model, weights, folder)
    genai = write_genai_config(checkpoint.config, MODEL_FILE, folder, shared_cache=why_not is None)
    return BuildInfo(f"onnxruntime {ort.__version__}", "CPUExecutionProvider", (*how, *notes, genai))


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


def _write(model: ir.Model, weights: Mapping[str, Mapping[str, TensorRef]], folder: Path) -> None:
    """Checks the graph, points it at its weights, writes it and checks the file. Raises GraphError."""
    import onnx
    import onnx_ir as ir

    path = folder / MODEL_FILE
    try:
        onnx.checker.check_model(weightless_proto(model), full_check=True)
        bind(model, weights)
        ir.save(model, path)
        # The checker refuses external data with several hard links, and so does every tool that loads through it.
        files = {folder / place / ref.file.name for place, refs in weights.items() for ref in refs.values()}
        if all(file.stat().st_nlink == 1 for file in files):
            onnx.checker.check_model(path, full_check=True)
    except onnx.checker.ValidationError as error:
        raise GraphError(
            f"the graph is not valid ONNX: {str(error).splitlines()[0]}",
            "Report this with config.json and the versions that --version prints.",
        ) from error

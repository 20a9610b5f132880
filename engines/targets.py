"""The table of targets: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.build_info import BuildInfo
from gptoss_export.engines.runner import Runner
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import TargetUnavailableError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Target:
    """One row of the table.

    build: canonical graph, checkpoint, artifact folder and the weights' folder relative to it -> writes model.onnx.
    open_runner: artifact folder, number of threads (None: all cores) -> a runner of the artifact as it lies on disk.
    requires: what has to be importable for either.
    """

    name: str
    summary: str
    engine: str
    requires: tuple[str, ...]
    build: Callable[[ir.Model, Checkpoint, Path, str], BuildInfo]
    open_runner: Callable[[Path, int | None], Runner]

    def check_available(self) -> None:
        """Raises TargetUnavailableError when this host lacks something, without importing it."""
        from importlib.util import find_spec

        missing = [name for name in self.requires if find_spec(name) is None]
        if missing:
            raise TargetUnavailableError(
                f"target {self.name} needs {', '.join(missing)}, which this Python has not",
                f"pip install {' '.join(missing)}",
            )


def _build_onnx(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    from gptoss_export.engines.ort.build import build_onnx

    return build_onnx(graph, checkpoint, folder, weights_dir)


def _build_ort_cpu(graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str) -> BuildInfo:
    from gptoss_export.engines.ort.build import build_ort_cpu

    return build_ort_cpu(graph, checkpoint, folder, weights_dir)


def _open_onnx(folder: Path, threads: int | None = None) -> Runner:
    from gptoss_export.engines.ort.run import open_ort_runner

    return open_ort_runner(folder, "CPUExecutionProvider", threads, kernels=False)


def _open_ort_cpu(folder: Path, threads: int | None = None) -> Runner:
    from gptoss_export.engines.ort.run import open_ort_runner

    return open_ort_runner(folder, "CPUExecutionProvider", threads)


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="onnx",
            summary="portable ONNX, experts in MXFP4 as stored, every custom op with a function body",
            engine="any ONNX runtime",
            requires=("onnx", "onnxruntime"),
            build=_build_onnx,
            open_runner=_open_onnx,
        ),
        Target(
            name="ort-cpu",
            summary="ONNX Runtime on CPU with our kernels, experts in MXFP4 and dense weights in bf16 as stored",
            engine="onnxruntime",
            requires=("onnx", "onnxruntime"),
            build=_build_ort_cpu,
            open_runner=_open_ort_cpu,
        ),
    )
}

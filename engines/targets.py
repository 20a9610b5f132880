"""The table of targets: the only place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.build_info import BuildInfo, BuildSettings, Execution
from gptoss_export.engines.inspector import Inspector
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.tensorrt import target as tensorrt
from gptoss_export.engines.tensorrt.flavor import find_flavor
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import TargetUnavailableError

if TYPE_CHECKING:
    import onnx_ir as ir


PACKAGES = (
    "gptoss-export",
    "ml_dtypes",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "onnxsim",
    "tokenizers",
    "torch",
    "transformers",
)
"""Distributions by which every artifact is made and measured; what else is installed must not change it."""


@dataclass(frozen=True)
class Target:
    """One row of the table.

    build: canonical graph, checkpoint, artifact folder, the weights' folder in it, settings -> writes the model.
    open_runner: artifact folder, number of threads (None: all cores) -> a runner of the artifact as it lies on disk.
    inspect: the same for what looks inside; of an engine that shows nothing, its graph.
    requires: what has to be importable for either. check_host: raises TargetUnavailableError for what else is missing.
    execution: what runs an artifact's folder on this host; where that is not its engine, stand_in runs its graph.
    check: raises TargetUnavailableError for a checkpoint and settings that cannot be built here.
    own_bytes: how much the build writes of weights, beside the checkpoint's own files.
    ram_bytes: memory that the build takes beside this program's own; 0: not worth a word.
    device_bytes: memory of the GPU that running it takes; 0: it runs on none.
    own_packages: distributions that make or run it with these settings, beside PACKAGES, where check_host passes.
    kernels: finds the installed library of its kernels, or raises TargetUnavailableError; None if it uses none.
    """

    name: str
    summary: str
    engine: str
    requires: tuple[str, ...]
    build: Callable[[ir.Model, Checkpoint, Path, str, BuildSettings], BuildInfo]
    open_runner: Callable[[Path, int | None], Runner]
    inspect: Callable[[Path, int | None], Inspector]
    execution: Callable[[Path], Execution]
    check_host: Callable[[], object] = lambda: None
    stand_in: Callable[[Path, int | None], Runner] | None = None
    check: Callable[[Checkpoint, BuildSettings], None] = lambda checkpoint, settings: None
    own_bytes: Callable[[Checkpoint, BuildSettings], int] = lambda checkpoint, settings: 0
    ram_bytes: Callable[[Checkpoint, BuildSettings], int] = lambda checkpoint, settings: 0
    device_bytes: Callable[[Checkpoint, BuildSettings], int] = lambda checkpoint, settings: 0
    own_packages: Callable[[BuildSettings], tuple[str, ...]] = lambda settings: ()
    kernels: Callable[[], Path] | None = None

    def check_available(self) -> None:
        """Raises TargetUnavailableError when this host lacks something, without importing it."""
        from importlib.util import find_spec

        missing = [name for name in self.requires if find_spec(name) is None]
        if missing:
            raise TargetUnavailableError(
                f"target {self.name} needs {', '.join(missing)}, which this Python has not",
                f"pip install {' '.join(missing)}",
            )
        self.check_host()

    def packages(self, settings: BuildSettings) -> tuple[str, ...]:
        """The distributions that decide what an artifact of this target is; of one with several names, all of them."""
        return (*PACKAGES, *self.own_packages(settings))

    def kernel_library(self) -> Path:
        """What `bundle_kernels` copies. Raises TargetUnavailableError where there is nothing."""
        if self.kernels is None:
            raise TargetUnavailableError(
                f"target {self.name} runs without kernels of ours, so --bundle-kernels has nothing to bundle",
                f"leave --bundle-kernels out, or export {self.name} by a command of its own",
            )
        return self.kernels()

    def bundle_kernels(self, folder: Path) -> str:
        """Puts the kernels into an artifact that was built, and says so in a few words for its manifest."""
        from gptoss_export.engines.ort.bundle import bundle_kernels

        return bundle_kernels(self.kernel_library(), folder)


def _build_onnx(
    graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str, settings: BuildSettings
) -> BuildInfo:
    from gptoss_export.engines.ort.build import build_onnx

    return build_onnx(graph, checkpoint, folder, weights_dir)


def _build_ort_cpu(
    graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str, settings: BuildSettings
) -> BuildInfo:
    from gptoss_export.engines.ort.build import build_ort_cpu

    return build_ort_cpu(graph, checkpoint, folder, weights_dir)


def _build_ort_cpu_int8(
    graph: ir.Model, checkpoint: Checkpoint, folder: Path, weights_dir: str, settings: BuildSettings
) -> BuildInfo:
    from gptoss_export.engines.ort.build import build_ort_cpu_int8

    return build_ort_cpu_int8(graph, checkpoint, folder, weights_dir)


def _int8_bytes(checkpoint: Checkpoint, settings: BuildSettings) -> int:
    from gptoss_export.engines.ort.build import int8_bytes

    return int8_bytes(checkpoint)


def _ort_kernels() -> Path:
    from gptoss_export.engines.ort.library import require_kernels

    return require_kernels()


def _open_onnx(folder: Path, threads: int | None = None) -> Runner:
    from gptoss_export.engines.ort.run import open_ort_runner

    return open_ort_runner(folder, "CPUExecutionProvider", threads, kernels=False)


def _open_ort_cpu(folder: Path, threads: int | None = None) -> Runner:
    from gptoss_export.engines.ort.run import open_ort_runner

    return open_ort_runner(folder, "CPUExecutionProvider", threads)


def _inspect_onnx(folder: Path, threads: int | None = None) -> Inspector:
    from gptoss_export.engines.ort.inspect import open_ort_inspector

    return open_ort_inspector(folder, "CPUExecutionProvider", threads, kernels=False)


def _inspect_ort_cpu(folder: Path, threads: int | None = None) -> Inspector:
    from gptoss_export.engines.ort.inspect import open_ort_inspector

    return open_ort_inspector(folder, "CPUExecutionProvider", threads, kernels=True)


def _inspect_trt(folder: Path, threads: int | None = None) -> Inspector:
    from gptoss_export.engines.tensorrt.graph_inspect import open_graph_inspector

    return open_graph_inspector(folder, threads)


def _ort_execution(folder: Path) -> Execution:
    from importlib.metadata import version

    return Execution("onnxruntime", version("onnxruntime"), "CPUExecutionProvider")


def _trt(name: str, precision: Precision, summary: str) -> Target:
    return Target(
        name=name,
        summary=summary,
        engine="TensorRT, or TensorRT for RTX",
        requires=("onnx", "onnxruntime"),
        build=partial(tensorrt.build, precision),
        open_runner=tensorrt.open_engine,
        inspect=_inspect_trt,
        execution=tensorrt.execution,
        check_host=find_flavor,
        stand_in=tensorrt.open_graph,
        check=partial(tensorrt.check, precision),
        own_bytes=partial(tensorrt.own_bytes, precision),
        ram_bytes=partial(tensorrt.ram_bytes, precision),
        device_bytes=partial(tensorrt.device_bytes, precision),
        own_packages=tensorrt.packages,
    )


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
            inspect=_inspect_onnx,
            execution=_ort_execution,
        ),
        Target(
            name="ort-cpu",
            summary="ONNX Runtime on CPU with our kernels, experts in MXFP4 and dense weights in bf16 as stored",
            engine="onnxruntime",
            requires=("onnx", "onnxruntime"),
            build=_build_ort_cpu,
            open_runner=_open_ort_cpu,
            inspect=_inspect_ort_cpu,
            execution=_ort_execution,
            kernels=_ort_kernels,
        ),
        Target(
            name="ort-cpu-int8",
            summary="as ort-cpu, with lm_head and most of attention in int8, 32 weights a scale",
            engine="onnxruntime",
            requires=("onnx", "onnxruntime"),
            build=_build_ort_cpu_int8,
            open_runner=_open_ort_cpu,
            inspect=_inspect_ort_cpu,
            execution=_ort_execution,
            own_bytes=_int8_bytes,
            kernels=_ort_kernels,
        ),
        _trt("trt-fp16", Precision.FP16, "TensorRT engine, experts in MXFP4 as stored, the rest in float16"),
        _trt("trt-bf16", Precision.BF16, "as trt-fp16, in bfloat16, the checkpoint's own type"),
        _trt("trt-fp32", Precision.FP32, "as trt-fp16, in float32: for comparison, not for speed"),
    )
}

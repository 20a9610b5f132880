"""The TensorRT targets: a graph in the target's type, the weights that it needs, an engine, and what runs it here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.build_info import BuildInfo, BuildSettings, Execution
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.tensorrt.cache import slots_for
from gptoss_export.engines.tensorrt.flavor import distributions_of, find_flavor, gpu_problem
from gptoss_export.engines.tensorrt.metadata import (
    ENGINE_NAME,
    EngineInput,
    EngineMetadata,
    read_metadata,
    write_metadata,
)
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout, TensorRef
from gptoss_export.exporter.errors import GraphError, TargetUnavailableError
from gptoss_export.exporter.progress import format_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

MODEL_FILE = "model.onnx"
_COPIES, _BASE_BYTES = 2.25, 1 << 30
_SLACK_BYTES = 1 << 30
_PACKAGES = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def check(precision: Precision, checkpoint: Checkpoint, settings: BuildSettings) -> None:
    """Raises TargetUnavailableError for a checkpoint or a host that no engine can be built for, or on."""
    options = settings.engine
    flavor = find_flavor(options.flavor)
    if flavor.needs_gpu and (problem := gpu_problem()):
        raise TargetUnavailableError(
            f"{flavor.title} builds for the GPU of the host it runs on, and here is {problem}",
            "use --trt-flavor rtx, which builds without one, or run this on the GPU host",
        )
    if checkpoint.layout is Layout.HF_BF16:
        raise TargetUnavailableError(
            f"trt-{precision.value} runs MXFP4 experts, and those of {checkpoint.root} are bfloat16",
            "export the MXFP4 checkpoint, or use --target onnx or ort-cpu",
        )
    if options.plugin and importlib.util.find_spec("triton") is None:
        raise TargetUnavailableError(
            "the experts' kernels are compiled by triton, which this Python has not",
            "pip install 'gptoss-export[trt-rtx]', or use --trt-experts function",
        )


def packages(settings: BuildSettings) -> tuple[str, ...]:
    """The distributions that build and run an engine with these settings, beside those of every target."""
    engine = find_flavor(settings.engine.flavor).module
    return (*distributions_of(engine), *(("triton",) if settings.engine.plugin else ()))


def ram_bytes(precision: Precision, checkpoint: Checkpoint, settings: BuildSettings) -> int:
    """What building the engine takes of this host's memory: TensorRT holds constants two and a quarter times."""
    from gptoss_export.engines.tensorrt.dense import dense_tensors
    from gptoss_export.engines.tensorrt.lower import is_external

    dense = sum(ref.nbytes for ref in dense_tensors(checkpoint)) * (2 if precision is Precision.FP32 else 1)
    embedded = settings.engine.engine_weights == "embedded"
    others = sum(ref.nbytes for ref in checkpoint.tensors.values() if embedded and is_external(ref.name))
    return _BASE_BYTES + int(_COPIES * (dense + others))


def device_bytes(precision: Precision, checkpoint: Checkpoint, settings: BuildSettings) -> int:
    """What running the engine takes of the GPU's memory."""
    from gptoss_export.engines.tensorrt import preflight

    return preflight.device_bytes(precision, checkpoint, settings.engine)


def own_bytes(precision: Precision, checkpoint: Checkpoint, settings: BuildSettings) -> int:
    """What is written beside the checkpoint's files: dense weights in the target's type, once more in the engine."""
    from gptoss_export.engines.tensorrt.dense import dense_tensors, plan_dense

    file = plan_dense(checkpoint, precision, Path())
    dense = file.nbytes if file else sum(ref.nbytes for ref in dense_tensors(checkpoint))
    embedded = checkpoint.nbytes if settings.engine.engine_weights == "embedded" else 0
    # Beside its weights an engine has layers and kernels, 57 MB of 2.5 GB for gpt-oss-20b.
    return (file.nbytes if file else 0) + dense * 103 // 100 + embedded


def build(
    precision: Precision,
    graph: ir.Model,
    checkpoint: Checkpoint,
    folder: Path,
    weights_dir: str,
    settings: BuildSettings,
) -> BuildInfo:
    """Writes model.onnx, engine.plan, engine.json and, unless the type is the checkpoint's, dense/. `graph` stays.

    Raises WeightRangeError, EngineBuildError, GraphError, DiskSpaceError.
    """
    from gptoss_export.engines.tensorrt.build import build_engine
    from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

    options, config = settings.engine, checkpoint.config
    inputs, notes = write_graph(precision, graph, checkpoint, folder, weights_dir, settings)
    shape = MoEShape(
        config.num_experts,
        config.hidden_size,
        config.intermediate_size,
        config.top_k,
        precision.value,
        config.swiglu_alpha,
        config.swiglu_limit,
    )
    result = build_engine(
        folder / MODEL_FILE,
        folder / ENGINE_NAME,
        options,
        plugin_shape=shape if options.plugin else None,
        ram_bytes=ram_bytes(precision, checkpoint, settings),
        most_bytes=_SLACK_BYTES + 2 * own_bytes(precision, checkpoint, settings),
        progress=settings.progress,
    )
    capabilities = _compute_capabilities(result.flavor, options.compute_capabilities)
    write_metadata(
        EngineMetadata(
            flavor=result.flavor,
            version=result.version,
            compute_capabilities=capabilities,
            dtype=precision.value,
            engine_weights=options.engine_weights,
            max_batch=options.max_batch,
            max_prompt=options.max_prompt,
            max_context=options.max_context,
            max_logits=options.max_logits,
            plugin=options.plugin,
            engine_sha256=result.sha256,
            inputs=inputs,
        ),
        folder,
    )
    settings.progress.note(f"engine: built with at most {format_bytes(result.peak_rss)} of memory")
    experts = "plugin" if options.plugin else "function body"
    notes.append(f"engine: {format_bytes(result.nbytes)}, {result.layers} layers, experts by {experts}")
    if inputs:
        bound = format_bytes(sum(entry.nbytes for entry in inputs.values()))
        notes.append(f"engine inputs: {len(inputs)} weights, {bound}, read from {weights_dir or '.'}/ at load")
    provider = f"compute capability {', '.join(capabilities)}"
    return BuildInfo(f"{_PACKAGES[result.flavor]} {result.version}", provider, tuple(notes))


def write_graph(
    precision: Precision,
    graph: ir.Model,
    checkpoint: Checkpoint,
    folder: Path,
    weights_dir: str,
    settings: BuildSettings,
) -> tuple[dict[str, EngineInput], list[str]]:
    """The part of `build` before the engine: model.onnx and dense/. Returns the engine's weight inputs and notes."""
    from gptoss_export.engines.tensorrt.dense import audit_dense, plan_dense, write_dense
    from gptoss_export.engines.tensorrt.lower import is_external, lower

    options, notes = settings.engine, []
    external = options.engine_weights == "external"
    model = lower(graph.clone(), precision, slots=slots_for(options.max_context), external_weights=external)
    dense = plan_dense(checkpoint, precision, folder)
    with settings.progress.task(f"dense weights in {precision.value}"):
        if dense:
            notes.append(f"{dense.path.relative_to(folder)}: {write_dense(checkpoint, precision, dense)}")
        else:
            audit_dense(checkpoint)
    converted = dense.tensors if dense else {}
    inputs = {name: ref for name, ref in checkpoint.tensors.items() if external and is_external(name)}
    stored = {n: ref for n, ref in checkpoint.tensors.items() if n not in inputs and n not in converted}
    places: dict[str, Mapping[str, TensorRef]] = {weights_dir: stored}
    if dense:
        places[dense.path.parent.name] = converted
    _write_model(model, places, folder)
    return {name: _input(ref, weights_dir) for name, ref in inputs.items()}, notes


def execution(folder: Path) -> Execution:
    """What runs the engine in `folder` on this host. Raises what `read_metadata` raises."""
    import onnxruntime as ort

    from gptoss_export.engines.tensorrt.cuda import device_missing

    metadata = read_metadata(folder)
    reason = device_missing()
    return Execution(
        name=_PACKAGES[metadata.flavor],
        version=metadata.version,
        provider=f"compute capability {', '.join(metadata.compute_capabilities)}",
        not_executed_reason=reason,
        ran_instead=f"onnxruntime {ort.__version__}, CPUExecutionProvider" if reason else None,
        max_batch=metadata.max_batch,
        max_context=metadata.max_context,
    )


def open_engine(folder: Path, threads: int | None) -> Runner:
    """The engine itself. Raises TargetUnavailableError where there is no GPU, and what `open_trt_runner` raises."""
    from gptoss_export.engines.tensorrt.run import open_trt_runner

    return open_trt_runner(folder, threads)


def open_graph(folder: Path, threads: int | None) -> Runner:
    """The graph that the engine was built from, in ONNX Runtime: for parity where no GPU is."""
    from gptoss_export.engines.tensorrt.graph_run import open_graph_runner

    return open_graph_runner(folder, threads)


def _write_model(model: ir.Model, places: Mapping[str, Mapping[str, TensorRef]], folder: Path) -> None:
    import onnx
    import onnx_ir as ir

    from gptoss_export.exporter.graph.bind import bind
    from gptoss_export.exporter.graph.simplify import weightless_proto

    try:
        onnx.checker.check_model(weightless_proto(model), full_check=True)
    except onnx.checker.ValidationError as error:
        raise GraphError(
            f"the lowered graph is not valid ONNX: {str(error).splitlines()[0]}",
            "Report this with config.json and the versions that --version prints.",
        ) from error
    bind(model, places)
    ir.save(model, folder / MODEL_FILE)


def _input(ref: TensorRef, weights_dir: str) -> EngineInput:
    file = f"{weights_dir}/{ref.file.name}" if weights_dir else ref.file.name
    return EngineInput(file, ref.dtype, ref.shape, ref.offset, ref.nbytes)


def _compute_capabilities(flavor: str, chosen: tuple[str, ...]) -> tuple[str, ...]:
    if flavor == "rtx":
        return chosen or ("8.0+",)
    from gptoss_export.engines.tensorrt.cuda import Device

    major, minor = Device().info.compute_capability
    return (f"{major}.{minor}",)

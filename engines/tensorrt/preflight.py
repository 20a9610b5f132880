"""What has to be true before an engine is deserialised, so that a mismatch is one clear line.

metadata = read_metadata(folder)
trt = load_package(metadata)             # the package and version that built it
check_files(folder, metadata)            # the engine is the one that was delivered
device = Device()
check_device(metadata, device.info)
check_memory(metadata, folder, device)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss_export.engines.tensorrt.cache import slots_for
from gptoss_export.engines.tensorrt.cuda import Device, DeviceInfo, device_missing
from gptoss_export.engines.tensorrt.flavor import find_flavor
from gptoss_export.engines.tensorrt.metadata import ENGINE_NAME, METADATA_NAME, EngineMetadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.exporter.artifact import MANIFEST_NAME, read_manifest
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import EngineMismatchError, IntegrityError, OutOfMemoryError
from gptoss_export.exporter.weights import hash_files

_TITLES = {"rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
_DISTRIBUTIONS = {"rtx": "tensorrt-rtx-cu13", "tensorrt": "tensorrt"}
_AGAIN = "export again, or copy the artifact again from where it was made"


def load_package(metadata: EngineMetadata) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`, in the version that built the engine.

    Raises TargetUnavailableError where the package is missing, EngineMismatchError where it has another version.
    """
    trt = find_flavor(metadata.flavor).load()
    title, distribution = _TITLES[metadata.flavor], _DISTRIBUTIONS[metadata.flavor]
    if str(trt.__version__) != metadata.version:
        raise EngineMismatchError(
            f"the engine is of {title} {metadata.version}, and this host has {trt.__version__}",
            f"pip install {distribution}=={metadata.version}, or rebuild it here: {rebuild_command(metadata)}",
        )
    return trt


def check_files(folder: Path, metadata: EngineMetadata) -> None:
    """Whether engine and description are those that were delivered, and the weights files long enough.

    The engine is hashed; where there is a manifest, it has to agree. The weights are not hashed: `validate` does that.
    Raises IntegrityError.
    """
    paths = {name: folder / name for name in (ENGINE_NAME, METADATA_NAME)}
    for path in paths.values():
        if not path.is_file():
            raise IntegrityError(f"{path} is missing", _AGAIN)
    for name, entry in metadata.inputs.items():
        file = folder / entry.file
        if not file.is_file():
            raise IntegrityError(f"{file} is missing, which holds {name}", _AGAIN)
        if file.stat().st_size < entry.offset + entry.nbytes:
            raise IntegrityError(f"{file} ends before {name} does, at byte {entry.offset + entry.nbytes}", _AGAIN)
    records = hash_files(paths)
    if records[ENGINE_NAME].sha256 != metadata.engine_sha256:
        raise IntegrityError(
            f"{paths[ENGINE_NAME]} is not the engine that {METADATA_NAME} describes: its sha256 is "
            f"{records[ENGINE_NAME].sha256}, and {metadata.engine_sha256} was built",
            _AGAIN,
        )
    # While an artifact is being made it has no manifest yet; nobody is handed one without.
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder)
        for name, record in records.items():
            if manifest.files.get(name) != record:
                raise IntegrityError(f"{paths[name]} is not the file that the manifest names", _AGAIN)


def check_device(metadata: EngineMetadata, info: DeviceInfo) -> None:
    """Raises EngineMismatchError where the GPU is not one that the engine was built for."""
    if not metadata.runs_on(info.compute_capability):
        built = ", ".join(text.replace("+", " and later") for text in metadata.compute_capabilities)
        major, minor = info.compute_capability
        raise EngineMismatchError(
            f"the engine is for compute capability {built}, and {info.name} has {major}.{minor}",
            f"use such a GPU, or rebuild it for this one: {rebuild_command(metadata)}",
        )


def check_memory(need: int, device: Device) -> None:
    """Raises OutOfMemoryError where the device has fewer than `need` bytes free."""
    free = device.free_bytes()
    if need > free:
        raise OutOfMemoryError(
            f"the engine needs {_gib(need)} of device memory, and {device.info.name} has {_gib(free)} free "
            f"of {_gib(device.info.total_bytes)}",
            "end other processes on the GPU, use a larger one, or rebuild it with a smaller --max-context, "
            "--max-prompt or --max-batch",
        )


def device_room() -> tuple[str, int] | None:
    """The name of the GPU that engines would run on, and its free bytes; None where there is none."""
    if device_missing() is not None:
        return None
    device = Device()
    try:
        return device.info.name, device.free_bytes()
    finally:
        device.close()


def stored_bytes(metadata: EngineMetadata, folder: Path) -> int:
    """Device memory for the weights alone: those that are inputs, and the engine's own."""
    return metadata.input_bytes + (folder / ENGINE_NAME).stat().st_size


def device_bytes(precision: Precision, checkpoint: Checkpoint, options: EngineOptions) -> int:
    """Device memory that running an engine takes which is not built yet: weights, one row's cache, activations."""
    from gptoss_export.engines.tensorrt.dense import dense_tensors

    config = checkpoint.config
    dense = sum(ref.nbytes for ref in dense_tensors(checkpoint))
    wider = dense if precision is Precision.FP32 else 0
    item = 4 if precision is Precision.FP32 else 2
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * slots_for(options.max_context) * item
    columns = options.max_batch * options.max_prompt
    states = columns * (8 * config.hidden_size + 3 * config.top_k * config.intermediate_size)
    logits = options.max_logits * config.vocab_size
    return checkpoint.nbytes + wider + cache + 4 * (states + logits)


def rebuild_command(metadata: EngineMetadata) -> str:
    """What makes such an engine again, on the host that is to run it."""
    usual = EngineOptions()
    options = [f"--target trt-{metadata.dtype} --trt-flavor {metadata.flavor}"]
    options += [
        f"--{name.replace('_', '-')} {getattr(metadata, name)}"
        for name in ("max_batch", "max_prompt", "max_context", "engine_weights")
        if getattr(metadata, name) != getattr(usual, name)
    ]
    if not metadata.plugin:
        options.append("--trt-experts function")
    return f"gptoss-export {' '.join(options)} --model <checkpoint> --output <new>"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"

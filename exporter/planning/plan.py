"""What an export will do, decided before anything is written: `--dry-run` prints it, the pipeline follows
it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import WeightsModeError
from gptoss_export.exporter.output.staging import check_output, kept_bytes
from gptoss_export.exporter.planning.estimate import Build
from gptoss_export.exporter.planning.preflight import Preflight, existing, look
from gptoss_export.exporter.planning.request import ExportRequest
from gptoss_export.exporter.progress import format_bytes
from gptoss_export.exporter.weights import WeightsMode, can_reflink, in_place_dir

WEIGHTS_DIR = "weights"
_CONFIG_NAME = "config.json"
_INDEX_NAME = "model.safetensors.index.json"
_GRAPH_BYTES = 32 << 20  # graph, manifest and report; 1 to 3 MB in practice


@dataclass(frozen=True)
class Plan:
    """What will be done.

    folders: where each target's artifact will lie. checkpoint_files: what makes up weights_dir, by name,
    sources with their links resolved. copied_bytes: to be written below --output, over all targets. preflight:
    what that and the rest takes, and what is there. steps: the stages in words.
    """

    request: ExportRequest
    checkpoint: Checkpoint
    folders: Mapping[str, Path]
    weights_dir: str
    checkpoint_files: Mapping[str, Path]
    copied_bytes: int
    preflight: Preflight
    steps: tuple[str, ...]

    @property
    def protected(self) -> tuple[Path, ...]:
        """What no output may replace."""
        return (self.checkpoint.root.resolve(), *self.checkpoint_files.values())

    @property
    def checkpoint_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.checkpoint_files.values())


def make_plan(request: ExportRequest) -> Plan:
    """Opens the checkpoint's headers, asks every target whether it can work here, and checks output, disk and memory.

    Raises the errors of CheckpointError, TargetUnavailableError, OutputExistsError, WeightsModeError, PromptError,
    TokenizerError and, unless the preflight is to be ignored, DiskSpaceError and OutOfMemoryError. Nothing is written
    but, where the disk looks too small, one anonymous file to try a reflink with.
    """
    from gptoss_export.engines.targets import TARGETS
    from gptoss_export.exporter.checkpoint.hub import resolve_model
    from gptoss_export.exporter.checkpoint.open import open_checkpoint

    targets = [TARGETS[name] for name in request.targets]
    for target in targets:
        target.check_available()
    libraries = [target.kernel_library() for target in targets] if request.bundle_kernels else []
    checkpoint = open_checkpoint(resolve_model(request.model, request.revision))
    settings = BuildSettings(request.engine)
    for target in targets:
        target.check(checkpoint, settings)
    files = checkpoint_files(checkpoint)
    output = request.output
    weights_dir = WEIGHTS_DIR
    if request.weights is WeightsMode.IN_PLACE:
        weights_dir = _in_place(request, checkpoint)
    else:
        check_output(output, force=request.force, protect=(checkpoint.root.resolve(), *files.values()))
    single = len(request.targets) == 1
    side_bytes = sum(path.stat().st_size for path in checkpoint.side_files)
    copied = (side_bytes + _GRAPH_BYTES) * len(request.targets)
    own = {target.name: target.own_bytes(checkpoint, settings) for target in targets}
    copied += sum(own.values()) + sum(library.stat().st_size for library in libraries)
    parent = existing(output)
    weights = _weight_bytes(request, files, parent, copied)
    copied += weights
    ram = {target.name: target.ram_bytes(checkpoint, settings) for target in targets}
    preflight = look(
        checkpoint,
        request,
        [Build(target.name, own[target.name], ram[target.name], target.kernels is not None) for target in targets],
        output=parent,
        written=max(copied - kept_bytes(output), 0),
        weights=weights,
        device=max(target.device_bytes(checkpoint, settings) for target in targets),
    )
    if not request.ignore_preflight:
        preflight.require()
    return Plan(
        request=request,
        checkpoint=checkpoint,
        folders={target: output if single else output / target for target in request.targets},
        weights_dir=weights_dir,
        checkpoint_files=files,
        copied_bytes=copied,
        preflight=preflight,
        steps=_steps(request, checkpoint, weights_dir, own, ram),
    )


def checkpoint_files(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files that make up a complete checkpoint folder, by name; sources with their links resolved."""
    paths = [checkpoint.root / _CONFIG_NAME, *checkpoint.weight_files, *checkpoint.side_files]
    if (checkpoint.root / _INDEX_NAME).is_file():
        paths.append(checkpoint.root / _INDEX_NAME)
    return {path.name: path.resolve() for path in sorted(paths, key=lambda path: path.name)}


def _in_place(request: ExportRequest, checkpoint: Checkpoint) -> str:
    if len(request.targets) > 1:
        raise WeightsModeError(
            "--weights in-place has room for one target, since all would write the same names",
            "export one target at a time, or use --weights hardlink",
        )
    files = {p.name: p for p in (checkpoint.root / _CONFIG_NAME, *checkpoint.weight_files, *checkpoint.side_files)}
    return in_place_dir(checkpoint.root, files, request.output)


def _weight_bytes(request: ExportRequest, files: Mapping[str, Path], parent: Path, others: int) -> int:
    """What copies of the checkpoint's files take; nothing where they would be clones that share their blocks."""
    if request.weights is not WeightsMode.COPY:
        return 0
    needed = sum(path.stat().st_size for path in files.values()) * len(request.targets)
    largest = max(files.values(), key=lambda path: path.stat().st_size)
    if needed + others > shutil.disk_usage(parent).free and can_reflink(largest, parent):
        return 0
    return needed


def _steps(
    request: ExportRequest, checkpoint: Checkpoint, weights_dir: str, own: Mapping[str, int], ram: Mapping[str, int]
) -> tuple[str, ...]:
    """own: bytes of weights that each target writes beside the checkpoint's files. ram: memory that its build takes."""
    config = checkpoint.config
    nbytes = format_bytes(checkpoint.nbytes)
    shards = f"{len(checkpoint.weight_files)} weight file(s), {nbytes}"
    place = {
        WeightsMode.COPY: f"copy and hash {shards}, once for all targets, to {weights_dir}/",
        WeightsMode.HARDLINK: f"link and hash {shards} as {weights_dir}/",
        WeightsMode.IN_PLACE: f"hash {shards} where they are ({weights_dir})",
    }[request.weights]
    parity = {
        "off": "no parity check: the manifest will say `not validated`",
        "quick": "compare each artifact with transformers in float32 (quick), the reference run once",
        "full": "compare each artifact with transformers in float32 (full), the reference run once",
    }[request.parity]
    return (
        f"read {checkpoint.root} ({checkpoint.layout.value}, {config.num_layers} layers, "
        f"{config.num_experts} experts, vocabulary {config.vocab_size})",
        place,
        "check every MXFP4 scale; trace one layer of each kind; assemble and simplify the graph",
        *(_build_step(target, own[target], ram[target], request.bundle_kernels) for target in request.targets),
        parity,
        "write the manifest; rename the finished folder into place",
    )


def _build_step(target: str, own: int, ram: int, bundle_kernels: bool) -> str:
    weights = f", with {format_bytes(own)} of weights in a form of its own," if own else ""
    memory = f" (about {format_bytes(ram)} of memory)" if ram else ""
    return f"build {target}{weights}{memory} and load it" + ("; add its kernel library" if bundle_kernels else "")

"""Whether there is enough of everything, before any work begins: disk, memory, the GPU's memory, and how long it takes.

    preflight = look(...)                # headers only; nothing is written
    preflight.require()                  # DiskSpaceError or OutOfMemoryError, with the figures

The figures are estimates, so a user may go on all the same (`--ignore-preflight`). `--force` does not
say so: a nightly job that replaces yesterday's artifact with it would never be told.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.engines.memory import Room, rooms
from gptoss_export.exporter.errors import DiskSpaceError, GptossExportError, OutOfMemoryError
from gptoss_export.exporter.planning.estimate import (
    MACHINE,
    Build,
    StageNeed,
    probe_lengths,
    stage_needs,
    trace_bytes,
)
from gptoss_export.exporter.progress import format_bytes, format_seconds

if TYPE_CHECKING:
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.exporter.planning.request import ExportRequest

IGNORE = "--ignore-preflight begins all the same"

_LIBRARIES_BYTES = 6 << 30
"""Address space of the libraries and of the stacks and arenas of their threads, resident or not."""


@dataclass(frozen=True)
class DiskNeed:
    """One file system. folder: an existing folder on it. purposes: what will be written there."""

    folder: Path
    purposes: tuple[str, ...]
    needed: int
    free: int


@dataclass(frozen=True)
class DeviceNeed:
    """The GPU, and what the most demanding target takes of its memory."""

    name: str
    needed: int
    free: int


@dataclass(frozen=True)
class Preflight:
    """What is needed, and what is there; bytes. device: None where no engine would run on a GPU of this host."""

    disks: tuple[DiskNeed, ...]
    stages: tuple[StageNeed, ...]
    rooms: tuple[Room, ...]
    device: DeviceNeed | None
    hints: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def problems(self) -> tuple[GptossExportError, ...]:
        """What does not fit: disks first, then the stages in order."""
        return (*self._disk_problems(), *self._memory_problems(), *self._device_problems())

    def require(self) -> None:
        """Raises the first of `problems`."""
        for problem in self.problems:
            raise problem

    def _disk_problems(self) -> list[GptossExportError]:
        return [
            DiskSpaceError(
                f"{format_bytes(disk.needed)} are needed below {disk.folder} for {' and '.join(disk.purposes)}, "
                f"{format_bytes(disk.free)} are free",
                f"free space, choose another --output, or use --weights hardlink; {IGNORE}",
            )
            for disk in self.disks
            if disk.needed > disk.free
        ]

    def _memory_problems(self) -> list[GptossExportError]:
        found: list[GptossExportError] = []
        for stage in self.stages:
            for room in self.rooms:
                need = memory_need(stage, room)
                if need > room.nbytes:
                    advice = "; ".join((*self.hints, "close other programs or use a larger machine", IGNORE))
                    what = f"{stage.stage} takes about {format_bytes(need)} of memory"
                    found.append(
                        OutOfMemoryError(f"{what}, and {room.name} leaves {format_bytes(room.nbytes)}", advice)
                    )
                    break
        return found

    def _device_problems(self) -> list[GptossExportError]:
        device = self.device
        if device is None or device.needed <= device.free:
            return []
        return [
            OutOfMemoryError(
                f"the engine takes about {format_bytes(device.needed)} of device memory, and {device.name} has "
                f"{format_bytes(device.free)} free",
                "end other processes on the GPU, or use a smaller --max-context, --max-prompt or --max-batch; "
                + IGNORE,
            )
        ]

    def lines(self) -> tuple[str, ...]:
        """For people."""
        disks = (
            f"disk: at most {format_bytes(disk.needed)} needed for {' and '.join(disk.purposes)}, "
            f"{format_bytes(disk.free)} free ({disk.folder})"
            for disk in self.disks
        )
        stages = (
            f"stage: {stage.stage}, about {format_bytes(stage.memory)} of memory, about "
            f"{format_seconds(stage.seconds)} ({stage.basis})"
            for stage in self.stages
        )
        memory = (f"memory: {format_bytes(room.nbytes)} left by {room.name}" for room in self.rooms)
        devices = (
            f"GPU: about {format_bytes(gpu.needed)} of memory needed, {format_bytes(gpu.free)} free ({gpu.name})"
            for gpu in (self.device,)
            if gpu is not None
        )
        time = f"time: about {format_seconds(self.seconds)} on {MACHINE}, with nothing cached"
        return (*disks, *stages, *memory, *devices, time)


def memory_need(stage: StageNeed, room: Room) -> int:
    """What a stage takes below this limit: of address space, mapped files and libraries count as well."""
    return stage.memory + (stage.mapped + _LIBRARIES_BYTES if room.address_space else 0)


def look(
    checkpoint: Checkpoint,
    request: ExportRequest,
    builds: Sequence[Build],
    *,
    output: Path,
    written: int,
    weights: int,
    device: int,
) -> Preflight:
    """Compares needs with what is there.

    output: an existing folder of the file system that the artifacts come to. written: bytes that they take of it, of
    which weights are copies of the checkpoint's. device: bytes of the GPU's memory, 0 for none. Raises PromptError and
    TokenizerError for prompts that could not be run.
    """
    lengths = probe_lengths(checkpoint, request)
    embedded = request.engine.engine_weights == "embedded" and any(build.ram for build in builds)
    return Preflight(
        disks=_disks(output, written, trace_bytes(checkpoint, request, lengths)),
        stages=stage_needs(checkpoint, request, builds, weights, lengths),
        rooms=rooms(),
        device=_device(device),
        hints=("use --engine-weights external",) if embedded else (),
    )


def _disks(output: Path, written: int, trace: int) -> tuple[DiskNeed, ...]:
    needs = [(output, "the artifacts", written)]
    if trace:
        needs.append((_trace_folder(output, written, trace), "the reference's states", trace))
    grouped: dict[int, DiskNeed] = {}
    for folder, purpose, nbytes in needs:
        device = folder.stat().st_dev
        if device in grouped:
            before = grouped[device]
            grouped[device] = DiskNeed(before.folder, (*before.purposes, purpose), before.needed + nbytes, before.free)
        else:
            grouped[device] = DiskNeed(folder, (purpose,), nbytes, shutil.disk_usage(folder).free)
    return tuple(grouped.values())


def _trace_folder(output: Path, written: int, trace: int) -> Path:
    """Where the reference's states will lie: in the cache, or where that has no room, among the temporary files."""
    from gptoss_export.validators.reference_cache import LEAST_FREE_BYTES, MOST_BYTES, default_cache

    cache = default_cache()
    temporary = existing(Path(tempfile.gettempdir()))
    if cache is None or trace > MOST_BYTES:
        return temporary
    folder = existing(cache)
    shared = written if folder.stat().st_dev == output.stat().st_dev else 0
    fits = shutil.disk_usage(folder).free >= LEAST_FREE_BYTES + trace + shared
    return folder if fits and os.access(folder, os.W_OK) else temporary


def _device(needed: int) -> DeviceNeed | None:
    from gptoss_export.engines.tensorrt.preflight import device_room

    if not needed or (room := device_room()) is None:
        return None
    name, free = room
    return DeviceNeed(name, needed, free)


def existing(path: Path) -> Path:
    """The nearest folder above that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())

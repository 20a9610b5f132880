"""What --dry-run prints with --json; a dataclass as those of `documents` are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.commands.documents import Document, Placement, document
from gptoss_export.exporter.planning.estimate import MACHINE
from gptoss_export.exporter.planning.request import Parity

if TYPE_CHECKING:
    from gptoss_export.exporter.planning.plan import Plan


@dataclass(frozen=True)
class Left:
    """A limit of memory, and what is left below it."""

    limit: str
    free_bytes: int


@dataclass(frozen=True)
class Need:
    """What is needed, and what is there."""

    needed_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Disk(Need):
    """One file system, and what will be written to it."""

    folder: Path
    purposes: tuple[str, ...]


@dataclass(frozen=True)
class Device(Need):
    """The memory of the GPU, and what the most demanding target takes of it."""

    name: str


@dataclass(frozen=True)
class StageEstimate:
    """One stage. mapped_bytes: pages of files, which can be dropped, beside memory_bytes."""

    stage: str
    memory_bytes: int
    mapped_bytes: int
    seconds: float
    basis: str


@dataclass(frozen=True)
class PreflightEstimate:
    """What the export takes, and what is there. problems: what does not fit. seconds_assume: on which machine."""

    disks: tuple[Disk, ...]
    stages: tuple[StageEstimate, ...]
    memory: tuple[Left, ...]
    device: Device | None
    seconds: float
    seconds_assume: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Planned:
    """What an export would do. checkpoint_files: bytes by name. artifacts: folders by target. disk: of --output."""

    model: Path
    layout: Layout
    checkpoint_bytes: int
    checkpoint_files: Mapping[str, int]
    artifacts: Mapping[str, Path]
    weights: Placement
    parity: Parity
    disk: Need
    preflight: PreflightEstimate
    steps: tuple[str, ...]


def planned(plan: Plan) -> Document:
    """Of --dry-run."""
    found, gpu = plan.preflight, plan.preflight.device
    preflight = PreflightEstimate(
        disks=tuple(Disk(d.needed, d.free, d.folder, d.purposes) for d in found.disks),
        stages=tuple(StageEstimate(s.stage, s.memory, s.mapped, round(s.seconds, 1), s.basis) for s in found.stages),
        memory=tuple(Left(room.name, room.nbytes) for room in found.rooms),
        device=None if gpu is None else Device(gpu.needed, gpu.free, gpu.name),
        seconds=round(found.seconds, 1),
        seconds_assume=MACHINE,
        problems=tuple(problem.what for problem in found.problems),
    )
    return document(
        Planned(
            model=plan.checkpoint.root,
            layout=plan.checkpoint.layout,
            checkpoint_bytes=plan.checkpoint_bytes,
            checkpoint_files={name: path.stat().st_size for name, path in plan.checkpoint_files.items()},
            artifacts=plan.folders,
            weights=Placement(plan.request.weights, plan.weights_dir),
            parity=plan.request.parity,
            disk=Need(plan.copied_bytes, found.disks[0].free),
            preflight=preflight,
            steps=plan.steps,
        )
    )

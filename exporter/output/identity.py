"""What the bytes of an export depend on: by it, a later run knows whether finished work is its own.

    export_key(plan) == "9f86d081..."       # sha256 of inputs, options, software and machine

The checkpoint's files are known by name, size, inode and time of modification, since hashing them is half the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_export.engines.tensorrt.options import EngineOptions
    from gptoss_export.exporter.planning.plan import Plan

_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "GPTOSS_EXPORT_ISA",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "SOURCE_DATE_EPOCH",
)
"""Variables that change how numbers are rounded, or what is written."""


def library_versions(targets: Iterable[str], engine: EngineOptions) -> dict[str, str]:
    """The versions of what makes and measures artifacts of these targets, by name; nothing else that is installed."""
    from gptoss_export.engines.build_info import BuildSettings
    from gptoss_export.engines.targets import TARGETS

    settings = BuildSettings(engine)
    names = {name for target in targets for name in TARGETS[target].packages(settings)}
    return {name: found for name in sorted(names) if (found := _version(name)) is not None}


def export_key(plan: Plan) -> str:
    """sha256 (hex) of everything that decides the bytes of this export, and of nothing that does not."""
    from gptoss_export.engines.machine import describe_machine

    request, machine = plan.request, describe_machine()
    measure = request.measure
    content = {
        "model": [request.model, request.revision, str(plan.checkpoint.root.resolve())],
        "files": {name: _identity(path) for name, path in plan.checkpoint_files.items()},
        "targets": request.targets,
        "weights": [request.weights.value, plan.weights_dir],
        "parity": request.parity,
        "prompts": None if measure.prompts is None else [measure.prompts.name, _sha256([measure.prompts])],
        "gates": dict(measure.overrides),
        "bisection": measure.bisection,
        "engine": asdict(request.engine),
        "threads": request.threads,
        "bundle_kernels": request.bundle_kernels,
        "code": _own_code(),
        "called": asdict(request.called),
        "libraries": library_versions(request.targets, request.engine),
        "python": platform.python_version(),
        "machine": [platform.machine(), machine.platform, machine.cpu, machine.usable_cores],
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _identity(path: Path) -> Mapping[str, int]:
    status = path.stat()
    return {
        "nbytes": status.st_size,
        "device": status.st_dev,
        "inode": status.st_ino,
        "modified_ns": status.st_mtime_ns,
    }


def _own_code() -> str:
    """sha256 of this package as it is installed: another build of the same version has work of its own."""
    from gptoss_export.engines.ort.library import kernel_library

    package = Path(__file__).parents[2]
    folders = (package / "exporter", package / "engines", package / "validators")
    code = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".py", ".json"})
    kernels = kernel_library()
    return _sha256([*code, *([kernels] if kernels is not None else [])])


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(f"{path.name} {os.fstat(file.fileno()).st_size}\n".encode())
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None

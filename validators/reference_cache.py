"""Runs of the reference, kept by the hash of everything that they depend on: five targets cost one run.

    reference = reference_for(checkpoint, files, probes, "float32", cache=default_cache())

An entry is a folder `reference/<key>` with the arrays of a trace and an index of their sha256. It appears by a
rename, and every byte is hashed before it is used, so nothing half-written or damaged is ever taken for a
reference; it is run again instead. What cannot be kept is run in a temporary folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from gptoss_export.engines.machine import floating_point
from gptoss_export.exporter.checkpoint.files import open_regular
from gptoss_export.exporter.checkpoint.json_reader import read_json_object
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import CheckpointError
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import Reference, check_probes, run_reference, trace_extent, trace_shape
from gptoss_export.validators.streamed_layers import Dtype
from gptoss_export.validators.trace import Trace

SCHEMA = 1
"""Raised whenever a run records anything else, or computes it otherwise."""

MOST_BYTES = 4 << 30
LEAST_FREE_BYTES = 256 << 20
"""What a disk keeps free: the cache is of no more use than that."""

INDEX_NAME = "index.json"
MAX_INDEX_BYTES = 1 << 20
ABANDONED_SECONDS = 7 * 86400.0

_PACKAGES = ("numpy", "torch", "transformers")
_KEY = re.compile(r"[0-9a-f]{64}")
_PARTIAL = re.compile(r"\.partial-[0-9a-f]{16}")


def default_cache() -> Path | None:
    """$GPTOSS_EXPORT_CACHE, else $XDG_CACHE_HOME/gptoss-export, else ~/.cache/gptoss-export; None without a home."""
    if given := os.environ.get("GPTOSS_EXPORT_CACHE"):
        return Path(given)
    # The XDG specification has relative paths ignored.
    if (xdg := os.environ.get("XDG_CACHE_HOME")) and Path(xdg).is_absolute():
        return Path(xdg) / "gptoss-export"
    try:
        return Path.home() / ".cache" / "gptoss-export"
    except RuntimeError:
        return None


def reference_for(
    checkpoint: Checkpoint,
    files: Mapping[str, str],
    probes: Sequence[Probe],
    dtype: Dtype,
    *,
    cache: Path | None,
    progress: Progress | None = None,
) -> Reference:
    """The run of these probes in that dtype: out of the cache where it is there, else made, and kept if it can be.

    files: sha256 (hex) of the checkpoint's config.json and weight files, by name; where one is missing, nothing is
    cached. cache: a folder, made if need be; None for no cache. Says in a note when an entry is used, or was
    damaged. Raises what `run_reference` raises; the cache itself raises nothing.
    """
    progress = progress or SilentProgress()
    check_probes(probes, checkpoint.config)
    bound = {"config.json", *(file.name for file in checkpoint.weight_files)} <= files.keys()
    folder = _private_folder(cache, progress) if cache is not None and bound else None
    if folder is None or trace_shape(checkpoint.config, probes).nbytes(trace_extent(dtype)) > MOST_BYTES:
        return run_reference(checkpoint, probes, dtype=dtype, progress=progress)
    entry = folder / cache_key(files, probes, dtype)
    if found := _load(entry, checkpoint, probes, dtype, progress):
        return found
    return _run_and_keep(entry, checkpoint, probes, dtype, progress)


def cache_key(files: Mapping[str, str], probes: Sequence[Probe], dtype: Dtype) -> str:
    """sha256 (hex) of all that a run's bits depend on: inputs, software, and the processor that rounds."""
    content = {
        "schema": SCHEMA,
        "files": dict(files),
        "probes": [[probe.name, probe.sha256] for probe in probes],
        "dtype": dtype,
        "versions": {name: version(name) for name in _PACKAGES},
        "machine": [platform.machine(), floating_point()],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()


def _private_folder(cache: Path, progress: Progress) -> Path | None:
    """The folder of entries; None, with a note, where it cannot be made or others could write into it."""
    folder = cache / "reference"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        progress.note(f"the reference is not cached: {cache}: {error.strerror}")
        return None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        progress.note(f"the reference is not cached: {folder} is not this user's alone")
        return None
    return folder


def _load(
    entry: Path, checkpoint: Checkpoint, probes: Sequence[Probe], dtype: Dtype, progress: Progress
) -> Reference | None:
    """The entry's run; None where there is none. A damaged entry is removed."""
    if not entry.exists():
        return None
    extent = trace_extent(dtype)
    try:
        _check_files(entry)
        trace = Trace(entry, trace_shape(checkpoint.config, probes), extent)
    except (CheckpointError, OSError, ValueError, TypeError) as error:
        reason = error.what if isinstance(error, CheckpointError) else str(error)
        progress.note(f"a cached reference is damaged and is made again: {' '.join(reason.split())}")
        _remove(entry)
        return None
    with suppress(OSError):
        os.utime(entry / INDEX_NAME)
    found = Reference(probes, checkpoint.config, trace, checkpoint.tensors["lm_head.weight"], dtype)
    progress.note(f"reference from the cache: {found.description}")
    return found


def _check_files(entry: Path) -> None:
    """Raises ValueError unless the folder holds what its index says and nothing else."""
    index = read_json_object(entry / INDEX_NAME, MAX_INDEX_BYTES)
    names = {path.name for path in entry.iterdir()} - {INDEX_NAME}
    recorded = index.get("files")
    if index.get("key") != entry.name or not isinstance(recorded, dict) or names != recorded.keys():
        raise ValueError(f"{INDEX_NAME} does not describe its folder")
    for name in sorted(names):
        if _sha256(entry / name) != recorded[name]:
            raise ValueError(f"{name} is not as it was written")


def _run_and_keep(
    entry: Path, checkpoint: Checkpoint, probes: Sequence[Probe], dtype: Dtype, progress: Progress
) -> Reference:
    needed = trace_shape(checkpoint.config, probes).nbytes(trace_extent(dtype))
    partial = entry.parent / f".partial-{secrets.token_hex(8)}"
    try:
        if shutil.disk_usage(entry.parent).free < LEAST_FREE_BYTES + needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir(mode=0o700)
    except OSError as error:
        progress.note(f"the reference is not cached: {entry.parent}: {error.strerror}")
        return run_reference(checkpoint, probes, dtype=dtype, progress=progress)
    try:
        made = run_reference(checkpoint, probes, dtype=dtype, progress=progress, folder=partial)
        # Another process may have been first; the run's files are open, so that it needs no entry of its own. Not
        # synced to the disk: what a power failure leaves of it does not have the hashes of its index.
        with suppress(OSError):
            files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
            index = {"key": entry.name, "files": files}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="ascii")
            partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    with suppress(OSError):
        _evict(entry)
    return made


def _evict(newest: Path) -> None:
    """Removes the least recently used entries above MOST_BYTES, and what killed processes left long ago."""
    entries = []
    for folder in newest.parent.iterdir():
        try:
            if _PARTIAL.fullmatch(folder.name) and folder.lstat().st_mtime < time.time() - ABANDONED_SECONDS:
                _remove(folder)
            if _KEY.fullmatch(folder.name) and folder != newest:
                size = sum(path.lstat().st_size for path in folder.iterdir())
                entries.append(((folder / INDEX_NAME).stat().st_mtime, size, folder))
        except OSError:  # gone meanwhile, or no entry at all
            continue
    left = MOST_BYTES - sum(path.lstat().st_size for path in newest.iterdir())
    for _, size, folder in sorted(entries, reverse=True):
        left -= size
        if left < 0:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Away under its name at once, so that nobody meets a part of it; a folder that will not go stays."""
    aside = folder.parent / f".partial-{secrets.token_hex(8)}"
    with suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

"""Weights flow past the graph: from the checkpoint's files to the artifact's, hashed on the way.

    records = place_weights({"model.safetensors": source}, [staging / "weights"], WeightsMode.COPY)
    records["model.safetensors"].sha256

Every byte is read once, whatever the number of destinations. Reading, hashing and writing run in three
threads that hand a fixed set of buffers round (48 MiB in all), so the slowest of the three sets the pace and
memory stays flat.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from gptoss_export.exporter.errors import DiskSpaceError, IntegrityError, UnsafeFileError, WeightsModeError
from gptoss_export.exporter.progress import Progress, SilentProgress

_FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
_BUFFER_BYTES = 8 << 20
_BUFFER_COUNT = 6
_SYNC_BYTES = 128 << 20


class WeightsMode(Enum):
    """How the checkpoint's bytes come to lie in the artifact.

    COPY: a reflink where the file system can, otherwise a copy. HARDLINK: the same inodes under a second
    name.
    IN_PLACE: the artifact is written around the checkpoint, whose files stay where they are.
    """

    COPY = "copy"
    HARDLINK = "hardlink"
    IN_PLACE = "in-place"


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file: its size in bytes and its SHA-256 in lower-case hexadecimal."""

    nbytes: int
    sha256: str


@dataclass
class _Job:
    """One file on its way: an open source, its stat at the start, and the descriptors still to be written."""

    name: str
    path: Path
    source: int
    before: os.stat_result
    sinks: list[int] = field(default_factory=list)


def place_weights(
    files: Mapping[str, Path],
    destinations: Sequence[Path],
    mode: WeightsMode,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
    finish: Callable[[str, FileRecord], None] | None = None,
) -> dict[str, FileRecord]:
    """Brings `files` (name in the artifact -> source, links resolved) into every folder of `destinations`,
    hashed.

    The destination files must not exist; after an error what was made so far is left for the caller to
    remove. Setting `cancel` from another thread ends the work within a buffer; the records are then
    incomplete and the caller must not use them. `finish` is called, from a thread, for every file that is complete and
    on the disk.

    Raises DiskSpaceError before the first byte is copied when the files cannot fit, WeightsModeError when a
    hard link cannot be made, IntegrityError when a source changes while it is read.
    """
    for folder in destinations:
        folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        jobs = [_open_job(stack, name, path) for name, path in files.items()]
        for job in jobs:
            for folder in destinations:
                target = folder / job.name
                target.parent.mkdir(parents=True, exist_ok=True)
                if mode is WeightsMode.COPY:
                    _open_sink(stack, job, target)
                else:
                    _link(job, target, mode)
        return _pump(jobs, "weights", progress or SilentProgress(), cancel, finish)


def hash_files(
    files: Mapping[str, Path], progress: Progress | None = None, label: str = "hash"
) -> dict[str, FileRecord]:
    """Size and SHA-256 of every file; raises IntegrityError for one that changes while it is read."""
    with ExitStack() as stack:
        jobs = [_open_job(stack, name, path) for name, path in files.items()]
        return _pump(jobs, label, progress or SilentProgress(), None, None)


def can_reflink(source: Path, folder: Path) -> bool:
    """Whether a file like `source` can be cloned into `folder` without copying a byte."""
    try:
        with _open_source(source) as fd, _anonymous_file(folder) as probe:
            fcntl.ioctl(probe, _FICLONE, fd)
    except OSError:
        return False
    return True


def in_place_dir(root: Path, files: Mapping[str, Path], output: Path) -> str:
    """The path of the checkpoint folder `root` relative to `output`, as ONNX external data has to name it.

    Raises WeightsModeError where ONNX could not read the weights: they must lie in `output` or below it, as
    real files.
    """
    root, output = root.resolve(), output.resolve()
    if not root.is_relative_to(output):
        raise WeightsModeError(
            f"--weights in-place: ONNX reads weights only from the artifact's folder or below, not {root}",
            f"use --output {root} (or a folder above it), or --weights copy",
        )
    for name, path in files.items():
        if not path.resolve().is_relative_to(output):
            raise WeightsModeError(
                f"--weights in-place: {name} is a link to {path.resolve()}, outside {output}",
                "use --weights copy, which also works from the Hugging Face cache",
            )
        if path.is_symlink():
            raise WeightsModeError(
                f"--weights in-place: {name} is a symbolic link, which ONNX refuses as external data",
                "use --weights copy",
            )
    return root.relative_to(output).as_posix()


@contextmanager
def _open_source(path: Path) -> Iterator[int]:
    """A read-only descriptor; O_NONBLOCK so that a FIFO in a hostile folder cannot hang the open."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _anonymous_file(folder: Path) -> Iterator[int]:
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_job(stack: ExitStack, name: str, path: Path) -> _Job:
    resolved = path.resolve()
    try:
        fd = stack.enter_context(_open_source(resolved))
    except FileNotFoundError as error:
        raise IntegrityError(f"{name} is missing: {resolved}", "restore the file, or export again") from error
    before = os.fstat(fd)
    if not stat.S_ISREG(before.st_mode):
        raise UnsafeFileError(f"{name} is not a regular file: {resolved}", "give a folder of plain files")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return _Job(name, resolved, fd, before)


def _open_sink(stack: ExitStack, job: _Job, target: Path) -> None:
    """Makes `target` a clone of the source, or a preallocated file that the pump still has to fill."""
    with disk_errors(job.name):
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        stack.callback(os.close, fd)
        try:
            fcntl.ioctl(fd, _FICLONE, job.source)
        except OSError:
            if job.before.st_size:
                os.posix_fallocate(fd, 0, job.before.st_size)
            job.sinks.append(fd)


def _link(job: _Job, target: Path, mode: WeightsMode) -> None:
    try:
        os.link(job.path, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            why = f"{job.path} and {target.parent} are on different file systems"
        else:
            why = f"{job.path} cannot be linked into {target.parent}: {error.strerror}"
        raise WeightsModeError(f"--weights {mode.value}: {why}", "use --weights copy") from error


def _pump(
    jobs: Sequence[_Job],
    label: str,
    progress: Progress,
    cancel: threading.Event | None,
    finish: Callable[[str, FileRecord], None] | None,
) -> dict[str, FileRecord]:
    """Reads every source once; its bytes go through the hasher and then to the job's sinks.

    A thread that fails keeps passing buffers on without work, so nobody ever waits for a buffer that will not
    come.
    """
    failures: list[BaseException] = []
    records: dict[str, FileRecord] = {}
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    to_hash: queue.SimpleQueue[tuple[_Job, memoryview, int] | None] = queue.SimpleQueue()
    to_write: queue.SimpleQueue[tuple[_Job, memoryview, int] | None] = queue.SimpleQueue()
    largest = max((job.before.st_size for job in jobs), default=0)
    for _ in range(_BUFFER_COUNT):
        free.put(memoryview(bytearray(max(1, min(_BUFFER_BYTES, largest)))))

    def hash_chunks() -> None:
        digest, seen = hashlib.sha256(), 0
        while (item := to_hash.get()) is not None:
            job, buffer, nbytes = item
            if nbytes:
                digest.update(buffer[:nbytes])
                seen += nbytes
            else:  # an empty chunk ends a file
                records[job.name] = FileRecord(seen, digest.hexdigest())
                digest, seen = hashlib.sha256(), 0
            to_write.put(item)
        to_write.put(None)

    def write_chunks() -> None:
        offset = 0
        while (item := to_write.get()) is not None:
            job, buffer, nbytes = item
            if not failures:
                try:
                    with disk_errors(job.name):
                        for sink in job.sinks:
                            write_all(sink, buffer[:nbytes], offset)
                            # A process cannot be ended while it waits for the disk: never for more than this.
                            if nbytes == 0 or (offset + nbytes) // _SYNC_BYTES > offset // _SYNC_BYTES:
                                os.fsync(sink)
                    if nbytes == 0 and not (cancel is not None and cancel.is_set()):
                        _check_unchanged(job, records[job.name])
                        if finish is not None:
                            finish(job.name, records[job.name])
                except BaseException as error:
                    failures.append(error)
            offset = offset + nbytes if nbytes else 0
            free.put(buffer)

    threads = [threading.Thread(target=work, daemon=True) for work in (hash_chunks, write_chunks)]
    for thread in threads:
        thread.start()
    try:
        with progress.task(label, total=sum(job.before.st_size for job in jobs), unit="bytes") as task:
            for job in jobs:
                while not failures and not (cancel is not None and cancel.is_set()):
                    buffer = free.get()
                    nbytes = os.readv(job.source, [buffer])
                    to_hash.put((job, buffer, nbytes))
                    if nbytes == 0:
                        break
                    task.advance(nbytes)
    finally:
        to_hash.put(None)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    for job in jobs:
        if job.name in records:
            _check_unchanged(job, records[job.name])
    return records


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Writes bytes at an offset, and begins to write them back."""
    start = offset
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
    # On dirty pages this only starts writing them back, so that the final fsync finds little left to do.
    os.posix_fadvise(fd, start, offset - start, os.POSIX_FADV_DONTNEED)


def _check_unchanged(job: _Job, record: FileRecord) -> None:
    after = os.fstat(job.source)
    same = (after.st_size, after.st_mtime_ns) == (job.before.st_size, job.before.st_mtime_ns)
    if not (same and record.nbytes == after.st_size):
        raise IntegrityError(
            f"{job.name} changed while it was read",
            "wait until the download or copy has ended, then run again",
        )


@contextmanager
def disk_errors(name: str) -> Iterator[None]:
    """A full disk or an exhausted quota becomes an error with a next step; everything else passes."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(
                f"no space left for {name}", "free space, choose another --output, or use --weights hardlink"
            ) from error
        raise

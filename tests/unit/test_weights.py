"""Placing weights: the right bytes, the right hashes, and nothing silent when something is wrong."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptoss_export.exporter import weights
from gptoss_export.exporter.errors import DiskSpaceError, IntegrityError, UnsafeFileError, WeightsModeError
from gptoss_export.exporter.progress import Task, Unit
from gptoss_export.exporter.weights import (
    FileRecord,
    WeightsMode,
    can_reflink,
    hash_files,
    in_place_dir,
    place_weights,
)

CHUNK = 4096


class Steps:
    """A progress that calls back after every chunk."""

    def __init__(self, call: object = None) -> None:
        self.amounts: list[int] = []
        self.call = call

    def advance(self, amount: int) -> None:
        self.amounts.append(amount)
        if callable(self.call):
            self.call()

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Task]:
        yield self

    def note(self, line: str) -> None:
        raise AssertionError("the weights have nothing to note")


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BUFFER_BYTES", CHUNK)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Files of every size that matters to a chunked copy."""
    folder = tmp_path / "source"
    folder.mkdir()
    files = {}
    for nbytes in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 9 * CHUNK + 7):
        path = folder / f"{nbytes}.safetensors"
        path.write_bytes(os.urandom(nbytes))
        files[path.name] = path
    return files


def expected(files: dict[str, Path]) -> dict[str, FileRecord]:
    return {
        name: FileRecord(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for name, path in files.items()
    }


@pytest.mark.usefixtures("small_buffers")
def test_copies_to_every_destination_and_hashes(sources: dict[str, Path], tmp_path: Path) -> None:
    destinations = [tmp_path / "a" / "weights", tmp_path / "b" / "weights"]
    steps = Steps()
    assert place_weights(sources, destinations, WeightsMode.COPY, steps) == expected(sources)
    for folder in destinations:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {n: p.read_bytes() for n, p in sources.items()}
        assert all(p.stat().st_nlink == 1 for p in folder.iterdir())
    assert sum(steps.amounts) == sum(p.stat().st_size for p in sources.values())


def test_a_copy_is_readable_by_others_and_not_executable(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"weights")
    source.chmod(0o755)
    umask = os.umask(0o022)
    try:
        place_weights({source.name: source}, [tmp_path / "out"], WeightsMode.COPY)
    finally:
        os.umask(umask)
    assert (tmp_path / "out" / source.name).stat().st_mode & 0o777 == 0o644


def test_hash_files_reads_each_once(sources: dict[str, Path]) -> None:
    assert hash_files(sources) == expected(sources)


def test_links_are_resolved_as_in_the_hub_cache(tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    link = tmp_path / "snapshots" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to("../blobs/abc")
    place_weights({link.name: link}, [tmp_path / "out"], WeightsMode.COPY)
    placed = tmp_path / "out" / link.name
    assert not placed.is_symlink()
    assert placed.read_bytes() == b"weights"


def test_hardlink_shares_the_inode_and_is_hashed(sources: dict[str, Path], tmp_path: Path) -> None:
    assert place_weights(sources, [tmp_path / "out"], WeightsMode.HARDLINK) == expected(sources)
    assert all((tmp_path / "out" / name).samefile(path) for name, path in sources.items())


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_hardlink_that_cannot_be_made(
    code: int, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(WeightsModeError, match="--weights hardlink") as caught:
        place_weights(sources, [tmp_path / "out"], WeightsMode.HARDLINK)
    assert "copy" in caught.value.next_step


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("change", ["grow", "shrink", "touch"])
def test_a_source_that_changes_is_refused(change: str, tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(os.urandom(20 * CHUNK))

    def tamper() -> None:
        if change == "touch":
            os.utime(source, ns=(1, 1))
        else:
            os.truncate(source, 21 * CHUNK if change == "grow" else 10 * CHUNK)

    with pytest.raises(IntegrityError, match="changed while it was read"):
        place_weights({source.name: source}, [tmp_path / "out"], WeightsMode.COPY, Steps(call=tamper))


def test_no_space_is_known_before_the_first_byte(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    steps = Steps()
    with pytest.raises(DiskSpaceError):
        place_weights(sources, [tmp_path / "out"], WeightsMode.COPY, steps)
    assert steps.amounts == []


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, DiskSpaceError), (errno.EDQUOT, DiskSpaceError), (errno.EIO, OSError)]
)
def test_a_failed_write_ends_all_threads(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(os.urandom(100 * CHUNK))
    write = os.pwrite

    def fail_later(fd: int, data: bytes, offset: int) -> int:
        if offset >= 5 * CHUNK:
            raise OSError(code, os.strerror(code))
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_later)
    threads = threading.active_count()
    with pytest.raises(error):
        place_weights({source.name: source}, [tmp_path / "out"], WeightsMode.COPY)
    assert threading.active_count() == threads


@pytest.mark.usefixtures("small_buffers")
def test_partial_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(os.urandom(3 * CHUNK + 5))
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: write(fd, data[:1000], offset))
    place_weights({source.name: source}, [tmp_path / "out"], WeightsMode.COPY)
    assert (tmp_path / "out" / source.name).read_bytes() == source.read_bytes()


@pytest.mark.usefixtures("small_buffers")
def test_cancel_stops_within_a_buffer(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(os.urandom(100 * CHUNK))
    cancel = threading.Event()
    steps = Steps(call=cancel.set)
    place_weights({source.name: source}, [tmp_path / "out"], WeightsMode.COPY, steps, cancel)
    assert sum(steps.amounts) == CHUNK


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    source.write_bytes(b"new")
    out = tmp_path / "out"
    out.mkdir()
    (out / source.name).write_bytes(b"old")
    with pytest.raises(FileExistsError):
        place_weights({source.name: source}, [out], WeightsMode.COPY)
    assert (out / source.name).read_bytes() == b"old"


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    fifo = tmp_path / "model.safetensors"
    os.mkfifo(fifo)
    with pytest.raises(UnsafeFileError):
        hash_files({fifo.name: fifo})


def test_a_missing_source(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="is missing"):
        hash_files({"model.safetensors": tmp_path / "model.safetensors"})


def test_memory_stays_below_64_mb(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    with source.open("wb") as f:
        f.truncate(200 << 20)
    tracemalloc.start()
    try:
        hash_files({source.name: source})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64e6


def test_a_reflink_of_what_is_not_there_is_impossible(tmp_path: Path) -> None:
    assert not can_reflink(tmp_path / "nothing", tmp_path)


def test_in_place_in_the_checkpoint_or_above(tmp_path: Path) -> None:
    root = tmp_path / "models" / "small"
    root.mkdir(parents=True)
    files = {"model.safetensors": root / "model.safetensors"}
    files["model.safetensors"].write_bytes(b"weights")
    assert in_place_dir(root, files, root) == "."
    assert in_place_dir(root, files, tmp_path) == "models/small"


def test_in_place_elsewhere_names_the_output_that_would_work(tmp_path: Path) -> None:
    root = tmp_path / "small"
    root.mkdir()
    with pytest.raises(WeightsModeError) as caught:
        in_place_dir(root, {}, tmp_path / "release")
    assert str(root) in caught.value.next_step


@pytest.mark.parametrize("inside", [True, False])
def test_in_place_refuses_links(inside: bool, tmp_path: Path) -> None:
    root = tmp_path / "snapshot"
    root.mkdir()
    blob = (root if inside else tmp_path) / "blob"
    blob.write_bytes(b"weights")
    link = root / "model.safetensors"
    link.symlink_to(blob)
    with pytest.raises(WeightsModeError, match="link") as caught:
        in_place_dir(root, {link.name: link}, root)
    assert "--weights copy" in caught.value.next_step

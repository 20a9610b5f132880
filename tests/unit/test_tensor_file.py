"""Files of our own making: readable by anybody, aligned, of the size that was planned, and never another file's end."""

from __future__ import annotations

import errno
import os
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gptoss_export.engines import tensor_file
from gptoss_export.engines.tensor_file import TensorFile, plan_tensor_file, write_tensor_file
from gptoss_export.exporter.checkpoint.safetensors_header import read_header
from gptoss_export.exporter.errors import DiskSpaceError

TENSORS = {
    "odd": np.arange(7, dtype=np.int8),
    "half": np.arange(30, dtype=np.float16).reshape(5, 6),
    "brain": np.arange(33, dtype=np.float32).astype(ml_dtypes.bfloat16),
    "full": np.arange(16, dtype=np.float32).reshape(2, 2, 4),
    "last": np.array([-1], np.int8),
}
NAMES = {"int8": "I8", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def planned(folder: Path) -> TensorFile:
    stored = [(name, NAMES[str(data.dtype)], data.shape) for name, data in TENSORS.items()]
    return plan_tensor_file(stored, folder / "dense" / "x.safetensors")


def pieces(file: TensorFile) -> list[tuple[int, np.ndarray]]:
    return [(file.tensors[name].offset, data) for name, data in TENSORS.items()]


def test_planning_touches_nothing(tmp_path: Path) -> None:
    planned(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_others_read_what_was_written(tmp_path: Path) -> None:
    file = planned(tmp_path)
    write_tensor_file(file, pieces(file))
    found = load_file(file.path)
    assert {name for name in found if not name.startswith("padding.")} == TENSORS.keys()
    for name, data in TENSORS.items():
        assert found[name].dtype == data.dtype
        assert np.array_equal(found[name], data)


def test_our_own_reader_which_refuses_holes_and_overlaps_takes_it(tmp_path: Path) -> None:
    file = planned(tmp_path)
    write_tensor_file(file, pieces(file))
    found = read_header(file.path)
    for name, ref in file.tensors.items():
        assert (found[name].dtype, found[name].shape) == (ref.dtype, ref.shape)
        assert (found[name].offset, found[name].nbytes) == (ref.offset, ref.nbytes)


def test_every_tensor_lies_on_64_bytes_and_the_file_has_the_planned_size(tmp_path: Path) -> None:
    file = planned(tmp_path)
    write_tensor_file(file, pieces(file))
    assert all(ref.offset % 64 == 0 for ref in file.tensors.values())
    assert file.path.stat().st_size == file.nbytes
    assert file.nbytes % 64 == 0


def test_tensors_keep_their_order_and_do_not_overlap(tmp_path: Path) -> None:
    refs = list(planned(tmp_path).tensors.values())
    assert [ref.name for ref in refs] == list(TENSORS)
    assert all(a.offset + a.nbytes <= b.offset for a, b in pairwise(refs))


def test_pieces_may_come_in_any_order_and_in_parts(tmp_path: Path) -> None:
    ordered, shuffled = planned(tmp_path / "a"), planned(tmp_path / "b")
    write_tensor_file(ordered, pieces(ordered))
    rows = [(at + row.nbytes * i, row) for at, data in pieces(shuffled) for i, row in enumerate(data.reshape(-1, 1))]
    write_tensor_file(shuffled, reversed(rows))
    assert ordered.path.read_bytes() == shuffled.path.read_bytes()


def test_what_nobody_wrote_is_zero(tmp_path: Path) -> None:
    file = planned(tmp_path)
    write_tensor_file(file, [])
    data = file.path.read_bytes()
    assert data[: len(file.header)] == file.header
    assert not any(data[len(file.header) :])


@pytest.mark.parametrize("link", [False, True])
def test_a_file_that_is_there_is_not_replaced(tmp_path: Path, link: bool) -> None:
    file = planned(tmp_path)
    file.path.parent.mkdir()
    other = tmp_path / "other"
    other.write_bytes(b"older")
    file.path.symlink_to(other) if link else file.path.write_bytes(b"older")
    with pytest.raises(FileExistsError):
        write_tensor_file(file, pieces(file))
    assert other.read_bytes() == file.path.read_bytes() == b"older"


def test_what_the_pieces_raise_comes_through(tmp_path: Path) -> None:
    def broken() -> object:
        yield pieces(file)[0]
        raise ZeroDivisionError

    file = planned(tmp_path)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ZeroDivisionError):
        write_tensor_file(file, broken())
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_before_anything_is_converted(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(code, os.strerror(code))

    asked = []
    file = planned(tmp_path)
    monkeypatch.setattr(tensor_file.os, "posix_fallocate", full)
    with pytest.raises(DiskSpaceError, match=r"x\.safetensors"):
        write_tensor_file(file, (asked.append(piece) or piece for piece in pieces(file)))
    assert asked == []

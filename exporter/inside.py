"""Opening a file of a delivered folder by the name that a file in it gives: nothing outside of the folder is reached.

    with open_inside(folder, "weights/model.safetensors") as file: ...

The folder itself may be a link, as in `current -> releases/1.2`; below it every step is taken from the descriptor of
the folder before (openat, O_NOFOLLOW), so that no link is followed even if one is put there in between.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from gptoss_export.exporter.errors import IntegrityError

AGAIN = "export again, or copy the artifact again from where it was made"

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LONGEST_NAME, _LONGEST_PATH = 255, 4095


def is_plain_path(name: str) -> bool:
    """Whether a name is written the one way that names a file below a folder: relative, normal, printable."""
    path = PurePosixPath(name)
    return (
        name.isprintable()
        and "\\" not in name
        and str(path) == name
        and name != "."
        and not path.is_absolute()
        and ".." not in path.parts
        and len(name.encode("utf-8", "surrogatepass")) <= _LONGEST_PATH
        and all(len(part.encode("utf-8", "surrogatepass")) <= _LONGEST_NAME for part in path.parts)
    )


def open_inside(folder: Path, name: str) -> BinaryIO:
    """The regular file `name` below `folder`, opened for reading.

    Raises IntegrityError for a name that leads elsewhere, a missing file, a link at any step, and whatever is no
    regular file; PermissionError where this user may not read it.
    """
    if not is_plain_path(name):
        raise IntegrityError(f"{name[:120]!r} is no path inside of {folder}", AGAIN)
    *steps, last = PurePosixPath(name).parts
    try:
        with _folder(folder, steps) as at:
            _refuse_irregular(folder / name, os.stat(last, dir_fd=at, follow_symlinks=False))
            descriptor = os.open(last, _FILE, dir_fd=at)
    except PermissionError:
        raise
    except OSError as error:
        raise IntegrityError(f"{folder / name} is missing, or behind a link ({error.strerror})", AGAIN) from error
    try:
        _refuse_irregular(folder / name, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def _folder(root: Path, steps: list[str]) -> Iterator[int]:
    at = os.open(root, _FOLDER)
    try:
        for step in steps:
            below = os.open(step, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def _refuse_irregular(path: Path, status: os.stat_result) -> None:
    if stat.S_ISLNK(status.st_mode):
        raise IntegrityError(f"{path} is a symbolic link, and no file of an artifact is one", AGAIN)
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{path} is no regular file", AGAIN)

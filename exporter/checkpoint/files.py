"""Opening files that somebody else wrote: regular ones only, without ever blocking on what is not."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gptoss_export.exporter.errors import CheckpointNotFoundError, UnsafeFileError

_SHOWN = 120


@dataclass(frozen=True)
class Stamp:
    """Tells the file that was checked from another one under its name, or the same one written to since."""

    device: int
    inode: int
    nbytes: int
    modified_ns: int


def stamp_of(file: BinaryIO) -> Stamp:
    """The stamp of an open file."""
    status = os.fstat(file.fileno())
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def shown(text: object) -> str:
    """A value out of a hostile file, fit for one line of a terminal: escaped, cut when long.

    Lists and objects are only named, since printing one that nests deeply overflows the stack.
    """
    if isinstance(text, list | tuple):
        return f"a list of {len(text)}"
    if isinstance(text, Mapping):
        return "an object"
    line = repr(text)
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def one_line(text: object, most: int = 200) -> str:
    """What a library says of a hostile file, fit for one line of a terminal."""
    line = " ".join(str(text).split())[:most]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, through symbolic links (the Hub cache is made of them).

    A FIFO or a device is refused before it is opened, and once more after, since the name may have been given
    to another file in between; O_NONBLOCK keeps even that case from hanging.

    Raises CheckpointNotFoundError when there is no such file, UnsafeFileError for anything but a readable
    regular file, links that lead nowhere included.
    """
    try:
        _refuse_irregular(path, path.stat().st_mode)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except OSError as e:
        raise _unreadable(path, e) from e
    try:
        _refuse_irregular(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_capped(file: BinaryIO, most: int) -> bytes:
    """The whole file if it has at most `most` bytes; of a larger one `most + 1`, for the caller to refuse.

    A plain read(most + 1) would take that much memory first, whatever the file holds.
    """
    return file.read(min(os.fstat(file.fileno()).st_size, most) + 1)


def regular_size(path: Path) -> int:
    """Bytes of a regular file; errors as in `open_regular`."""
    with open_regular(path) as f:
        return os.fstat(f.fileno()).st_size


def _refuse_irregular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "a special file")
        raise UnsafeFileError(f"{path} is {kind}, not a regular file", "Remove it, or download the checkpoint again.")


_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def _unreadable(path: Path, e: OSError) -> CheckpointNotFoundError | UnsafeFileError:
    if path.is_symlink():
        return UnsafeFileError(
            f"{path} is a symbolic link that leads nowhere readable ({e.strerror})",
            "Download the checkpoint again, or mend the link.",
        )
    if e.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckpointNotFoundError(f"{path} does not exist", "Give --model the folder of a complete checkpoint.")
    return UnsafeFileError(f"{path} cannot be read: {e.strerror}", "Make it readable for this user.")

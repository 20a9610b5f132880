"""One run on one output: locks that the kernel takes back when their holder dies.

    with lock_file(home / "lock", "release is being exported"), lock_folder(release, "release is in use"):
        ...

Locks are advisory (flock(2)) and held by an open descriptor, which no child process inherits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_export.exporter.errors import AccessError, LockedError

_ATTEMPTS = 100
_PROC_LINE = re.compile(r"^\d+: FLOCK\s+ADVISORY\s+WRITE (\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) ", re.MULTILINE)


@contextmanager
def lock_file(path: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a file, which is made if need be and stays; its folder must be there.

    busy: what to say when another process holds it. Raises LockedError, FileNotFoundError when the folder goes away,
    AccessError on a file system without locks.
    """
    # The holder before may have removed the file after it was opened here: then the lock is of a file without a name.
    for _ in range(_ATTEMPTS):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd, path, busy)
            if _is_at(fd, path):
                yield
                return
        finally:
            os.close(fd)
    raise LockedError(f"{busy}: {path} changes hands all the time", "wait for the other runs to end")


@contextmanager
def lock_folder(folder: Path, busy: str) -> Iterator[None]:
    """Holds the lock of a folder that exists, without writing to it. Errors as of `lock_file`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _lock(fd, folder, busy)
        yield
    finally:
        os.close(fd)


def check_unlocked(path: Path, busy: str) -> None:
    """Raises LockedError when another process holds the lock of a file; a file that is not there is not locked."""
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        try:
            fd = os.open(path, os.O_RDWR | flags)
        except OSError as error:
            if error.errno != errno.EROFS:
                return
            # Whoever sees the same folder by another mount may write it.
            fd = os.open(path, os.O_RDONLY | flags)
    except OSError:
        return
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _lock(fd, path, busy)
    finally:
        os.close(fd)


def _lock(fd: int, path: Path, busy: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = _holder(fd)
        by = "another process" if pid is None else f"process {pid}"
        raise LockedError(f"{busy} by {by}", "wait until it has ended, or give another --output") from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
            raise
        raise AccessError(
            f"{path.parent} is on a file system without locks ({error.strerror})",
            "give an --output on another file system; without a lock two runs could write the same folder",
        ) from error


def _is_at(fd: int, path: Path) -> bool:
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(fd), there)


def _holder(fd: int) -> int | None:
    """The process that holds the lock of an open file, as far as the kernel tells: proc_locks(5)."""
    status = os.fstat(fd)
    device = os.major(status.st_dev), os.minor(status.st_dev)
    try:
        table = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for pid, major, minor, inode in _PROC_LINE.findall(table):
        if (int(major, 16), int(minor, 16)) == device and int(inode) == status.st_ino and int(pid) > 0:
            return int(pid)
    return None

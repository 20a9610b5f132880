"""How finished work takes its place: by one system call where the system has it, and so that a kill at any moment can
be made good.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from gptoss_export.exporter.artifact import MANIFEST_NAME
from gptoss_export.exporter.errors import OutputExistsError
from gptoss_export.exporter.output.journal import REPLACED_NAME, is_ours, sync

_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h


def swap(folder: Path, output: Path, aside: Path) -> None:
    """Puts `folder` in the place of `output`, which ends up as `folder` or, until it is removed, as `aside`."""
    if is_vacant(output):
        folder.rename(output)
    elif not _exchange(folder, output):
        output.rename(aside)
        try:
            folder.rename(output)
        except BaseException:
            aside.rename(output)
            raise
    sync(output.parent)
    sync(aside.parent)


def put_back(home: Path, output: Path) -> None:
    """Gives an older artifact its place again, where a run was killed while it put a new one there."""
    old = home / REPLACED_NAME
    if not old.is_dir() or old.is_symlink() or output.is_symlink() or not is_ours(home):
        return
    if is_vacant(output):
        old.rename(output)
        sync(output.parent)


def is_vacant(output: Path) -> bool:
    """Whether a folder can be renamed to `output`: nothing is there, or an empty folder."""
    return not output.exists() or (output.is_dir() and not any(output.iterdir()))


def move_up(folder: Path, output: Path, force: bool, protect: set[Path]) -> None:
    """Files of `folder` go to the same paths below `output`, manifest last, and back if one cannot.

    A file that is a hard link to the one at its destination stays: these are the weights. Raises OutputExistsError for
    any other file that exists, with `force` only where it is one of `protect`.
    """
    moves = list(_moves(folder, output, force, protect))
    moved: list[tuple[Path, Path]] = []
    made: list[Path] = []
    try:
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        for source, target in moves:
            if source == folder / MANIFEST_NAME:
                for parent in {target.parent for _, target in moved}:
                    sync(parent)
            made += make_parents(target.parent)
            source.replace(target)
            moved.append((source, target))
        sync(output)
    except BaseException:
        for source, target in moved:
            target.replace(source)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise


def make_parents(folder: Path) -> list[Path]:
    """Makes the folder and returns those that were missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _moves(folder: Path, output: Path, force: bool, protect: set[Path]) -> Iterator[tuple[Path, Path]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for source in sorted(files, key=lambda path: (path == folder / MANIFEST_NAME, path)):
        target = output / source.relative_to(folder)
        if target.exists() and source.samefile(target):
            continue
        if target.is_symlink() or target.exists():
            if target.resolve() in protect:
                raise OutputExistsError(
                    f"{target} is a file of the checkpoint", "use --weights copy and another --output"
                )
            if not force or not target.is_file() or target.is_symlink():
                raise OutputExistsError(f"{target} exists already", "move it away, or give --force to replace it")
        yield source, target


def _exchange(one: Path, other: Path) -> bool:
    """Two folders change names at once: renameat2(2). False where the kernel or the file system cannot."""
    import ctypes

    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(number, os.strerror(number), str(other))

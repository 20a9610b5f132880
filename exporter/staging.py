"""Nothing half-written: an artifact grows in a hidden folder and appears by a rename.

    with staging(output, force=False, protect=[checkpoint.root]) as folder:
        ...write into folder...
    # output is there now, complete; after any exception, Ctrl-C included, it is as it was

A process that was killed leaves a folder named `.NAME.partial-XXXXXXXX` behind, which may be deleted.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gptoss_export.exporter.artifact import MANIFEST_NAME, artifact_folders
from gptoss_export.exporter.errors import OutputExistsError


def check_output(output: Path, *, force: bool, protect: Iterable[Path] = ()) -> None:
    """Refuses an output folder that must not be written, before any work is done.

    protect: files and folders of the checkpoint, links resolved. Raises OutputExistsError for a file or a
    symbolic link, for a folder that holds something unless `force`, and even with `force` for one that holds
    anything of the checkpoint or anything that is no artifact.
    """
    if output.is_symlink():
        raise OutputExistsError(f"{output} is a symbolic link", "give the folder itself as --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputExistsError(f"{output} is a file", "give another --output")
    if not any(output.iterdir()):
        return
    resolved = output.resolve()
    for path in protect:
        if path.is_relative_to(resolved):
            raise OutputExistsError(
                f"{output} holds the checkpoint ({path})",
                "give another --output, or --weights in-place to write the artifact around the weights",
            )
    if not force:
        raise OutputExistsError(
            f"{output} is not empty", "give another --output, or --force to replace the artifact in it"
        )
    artifacts = artifact_folders(output)
    strangers = [] if artifacts == [output] else sorted(set(output.iterdir()) - set(artifacts))
    if strangers:
        raise OutputExistsError(
            f"{output} holds {strangers[0].name}, which is no artifact; --force replaces only artifacts",
            "give another --output, or remove the folder yourself",
        )


@contextmanager
def staging(output: Path, *, force: bool = False, protect: Sequence[Path] = ()) -> Iterator[Path]:
    """A folder beside `output` that becomes it when the block ends well, and vanishes when it does not.

    An older artifact is moved aside by the same rename and removed last. Raises what `check_output` raises,
    before the block and again after it, since the folder may have been filled meanwhile.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow the link that is to be refused
    check_output(output, force=force, protect=protect)
    made = _make_parents(output.parent)
    folder = output.parent / f".{output.name}.partial-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
        yield folder
        _sync_tree(folder)
        check_output(output, force=force, protect=protect)
        _swap(folder, output)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def staging_in_place(output: Path, *, force: bool = False, protect: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden folder inside of `output`, whose files move up when the block ends well, manifest last.

    A staged file that is a hard link to the file at its destination stays what it is: these are the weights.
    Any other existing file is an OutputExistsError, with `force` only where it is of the checkpoint
    (`protect`).
    """
    if not force and (output / MANIFEST_NAME).exists():
        raise OutputExistsError(f"{output} already holds an artifact", "give --force to replace it")
    folder = output / f".gptoss-export.partial-{secrets.token_hex(4)}"
    moved: list[Path] = []
    made: list[Path] = []
    try:
        folder.mkdir()
        yield folder
        _sync_tree(folder)
        moves = list(_moves(folder, output, force, {path.resolve() for path in protect}))
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        for source, target in moves:
            made += _make_parents(target.parent)
            source.replace(target)
            moved.append(target)
        _sync_folder(output)
    except BaseException:
        for target in moved:
            target.unlink(missing_ok=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def _make_parents(folder: Path) -> list[Path]:
    """Makes the folder and returns those that were missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _swap(folder: Path, output: Path) -> None:
    if not output.exists() or not any(output.iterdir()):
        folder.rename(output)
        _sync_folder(output.parent)
        return
    old = output.parent / f".{output.name}.replaced-{secrets.token_hex(4)}"
    output.rename(old)
    try:
        folder.rename(output)
    except BaseException:
        old.rename(output)
        raise
    _sync_folder(output.parent)
    shutil.rmtree(old)


def _sync_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            _sync_folder(path)
        elif path.is_file():
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

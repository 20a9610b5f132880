"""Nothing half-written: an artifact grows in a hidden folder and appears by a rename.

with journaled(output, key, force=False, protect=[checkpoint.root]) as journal:
    ...write into journal.root, journal.finish(stage, files)...
# output is there now, complete; after any exception, Ctrl-C included, it is as it was

output's parent/
  .NAME.partial/     of one run at a time, this user's only
    lock             held as long as the run lives
    journal.json     the stages that are finished
    tree/            what becomes NAME
    replaced/        the artifact before, while the new one takes its place on file systems that cannot exchange
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath

from gptoss_export.engines.memory import ran_out
from gptoss_export.exporter.artifact import MANIFEST_NAME, artifact_folders
from gptoss_export.exporter.errors import (
    AccessError,
    EngineBuildError,
    GptossExportError,
    LockedError,
    OutOfMemoryError,
    OutputExistsError,
)
from gptoss_export.exporter.interrupt import received
from gptoss_export.exporter.output.journal import (
    LOCK_NAME,
    REPLACED_NAME,
    TREE_NAME,
    Journal,
    clear,
    is_ours,
    open_journal,
    peek,
    refuse_stranger,
)
from gptoss_export.exporter.output.lock import check_unlocked, lock_file, lock_folder
from gptoss_export.exporter.output.swap import is_vacant, make_parents, move_up, put_back, swap
from gptoss_export.exporter.progress import Progress, SilentProgress
from gptoss_export.exporter.weights import hash_files

KEPT = "what is finished was kept: the same command goes on from there"

_IN_PLACE_NAME = ".gptoss-export.partial"
_ATTEMPTS = 100
_OPEN: list[Journal] = []


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
    if not force and _is_delivered(peek(home_of(output)), output):
        return
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


def home_of(output: Path, *, in_place: bool = False) -> Path:
    """The hidden folder that an artifact grows in: one name for one output, so that the next run finds it."""
    output = Path(os.path.abspath(output))  # noqa: PTH100 - resolve() would follow the link that is to be refused
    return output / _IN_PLACE_NAME if in_place else output.parent / f".{output.name}.partial"


@contextmanager
def staging(output: Path, *, force: bool = False, protect: Sequence[Path] = ()) -> Iterator[Path]:
    """As `journaled`, for work that no other run goes on with: nothing is left when the block does not end well."""
    with journaled(output, None, force=force, protect=protect) as journal:
        yield journal.root


@contextmanager
def journaled(
    output: Path,
    key: str | None,
    *,
    force: bool = False,
    protect: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Iterator[Journal]:
    """A folder beside `output`, the root of a journal, that becomes it when the block ends well.

    An older artifact changes places with it by one system call and is removed last. When the block is cut off, or ends
    with an error that need not come again, the folder stays for the next run with the same key, if any stage was
    finished. Where the run before was killed after the artifact had appeared, the root is `output` itself.

    Raises what `check_output` raises, before the block and again after it, since the folder may have been filled
    meanwhile; LockedError while another run has this output.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100
    check_output(output, force=force, protect=protect)
    made = make_parents(output.parent)
    try:
        with _locked(home_of(output), output, artifact_folders(output)) as home:
            put_back(home, output)
            delivered = [output] if _is_delivered(peek(home), output) else []
            with _journal(home, key, delivered, progress) as journal:
                if journal.root != output:
                    check_output(output, force=force, protect=protect)
                yield journal
                if journal.root != output:
                    journal.seal()
                    check_output(output, force=force, protect=protect)
                    swap(journal.root, output, home / REPLACED_NAME)
    except BaseException:
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def journaled_in_place(
    output: Path,
    key: str | None,
    *,
    force: bool = False,
    protect: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Iterator[Journal]:
    """A hidden folder inside of `output`, whose files move up when the block ends well, manifest last.

    A staged file that is a hard link to the file at its destination stays what it is: these are the weights.
    Any other existing file is an OutputExistsError, with `force` only where it is of the checkpoint
    (`protect`). What was killed while files moved up is brought to its end by the next run with the same key.
    """
    output = Path(os.path.abspath(output))  # noqa: PTH100
    home, theirs = home_of(output, in_place=True), {path.resolve() for path in protect}
    if not force and (output / MANIFEST_NAME).exists() and not _is_delivered(peek(home), output):
        raise OutputExistsError(f"{output} already holds an artifact", "give --force to replace it")
    with _locked(home, output, [output]):
        moving = peek(home)
        delivered = [output] if _is_delivered(moving, output) else [home / TREE_NAME, output]
        with _journal(home, key, delivered, progress) as journal:
            if journal.sealed and journal.root != output:
                move_up(journal.root, output, force, theirs)
                journal = replace(journal, root=output)
            yield journal
            if journal.root != output:
                journal.seal()
                move_up(journal.root, output, force, theirs)


def recover(folder: Path) -> None:
    """Gives an older artifact its place again, where an export was killed while it replaced it."""
    home = home_of(folder)
    if (home / REPLACED_NAME).is_dir() and is_ours(home) and is_vacant(folder):
        with lock_file(home / LOCK_NAME, f"{folder} is being written"):
            put_back(home, folder)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Holds an artifact, so that no export replaces it; raises LockedError while one writes it, or another use has it.

    What an export that was killed left of it is put back first.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    busy = f"{folder} is being written"
    for home in (home_of(folder), home_of(folder.parent), home_of(folder, in_place=True)):
        check_unlocked(home / LOCK_NAME, busy)
    recover(folder)
    if not folder.is_dir() or folder.is_symlink():
        yield
        return
    with lock_folder(folder, f"{folder} is in use"):
        yield


def kept_bytes(output: Path) -> int:
    """What unfinished work on an output takes of the disk; the next run uses it or gives it back."""
    total = 0
    for home in (home_of(output), home_of(output, in_place=True)):
        for path in home.rglob("*") if home.is_dir() and not home.is_symlink() else ():
            status = path.lstat()
            total += status.st_blocks * 512 if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 else 0
    return total


def abandon() -> bool:
    """For a process that is about to end without cleaning up: removes work without a finished stage.

    Returns whether any work stays for the next run.
    """
    kept = False
    for journal in tuple(_OPEN):
        if journal.key is not None and journal.stages:
            kept = True
        else:
            _discard(journal.home)
    return kept


def is_kept(error: BaseException) -> bool:
    """Whether work was kept when this error went by, or the one that it was made of."""
    while KEPT not in getattr(error, "__notes__", ()):
        if error.__cause__ is None:
            return False
        error = error.__cause__
    return True


@contextmanager
def _locked(home: Path, output: Path, artifacts: Sequence[Path]) -> Iterator[Path]:
    """The hidden folder, made if need be, with its lock and those of the artifacts that will be replaced."""
    busy = f"{output} is being written"
    with ExitStack() as stack:
        for _ in range(_ATTEMPTS):
            try:
                with suppress(FileExistsError):
                    home.mkdir(mode=0o700)
                refuse_stranger(home)
                stack.enter_context(lock_file(home / LOCK_NAME, busy))
            except FileNotFoundError:  # whoever had it has just removed it
                continue
            except AccessError:
                _discard_empty(home)
                raise
            break
        else:
            raise LockedError(f"{busy}: {home} comes and goes", "wait for the other runs to end")
        try:
            for folder in artifacts:
                stack.enter_context(lock_folder(folder, f"{folder} is in use"))
            yield home
        except BaseException:
            _discard_empty(home)
            raise


@contextmanager
def _journal(home: Path, key: str | None, delivered: Sequence[Path], progress: Progress | None) -> Iterator[Journal]:
    """The journal of a locked folder, which is removed in the end unless its work is worth going on with."""
    journal = open_journal(home, key, delivered, progress or SilentProgress())
    _OPEN.append(journal)
    try:
        yield journal
    except BaseException as error:
        if key is not None and journal.stages and _may_end_well(error):
            error.add_note(KEPT)
        else:
            _discard(home)
        raise
    else:
        _discard(home)
    finally:
        _OPEN.remove(journal)


def _may_end_well(error: BaseException) -> bool:
    """Whether the same command may get further another time: cut off, or stopped by what is not its own doing."""
    another_time = (OutOfMemoryError, EngineBuildError, LockedError, OutputExistsError)
    cut_off = not isinstance(error, Exception) or received() is not None
    return cut_off or isinstance(error, another_time) or ran_out(error)


def _discard(home: Path) -> None:
    """As far as it goes: what stays is removed by the next run, since the journal goes last but for the lock."""
    with suppress(OSError):
        clear(home)
        (home / LOCK_NAME).unlink(missing_ok=True)
        home.rmdir()


def _discard_empty(home: Path) -> None:
    found = peek(home)
    if found is None or not found.stages:
        _discard(home)


def _is_delivered(journal: Journal | None, output: Path) -> bool:
    """Whether the manifests in `output` are those of a sealed journal, byte for byte."""
    if journal is None or not journal.sealed:
        return False
    manifests = {n: record for n, record in journal.files.items() if PurePosixPath(n).name == MANIFEST_NAME}
    try:
        return bool(manifests) and hash_files({name: output / name for name in manifests}) == manifests
    except (OSError, GptossExportError):
        return False

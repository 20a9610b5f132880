"""What of an export is finished, kept beside it, so that a run that was killed goes on where it was.

    journal = open_journal(home, key, progress=progress)
    if journal.result("build ort-cpu") is None:
        ...write files below journal.root...
        journal.finish("build ort-cpu", journal.hash_new(folder), {"engine": "onnxruntime 1.31.1"})

home/journal.json names stages in the order in which they ended, each with the sha256 of the files that it wrote below
home/tree. A stage is in it only when its files are on the disk. The key says what the work is of; the journal of other
work, and every file that no journal vouches for, is thrown away.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath

from gptoss_export.exporter.checkpoint.json_reader import read_json_object
from gptoss_export.exporter.errors import CheckpointError, IntegrityError, OutputExistsError
from gptoss_export.exporter.inside import is_plain_path
from gptoss_export.exporter.progress import Progress
from gptoss_export.exporter.weights import FileRecord, disk_errors, hash_files

JOURNAL_NAME = "journal.json"
LOCK_NAME = "lock"
TREE_NAME = "tree"
REPLACED_NAME = "replaced"

_PARTIAL_NAME = f".{JOURNAL_NAME}.partial"
_FORMAT = "gptoss-export journal"
_SCHEMA = 1
_SEAL = "seal"
_MAX_BYTES = 4 << 20
_SHA256 = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class Stage:
    """One finished stage. files: by their path below the tree. result: what later stages have to know of it."""

    name: str
    files: Mapping[str, FileRecord]
    result: Mapping[str, object]


@dataclass
class Journal:
    """The finished stages of the work `key`. root: where the files are, home/tree until they are delivered.

    `finish` may be called from any thread.
    """

    home: Path
    key: str | None
    root: Path
    stages: list[Stage]
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def sealed(self) -> bool:
        """Whether everything is written, and only the way to its place was left."""
        return self.result(_SEAL) is not None

    @property
    def files(self) -> dict[str, FileRecord]:
        """Every file that a stage vouches for, by its path below the tree."""
        with self._lock:
            return {name: record for stage in self.stages for name, record in stage.files.items()}

    def files_of(self, folder: Path) -> dict[str, FileRecord]:
        """Those in a folder of the tree, by their path in it."""
        start = folder.relative_to(self.root)
        return {
            PurePosixPath(name).relative_to(start).as_posix(): record
            for name, record in self.files.items()
            if PurePosixPath(name).is_relative_to(start)
        }

    def result(self, name: str) -> Mapping[str, object] | None:
        """What a finished stage left to know; None for a stage that is not finished."""
        with self._lock:
            return next((stage.result for stage in self.stages if stage.name == name), None)

    def hash_new(self, folder: Path) -> dict[str, FileRecord]:
        """The files in a folder of the tree that no stage vouches for yet, hashed."""
        known = self.files
        paths = {path.relative_to(self.root).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        return hash_files({name: path for name, path in paths.items() if name not in known})

    def finish(self, name: str, files: Mapping[str, FileRecord], result: Mapping[str, object] | None = None) -> None:
        """Puts the files of a stage on the disk, and then the stage into the journal.

        Raises DiskSpaceError.
        """
        with disk_errors(name):
            _sync_files(self.root, files)
            with self._lock:
                self.stages.append(Stage(name, dict(files), dict(result or {})))
                if self.key is not None:
                    _write(self)

    def seal(self) -> None:
        """Says that nothing more will be written."""
        if not self.sealed:
            sync_tree(self.root)
            self.finish(_SEAL, {})


def is_ours(home: Path) -> bool:
    """Whether a folder was made here, or is still empty. Raises FileNotFoundError when it goes away meanwhile."""
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        return False
    # The lock comes first, then the journal, then the rest; what a kill leaves of them is ours as well.
    if {path.name for path in home.iterdir()} <= {LOCK_NAME, _PARTIAL_NAME}:
        return True
    return _read(home) is not None


def peek(home: Path) -> Journal | None:
    """The journal in a folder, as it is written and nothing verified; None where there is none."""
    try:
        raw = _read(home)
        return None if raw is None else Journal(home, _text(raw.get("key")), home / TREE_NAME, _stages(raw))
    except (OSError, ValueError):
        return None


def open_journal(home: Path, key: str | None, delivered: Sequence[Path], progress: Progress) -> Journal:
    """The journal of the work `key`, its files verified, and nothing else left in the tree; a new one otherwise.

    home: a folder that `is_ours`, locked by the caller. key: None for work that is never resumed. delivered: where the
    files of a sealed journal are looked for instead of in the tree, if any. A file that is damaged or missing takes
    its stage and all later ones along.
    """
    journal = peek(home)
    if journal is not None and key is not None and journal.key == key:
        roots = delivered if journal.sealed and delivered else (journal.root,)
        bad = _first_bad(journal, roots, progress)
        if tuple(roots) != (journal.root,):
            if bad is None:
                return replace(journal, root=roots[0])
        else:
            while bad is not None:
                progress.note(f"{journal.stages[bad].name} is not as it was left, and is done again")
                del journal.stages[bad:]
                bad = _first_bad(journal, roots, progress)
            _write(journal)
            journal.root.mkdir(exist_ok=True)
            _remove_unknown(journal.root, journal.files)
            if journal.stages:
                progress.note(f"going on after: {journal.stages[-1].name}")
            return journal
    clear(home)
    journal = Journal(home, key, home / TREE_NAME, [])
    _write(journal)
    journal.root.mkdir()
    return journal


def clear(home: Path) -> None:
    """Removes the work and then the journal, which says until then whose the folder is."""
    for name in (TREE_NAME, REPLACED_NAME):
        remove(home / name)
    for name in (_PARTIAL_NAME, JOURNAL_NAME):
        (home / name).unlink(missing_ok=True)


def remove(path: Path) -> None:
    """A folder with all that is in it, or a file or link; nothing if it is not there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync_tree(folder: Path) -> None:
    """fsync of every file and folder, from the leaves to the root."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_files(root: Path, files: Mapping[str, FileRecord]) -> None:
    folders = {root, root.parent}
    for name in files:
        path = root / name
        sync(path)
        folders |= {parent for parent in path.parents if parent.is_relative_to(root)}
    for folder in sorted(folders, reverse=True):
        sync(folder)


def _write(journal: Journal) -> None:
    content = {
        "format": _FORMAT,
        "schema_version": _SCHEMA,
        "key": journal.key or "",
        "stages": [asdict(stage) for stage in journal.stages],
    }
    partial = journal.home / _PARTIAL_NAME
    with partial.open("w", encoding="ascii") as file:
        json.dump(content, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(journal.home / JOURNAL_NAME)
    sync(journal.home)


def _read(home: Path) -> dict[str, object] | None:
    """The parsed journal; None for a file that is not one."""
    path = home / JOURNAL_NAME
    try:
        if path.is_symlink():
            return None
        raw = read_json_object(path, _MAX_BYTES)
    except CheckpointError:
        return None
    return raw if raw.get("format") == _FORMAT else None


def _stages(raw: Mapping[str, object]) -> list[Stage]:
    """Raises ValueError for anything that this version did not write."""
    listed = raw.get("stages")
    if raw.get("schema_version") != _SCHEMA or not isinstance(listed, list):
        raise ValueError("another schema")
    stages: list[Stage] = []
    names: set[str] = set()
    files: set[str] = set()
    for entry in listed:
        if not isinstance(entry, dict) or entry.keys() != {"name", "files", "result"}:
            raise ValueError("no stage")
        found, result, name = entry["files"], entry["result"], _text(entry["name"])
        if not isinstance(found, dict) or not isinstance(result, dict) or name in names or files & found.keys():
            raise ValueError("no stage")
        if not all(map(is_plain_path, found)):
            raise ValueError("no path below the tree")
        names.add(name)
        files |= found.keys()
        stages.append(Stage(name, {file: _record(record) for file, record in found.items()}, result))
    return stages


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _record(value: object) -> FileRecord:
    if not isinstance(value, dict) or value.keys() != {"nbytes", "sha256"}:
        raise ValueError("no record of a file")
    nbytes, sha256 = value["nbytes"], _text(value["sha256"])
    if type(nbytes) is not int or nbytes < 0 or len(sha256) != 64 or not set(sha256) <= _SHA256:
        raise ValueError("no record of a file")
    return FileRecord(nbytes, sha256)


def _first_bad(journal: Journal, roots: Sequence[Path], progress: Progress) -> int | None:
    """The first stage with a file that is not as it was left, by sizes before anything is hashed."""
    paths: dict[str, Path] = {}
    for index, stage in enumerate(journal.stages):
        for name, record in stage.files.items():
            found = next((root / name for root in roots if _is_plain(root, name, record)), None)
            if found is None:
                return index
            paths[name] = found
    try:
        hashed = hash_files(paths, progress, "verify what is finished") if paths else {}
    except (IntegrityError, CheckpointError, OSError):
        return 0
    for index, stage in enumerate(journal.stages):
        if any(hashed[name] != record for name, record in stage.files.items()):
            return index
    return None


def _is_plain(root: Path, name: str, record: FileRecord) -> bool:
    """Whether there is a regular file of that size, by folders that are no links."""
    path = root / name
    try:
        parents = [parent for parent in path.parents if parent.is_relative_to(root)]
        status = path.lstat()
        folders = all(stat.S_ISDIR(parent.lstat().st_mode) for parent in parents)
    except OSError:
        return False
    return folders and stat.S_ISREG(status.st_mode) and status.st_size == record.nbytes


def _remove_unknown(root: Path, known: Mapping[str, FileRecord]) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # it still holds what is known
                path.rmdir()
        elif path.relative_to(root).as_posix() not in known:
            path.unlink()


def refuse_stranger(home: Path) -> None:
    """Raises OutputExistsError for a folder that is not ours, FileNotFoundError when it is gone."""
    if not is_ours(home):
        raise OutputExistsError(
            f"{home} is in the way, and was not made by an export of this user",
            "move it away, or give another --output",
        )

"""The same checkpoint gives the same bytes, whoever exports it, where, and in which language."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_export.exporter.artifact import MANIFEST_NAME, RECORD_NAMES, read_manifest
from gptoss_export.exporter.trust.verify import verify_artifact

EPOCH = "1700000000"
NOBODY = 65534
COMMAND = [sys.executable, "-m", "gptoss_export.exporter", "-q"]


class Place:
    """A user's own corner: home, checkpoint, output, environment."""

    def __init__(self, folder: Path, tiny_dir: Path, checkpoint: str, umask: int, **environment: str) -> None:
        self.folder, self.checkpoint, self.umask = folder, checkpoint, umask
        self.out = folder / "out"
        self.prefix: list[str] = []
        folder.mkdir()
        shutil.copytree(tiny_dir, folder / checkpoint)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "GPTOSS_EXPORT_CACHE": str(folder / "cache"),
            "SOURCE_DATE_EPOCH": EPOCH,
            **environment,
        }

    def give_to_another_user(self) -> None:
        """As nobody from now on, where this user may become that one, with what it takes to read this Python."""
        setpriv = shutil.which("setpriv")
        if os.getuid() != 0 or setpriv is None:
            return
        prefix = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        prefix += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        probe = [*prefix, sys.executable, "-c", "import gptoss_export.exporter.cli"]
        if subprocess.run(probe, cwd=self.folder, check=False, capture_output=True).returncode == 0:
            self.prefix = prefix

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.prefix, *COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment,
            umask=self.umask,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def export(self) -> subprocess.Popen[str]:
        return self.start("--target", "ort-cpu", "--model", self.checkpoint, "--output", "out")


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def differing(one: Path, other: Path) -> list[str]:
    a, b = contents(one), contents(other)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


@pytest.fixture(scope="module")
def places(tiny_dir: Path) -> Iterator[tuple[Place, Place]]:
    """Both export with nothing of the other's: not its checkpoint, not its cache."""
    with tempfile.TemporaryDirectory(prefix="gptoss-reproducible-") as base:
        Path(base).chmod(0o755)
        one = Place(Path(base) / "one", tiny_dir, "gpt-oss", 0o022, PYTHONHASHSEED="1", LC_ALL="C", TZ="UTC")
        other = Place(
            Path(base) / "a user's other folder",
            tiny_dir,
            "gpt-oss (copy)",
            0o077,
            PYTHONHASHSEED="77",
            LC_ALL="tr_TR.UTF-8",
            LANG="tr_TR.UTF-8",
            TZ="Asia/Kathmandu",
        )
        other.give_to_another_user()
        for place in (one, other):
            finish(place.export())
        yield one, other


def test_two_users_in_two_folders_get_the_same_bytes(places: tuple[Place, Place]) -> None:
    one, other = places
    assert differing(one.out, other.out) == []
    assert len(contents(one.out)) == len(read_manifest(one.out).files) + 1
    owner = (other.out / MANIFEST_NAME).stat().st_uid
    assert owner == (NOBODY if other.prefix else os.getuid())
    for place in places:
        verify_artifact(place.out)


def test_no_file_names_user_folder_or_host(places: tuple[Place, Place]) -> None:
    one, other = places
    host = os.uname().nodename
    for name, data in contents(one.out).items():
        if name.startswith(("weights/", "tokenizer")):
            continue
        assert str(one.folder.parent).encode() not in data, name
        assert len(host) < 6 or host.encode() not in data, name
    assert one.folder != other.folder


def test_a_validation_writes_the_same_bytes_again(places: tuple[Place, Place]) -> None:
    one, other = places
    finish(one.start("validate", "out"))
    assert differing(one.out, other.out) == []


def test_without_a_stopped_clock_only_records_and_manifest_differ(places: tuple[Place, Place], tmp_path: Path) -> None:
    one, other = places
    again = shutil.copytree(one.out, one.folder / "again")
    del one.environment["SOURCE_DATE_EPOCH"]
    finish(one.start("validate", "again"))
    assert differing(again, other.out) == sorted((MANIFEST_NAME, *RECORD_NAMES))
    assert read_manifest(again).content_sha256 == read_manifest(other.out).content_sha256
    verify_artifact(again)
    for name in RECORD_NAMES:
        mine, theirs = ((folder / name).read_bytes().splitlines() for folder in (again, other.out))
        assert len(mine) == len(theirs), name

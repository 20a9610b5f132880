"""Nothing half-written, nothing lost: every way in which a folder may or may not appear."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter.artifact import MANIFEST_NAME
from gptoss_export.exporter.errors import (
    AccessError,
    DiskSpaceError,
    EngineBuildError,
    GraphError,
    LockedError,
    OutOfMemoryError,
    OutputExistsError,
)
from gptoss_export.exporter.output import swap
from gptoss_export.exporter.output.staging import (
    check_output,
    home_of,
    in_use,
    journaled,
    journaled_in_place,
    kept_bytes,
    recover,
    staging,
)


def artifact(folder: Path, content: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(content)
    (folder / "model.onnx").write_text(content)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def fill(folder: Path, content: str = "new") -> None:
    (folder / "weights").mkdir()
    (folder / "weights" / "model.safetensors").write_text(content)
    (folder / MANIFEST_NAME).write_text(content)


@contextmanager
def staging_in_place(output: Path, **options: Any) -> Iterator[Path]:
    with journaled_in_place(output, None, **options) as journal:
        yield journal.root


NEW = {"weights/model.safetensors": "new", MANIFEST_NAME: "new"}


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty"])
def test_appears_when_complete(exists: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "release"
    if exists:
        out.mkdir(parents=True)
    with staging(out) as folder:
        fill(folder)
        assert folder.parent.parent == out.parent
        assert not out.exists() or not any(out.iterdir())
    assert tree(tmp_path) == {f"deep/release/{name}": text for name, text in NEW.items()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_vanishes_with_its_parents_on_failure(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staging(tmp_path / "a" / "b" / "release") as folder:
        fill(folder)
        raise error
    assert list(tmp_path.iterdir()) == []


def test_parents_that_others_use_stay(tmp_path: Path) -> None:
    with pytest.raises(ValueError), staging(tmp_path / "a" / "release"):
        (tmp_path / "a" / "theirs").touch()
        raise ValueError
    assert (tmp_path / "a" / "theirs").exists()


def test_force_replaces_an_artifact_and_removes_the_old_one(tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    with staging(out, force=True) as folder:
        fill(folder)
        assert tree(out)["model.onnx"] == "old"
    assert tree(out) == NEW
    assert list(tmp_path.iterdir()) == [out]


def test_force_replaces_a_folder_of_artifacts(tmp_path: Path) -> None:
    artifact(tmp_path / "release" / "onnx")
    artifact(tmp_path / "release" / "ort-cpu")
    with staging(tmp_path / "release", force=True) as folder:
        fill(folder)
    assert tree(tmp_path / "release") == NEW


def test_a_failed_replacement_leaves_the_old_artifact(tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    before = tree(tmp_path)
    with pytest.raises(ValueError), staging(out, force=True) as folder:
        fill(folder)
        raise ValueError
    assert tree(tmp_path) == before


def test_a_failed_rename_puts_the_old_artifact_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = artifact(tmp_path / "release")
    before = tree(tmp_path)
    rename = Path.rename

    def fail_once(self: Path, target: Path) -> Path:
        if self.name == "tree":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(swap, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="no"), staging(out, force=True) as folder:
        fill(folder)
    assert tree(tmp_path) == before


def test_what_is_there_is_not_touched_without_force(tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    with pytest.raises(OutputExistsError, match="not empty"), staging(out):
        pytest.fail("the block must not run")
    assert tree(out)["model.onnx"] == "old"


def test_force_never_replaces_what_is_no_artifact(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="no artifact"):
        check_output(home, force=True)
    artifact(home / "release")
    with pytest.raises(OutputExistsError, match=r"thesis\.tex"):
        check_output(home, force=True)


def test_force_never_replaces_the_checkpoint(tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    inside = out / "weights"
    inside.mkdir()
    for protect in (out, inside):
        with pytest.raises(OutputExistsError, match="holds the checkpoint"):
            check_output(out, force=True, protect=[protect])
    check_output(inside, force=False, protect=[out])


def test_files_and_links_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    link, dangling = tmp_path / "link", tmp_path / "dangling"
    link.symlink_to(tmp_path)
    dangling.symlink_to(tmp_path / "nothing")
    for path in (file, link, dangling):
        with pytest.raises(OutputExistsError):
            check_output(path, force=True)


def test_a_folder_that_fills_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "release"
    with pytest.raises(OutputExistsError), staging(out) as folder:
        fill(folder)
        artifact(out, "theirs")
    assert tree(tmp_path) == {f"release/{MANIFEST_NAME}": "theirs", "release/model.onnx": "theirs"}


def test_a_killed_process_leaves_no_output(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from gptoss_export.exporter.output.staging import staging\n"
        "with staging(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'manifest.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "release")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "release").exists()
    assert [p.name for p in tmp_path.iterdir()] == [".release.partial"]
    with staging(tmp_path / "release") as folder:
        fill(folder)
    assert tree(tmp_path) == {f"release/{name}": text for name, text in NEW.items()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    root.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (root / name).write_text(f"their {name}")
    return root


def link_into(checkpoint: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in checkpoint.iterdir():
        if path.is_file():
            os.link(path, folder / path.name)


def test_in_place_adds_to_the_checkpoint(checkpoint: Path) -> None:
    theirs, inodes = tree(checkpoint), {p: p.stat().st_ino for p in checkpoint.iterdir()}
    with staging_in_place(checkpoint, protect=list(checkpoint.iterdir())) as folder:
        link_into(checkpoint, folder)
        (folder / "model.onnx").write_text("new")
        (folder / MANIFEST_NAME).write_text("new")
        assert not (checkpoint / "model.onnx").exists()
    assert tree(checkpoint) == theirs | {"model.onnx": "new", MANIFEST_NAME: "new"}
    assert {p: p.stat().st_ino for p in inodes} == inodes
    assert all(p.stat().st_nlink == 1 for p in checkpoint.iterdir())


def test_in_place_above_the_checkpoint(checkpoint: Path) -> None:
    with staging_in_place(checkpoint.parent) as folder:
        link_into(checkpoint, folder / "model")
        (folder / MANIFEST_NAME).write_text("new")
    assert sorted(p.name for p in checkpoint.parent.iterdir()) == [MANIFEST_NAME, "model"]


def test_in_place_failure_changes_nothing(checkpoint: Path) -> None:
    before = tree(checkpoint)
    with pytest.raises(KeyboardInterrupt), staging_in_place(checkpoint) as folder:
        link_into(checkpoint, folder)
        (folder / "model.onnx").write_text("new")
        raise KeyboardInterrupt
    assert tree(checkpoint) == before


def test_in_place_never_overwrites_the_checkpoint_even_with_force(checkpoint: Path) -> None:
    before = tree(checkpoint)
    with (
        pytest.raises(OutputExistsError, match="of the checkpoint"),
        staging_in_place(checkpoint, force=True, protect=list(checkpoint.iterdir())) as folder,
    ):
        (folder / "a.onnx").write_text("new")
        (folder / "config.json").write_text("ours")
    assert tree(checkpoint) == before


def test_in_place_overwrites_other_files_only_with_force(checkpoint: Path) -> None:
    (checkpoint / "model.onnx").write_text("old")
    before = tree(checkpoint)
    with pytest.raises(OutputExistsError, match="exists already"), staging_in_place(checkpoint) as folder:
        (folder / "a.onnx").write_text("new")
        (folder / "model.onnx").write_text("new")
    assert tree(checkpoint) == before
    with staging_in_place(checkpoint, force=True) as folder:
        (folder / "model.onnx").write_text("new")
    assert tree(checkpoint)["model.onnx"] == "new"


def test_in_place_twice_needs_force(checkpoint: Path) -> None:
    (checkpoint / MANIFEST_NAME).write_text("old")
    with pytest.raises(OutputExistsError), staging_in_place(checkpoint):
        pytest.fail("the block must not run")


def test_in_place_takes_back_what_it_moved(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(checkpoint)
    replace = Path.replace

    def fail_at_the_manifest(self: Path, target: Path) -> Path:
        if self.name == MANIFEST_NAME:
            raise OSError("no")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_at_the_manifest)
    with pytest.raises(OSError, match="no"), staging_in_place(checkpoint) as folder:
        (folder / "model.onnx").write_text("new")
        (folder / "int8").mkdir()
        (folder / "int8" / "linear.safetensors").write_text("new")
        (folder / MANIFEST_NAME).write_text("new")
    assert tree(checkpoint) == before
    assert not (checkpoint / "int8").exists()


def finish(journal: Any, stage: str = "all", content: str = "new") -> None:
    fill(journal.root, content)
    journal.finish(stage, journal.hash_new(journal.root))


def killed(tmp_path: Path, body: str, out: Path) -> None:
    """Runs the body in a process that ends with SIGKILL."""
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gptoss_export.exporter.output import staging, swap\n"
        "out = Path(sys.argv[1])\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "def fill(journal):\n"
        "    (journal.root / 'weights').mkdir()\n"
        "    (journal.root / 'weights' / 'model.safetensors').write_text('new')\n"
        "    (journal.root / 'manifest.json').write_text('new')\n"
        "    journal.finish('all', journal.hash_new(journal.root))\n"
        f"{body}"
    )
    done = subprocess.run([sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


EXPORT = "with staging.journaled(out, 'key', force=True) as journal: fill(journal)\n"
KILLS = {
    "in the block": "with staging.journaled(out, 'key', force=True) as journal: fill(journal); die()\n",
    "before the exchange": "staging.swap = die\n" + EXPORT,
    "after the exchange": "sync = swap.sync; swap.sync = die\n" + EXPORT,
    "while cleaning up": "staging.clear = die\n" + EXPORT,
    "between two renames": "swap._exchange = lambda *_: False; swap.sync = die\n"
    "rename = Path.rename\n"
    "Path.rename = lambda self, target: die() if self.name == 'tree' else rename(self, target)\n" + EXPORT,
    "after two renames": "swap._exchange = lambda *_: False; swap.sync = die\n" + EXPORT,
}


@pytest.mark.parametrize("old", [False, True], ids=["first", "replacing"])
@pytest.mark.parametrize("body", KILLS.values(), ids=KILLS.keys())
def test_the_same_run_after_a_kill(body: str, old: bool, tmp_path: Path) -> None:
    out = tmp_path / "release"
    if old:
        artifact(out)
    elif "Path.rename" in body:
        pytest.skip("nothing is moved aside")
    killed(tmp_path, body, out)
    recover(out)
    assert tree(out) in ([NEW, {MANIFEST_NAME: "old", "model.onnx": "old"}] if old else [NEW, {}])
    with journaled(out, "key", force=old) as journal:
        assert [stage.name for stage in journal.stages][:1] == ["all"]
        assert tree(journal.root) == NEW
    assert tree(out) == NEW
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("body", KILLS.values(), ids=KILLS.keys())
def test_another_run_after_a_kill(body: str, tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    killed(tmp_path, body, out)
    with journaled(out, "other", force=True) as journal:
        assert journal.stages == []
        finish(journal, content="newer")
    assert set(tree(out).values()) == {"newer"}
    assert list(tmp_path.iterdir()) == [out]


def test_a_replaced_artifact_is_put_back(tmp_path: Path) -> None:
    out = artifact(tmp_path / "release")
    killed(tmp_path, KILLS["between two renames"], out)
    assert not out.exists()
    recover(out)
    assert tree(out)["model.onnx"] == "old"
    recover(out)
    assert tree(out)["model.onnx"] == "old"


def test_what_is_delivered_is_refused_to_others_without_force(tmp_path: Path) -> None:
    out = tmp_path / "release"
    killed(tmp_path, KILLS["while cleaning up"], out)
    check_output(out, force=False)
    with pytest.raises(OutputExistsError, match="not empty"), journaled(out, "other"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {f"release/{name}": text for name, text in NEW.items()}


def test_an_interruption_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "a" / "release"
    with pytest.raises(KeyboardInterrupt), journaled(out, "key") as journal:
        finish(journal)
        (journal.root / "half").touch()
        raise KeyboardInterrupt
    assert kept_bytes(out) > 0
    with journaled(out, "key") as journal:
        assert tree(journal.root) == NEW
    assert tree(tmp_path) == {f"a/release/{name}": text for name, text in NEW.items()}
    assert kept_bytes(out) == 0


@pytest.mark.parametrize(
    "error",
    [DiskSpaceError("full", "free"), GraphError("no", "report"), OSError(errno.ENOSPC, "full"), ValueError("a bug")],
)
def test_errors_that_would_come_again_keep_nothing(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), journaled(tmp_path / "a" / "release", "key") as journal:
        finish(journal)
        raise error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OutOfMemoryError("full", "more"), MemoryError(), EngineBuildError("died", "again")])
def test_errors_that_need_not_come_again_keep_what_is_finished(error: Exception, tmp_path: Path) -> None:
    for finished in (False, True):
        with pytest.raises(type(error)), journaled(tmp_path / "release", "key") as journal:
            if finished:
                finish(journal)
            raise error
        assert [path.name for path in tmp_path.iterdir()] == [".release.partial"][: int(finished)]


def test_one_run_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "release"
    with journaled(out, "key") as journal:
        finish(journal)
        with (
            pytest.raises(LockedError, match=rf"{out} is being written by process {os.getpid()}"),
            journaled(out, "key"),
        ):
            pytest.fail("the block must not run")
        with pytest.raises(LockedError, match="is being written"), in_use(out):
            pytest.fail("the block must not run")
    assert tree(out) == NEW
    with in_use(out):
        with pytest.raises(LockedError, match="is in use"), journaled(out, "key", force=True):
            pytest.fail("the block must not run")
        with pytest.raises(LockedError, match="is in use"), in_use(out):
            pytest.fail("the block must not run")
        assert list(tmp_path.iterdir()) == [out]
    with in_use(out):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(AccessError, match="without locks"), staging(tmp_path / "release"):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda p: p.symlink_to("/tmp")])
def test_what_is_in_the_way_stays(make: Any, tmp_path: Path) -> None:
    home = home_of(tmp_path / "release")
    make(home)
    if home.is_dir() and not home.is_symlink():
        (home / "theirs").touch()
    with pytest.raises(OutputExistsError, match="in the way"), staging(tmp_path / "release"):
        pytest.fail("the block must not run")
    assert os.path.lexists(home)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["a.onnx", "model.onnx", MANIFEST_NAME, None])
def test_in_place_after_a_kill(name: str | None, force: bool, checkpoint: Path) -> None:
    theirs = tree(checkpoint)
    if force:
        for old in ("model.onnx", MANIFEST_NAME):
            (checkpoint / old).write_text("old")
    new = theirs | {"a.onnx": "new", "model.onnx": "new", MANIFEST_NAME: "new"}
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from gptoss_export.exporter.output import staging\n"
        "out, name = Path(sys.argv[1]), sys.argv[2]\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "replace = Path.replace\n"
        "Path.replace = lambda self, to: die() if self.name == name else replace(self, to)\n"
        "if not name: staging._discard = die\n"
        f"with staging.journaled_in_place(out, 'key', force={force}) as journal:\n"
        "    for path in out.iterdir():\n"
        "        if path.is_file() and path.read_text().startswith('their'): os.link(path, journal.root / path.name)\n"
        "    for new in ('a.onnx', 'model.onnx', 'manifest.json'): (journal.root / new).write_text('new')\n"
        "    journal.finish('all', journal.hash_new(journal.root))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint), name or ""], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with journaled_in_place(checkpoint, "key", force=force, protect=list(checkpoint.glob("*.json"))) as journal:
        assert journal.root == checkpoint
    assert tree(checkpoint) == new
    assert all(path.stat().st_nlink == 1 for path in checkpoint.iterdir())

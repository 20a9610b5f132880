"""Nothing half-written, nothing lost: every way in which a folder may or may not appear."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_export.exporter.artifact import MANIFEST_NAME
from gptoss_export.exporter.errors import OutputExistsError
from gptoss_export.exporter.staging import check_output, staging, staging_in_place


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


NEW = {"weights/model.safetensors": "new", MANIFEST_NAME: "new"}


@pytest.mark.parametrize("exists", [False, True], ids=["absent", "empty"])
def test_appears_when_complete(exists: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "release"
    if exists:
        out.mkdir(parents=True)
    with staging(out) as folder:
        fill(folder)
        assert folder.parent == out.parent
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
        if ".partial-" in self.name:
            raise OSError("no")
        return rename(self, target)

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
        "import os, signal, sys; from pathlib import Path; from gptoss_export.exporter.staging import staging\n"
        "with staging(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'manifest.json').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "release")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "release").exists()
    assert [p.name.split("-")[0] for p in tmp_path.iterdir()] == [".release.partial"]


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

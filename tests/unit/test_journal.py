"""What a killed run leaves is taken up by the next one, if it is its own, whole and undamaged, and by nobody else."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter.errors import OutputExistsError
from gptoss_export.exporter.output.journal import (
    JOURNAL_NAME,
    LOCK_NAME,
    Journal,
    clear,
    is_ours,
    open_journal,
    peek,
    refuse_stranger,
)
from gptoss_export.exporter.progress import SilentProgress
from gptoss_export.exporter.weights import FileRecord, WeightsMode, place_weights

KEY = "k" * 64
STAGES = ("weights", "build", "measure")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / ".release.partial"
    folder.mkdir()
    (folder / LOCK_NAME).touch()
    return folder


def opened(home: Path, key: str | None = KEY, *roots: Path) -> Journal:
    return open_journal(home, key, roots, SilentProgress())


def work(home: Path) -> Journal:
    """Three stages: one file each, the first one in a folder."""
    journal = opened(home)
    for stage in STAGES:
        path = journal.root / (f"w/{stage}" if stage == "weights" else stage)
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"of {stage}")
        journal.finish(stage, journal.hash_new(journal.root), {"notes": [stage]})
    return journal


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_later_run_goes_on(home: Path) -> None:
    before = work(home)
    again = opened(home)
    assert again.stages == before.stages
    assert again.result("build") == {"notes": ["build"]}
    assert again.result("seal") is None
    assert again.files.keys() == {"w/weights", "build", "measure"}
    assert again.files_of(again.root / "w").keys() == {"weights"}
    assert not again.sealed


def test_leftovers_are_removed(home: Path) -> None:
    root = work(home).root
    (root / "half").write_text("half")
    (root / "w" / ".weights.partial").write_text("half")
    (root / "link").symlink_to("/etc")
    (root / "int8" / "deep").mkdir(parents=True)
    opened(home)
    assert names(root) == ["build", "measure", "w", "w/weights"]


def overwrite(path: Path) -> None:
    path.write_text("OF " + path.name)


def shorten(path: Path) -> None:
    path.write_text("")


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to("../elsewhere")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [Path.unlink, overwrite, shorten, link, folder, fifo])
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_file_takes_its_stage_and_the_later_ones_along(
    stage: str, damage: Callable[[Path], None], home: Path
) -> None:
    root = work(home).root
    damage(root / "w" / stage if stage == "weights" else root / stage)
    journal = opened(home)
    kept = STAGES[: STAGES.index(stage)]
    assert [s.name for s in journal.stages] == list(kept)
    assert [name for name in names(root) if name != "w"] == [f"w/{s}" if s == "weights" else s for s in sorted(kept)]
    assert opened(home).stages == journal.stages


def test_a_folder_that_became_a_link(home: Path, tmp_path: Path) -> None:
    root = work(home).root
    (root / "w").rename(tmp_path / "outside")
    (root / "w").symlink_to(tmp_path / "outside")
    assert opened(home).stages == []
    assert names(tmp_path / "outside") == ["weights"]


@pytest.mark.parametrize("key", ["other", None])
def test_other_work_is_thrown_away(key: str | None, home: Path) -> None:
    work(home)
    journal = opened(home, key)
    assert (journal.stages, names(journal.root)) == ([], [])
    assert opened(home).stages == []


def test_work_without_a_key_is_never_taken_up(home: Path) -> None:
    journal = opened(home, None)
    (journal.root / "file").touch()
    journal.finish("stage", journal.hash_new(journal.root))
    journal.seal()
    assert opened(home, None).stages == []


def test_sealed_work_is_found_where_it_went(home: Path, tmp_path: Path) -> None:
    journal = work(home)
    journal.seal()
    assert opened(home).sealed
    out = tmp_path / "release"
    journal.root.rename(out)
    there = opened(home, KEY, out)
    assert (there.root, there.sealed) == (out, True)
    (out / "build").write_text("changed")
    assert opened(home, KEY, out).stages == []
    assert (out / "build").read_text() == "changed"


def entry(**changes: object) -> dict[str, Any]:
    record = {"nbytes": 8, "sha256": "0" * 64}
    return {"name": "build", "files": {"build": record}, "result": {}} | changes


def journal_text(*stages: object, **changes: object) -> str:
    content = {"format": "gptoss-export journal", "schema_version": 1, "key": KEY, "stages": list(stages)}
    return json.dumps(content | changes)


HOSTILE = {
    "above": journal_text(entry(files={"../../victim": {"nbytes": 6, "sha256": "0" * 64}})),
    "absolute": journal_text(entry(files={"/etc/passwd": {"nbytes": 6, "sha256": "0" * 64}})),
    "itself": journal_text(entry(files={".": {"nbytes": 6, "sha256": "0" * 64}})),
    "nul": journal_text(entry(files={"a\0b": {"nbytes": 6, "sha256": "0" * 64}})),
    "twice": journal_text(entry(), entry(name="measure")),
    "named twice": journal_text(entry(), entry(files={})),
    "no files": journal_text(entry(files=[])),
    "no record": journal_text(entry(files={"build": 8})),
    "negative": journal_text(entry(files={"build": {"nbytes": -1, "sha256": "0" * 64}})),
    "true bytes": journal_text(entry(files={"build": {"nbytes": True, "sha256": "0" * 64}})),
    "short hash": journal_text(entry(files={"build": {"nbytes": 8, "sha256": "0"}})),
    "wrong hash": journal_text(entry()),
    "name is a list": journal_text(entry(name=["build"])),
    "result is text": journal_text(entry(result="x")),
    "more fields": journal_text(entry(also=1)),
    "stages is an object": journal_text(stages={}),
    "key is a number": journal_text(key=1),
    "another schema": journal_text(schema_version=2),
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_journal_that_nobody_wrote_so_is_thrown_away(text: str, home: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("victim")
    work(home)
    (home / JOURNAL_NAME).write_text(text)
    refuse_stranger(home)
    journal = opened(home)
    assert (journal.stages, names(journal.root)) == ([], [])
    assert (tmp_path / "victim").read_text() == "victim"


STRANGE = {
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
    "duplicate keys": b'{"format": "gptoss-export journal", "format": "gptoss-export journal"}',
    "another format": b'{"format": "journal"}',
    "deep": b"[" * 100_000,
    "huge": b" " * (5 << 20),
    "empty": b"",
}


@pytest.mark.parametrize("data", STRANGE.values(), ids=STRANGE.keys())
def test_a_stranger_s_folder_is_left_alone(data: bytes, home: Path) -> None:
    (home / JOURNAL_NAME).write_bytes(data)
    (home / "tree").mkdir()
    (home / "tree" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputExistsError, match="in the way"):
        refuse_stranger(home)
    assert (home / "tree" / "thesis.tex").exists()


def test_links_and_folders_of_others_are_strangers(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(home)
    assert not is_ours(tmp_path / "link")
    work(home)
    (home / JOURNAL_NAME).rename(tmp_path / "journal")
    (home / JOURNAL_NAME).symlink_to(tmp_path / "journal")
    assert not is_ours(home)
    (tmp_path / "journal").rename(home / JOURNAL_NAME)
    assert is_ours(home)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not is_ours(home)


def test_what_a_kill_leaves_of_the_first_steps_is_ours(home: Path) -> None:
    assert is_ours(home)
    (home / f".{JOURNAL_NAME}.partial").write_text("{")
    assert is_ours(home)
    assert opened(home).stages == []
    (home / LOCK_NAME).unlink()
    assert is_ours(home)


def test_the_journal_goes_last(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = work(home)

    def fail(*_: object, **__: object) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", fail)
        with pytest.raises(OSError, match="busy"):
            clear(home)
    assert is_ours(home)
    found = peek(home)
    assert found is not None and found.stages == journal.stages
    clear(home)
    assert names(home) == [LOCK_NAME]


def test_a_stage_is_on_the_disk_before_the_journal_says_so(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def note_sync(fd: int) -> None:
        order.append(f"sync {Path(f'/proc/self/fd/{fd}').readlink().relative_to(home).as_posix()}")
        fsync(fd)

    def note_replace(self: Path, target: Path) -> Path:
        order.append(f"replace {target.name}")
        return replace(self, target)

    journal = opened(home)
    (journal.root / "w").mkdir()
    (journal.root / "w" / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    journal.finish("weights", journal.hash_new(journal.root))
    assert order == [
        "sync tree/w/file",
        "sync tree/w",
        "sync tree",
        "sync .",
        f"sync .{JOURNAL_NAME}.partial",
        f"replace {JOURNAL_NAME}",
        "sync .",
    ]


def test_weights_are_finished_file_by_file(home: Path, tmp_path: Path) -> None:
    journal, sources = opened(home), {}
    for name, content in (("a", b"a" * 100), ("empty", b""), ("b", b"b" * 100)):
        (tmp_path / name).write_bytes(content)
        sources[name] = tmp_path / name
    cancel, seen = threading.Event(), []

    def finish(name: str, record: FileRecord) -> None:
        assert (journal.root / name).read_bytes() == sources[name].read_bytes()
        journal.finish(f"weights {name}", {name: record})
        seen.append(name)
        if name == "empty":
            cancel.set()

    place_weights(sources, [journal.root], WeightsMode.COPY, cancel=cancel, finish=finish)
    assert seen == ["a", "empty"]
    again = opened(home)
    assert [stage.name for stage in again.stages] == ["weights a", "weights empty"]
    assert names(again.root) == ["a", "empty"]

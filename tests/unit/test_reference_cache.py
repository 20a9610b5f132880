"""The cache of reference runs: what is used is what was made, and the cache itself never stands in the way."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError
from gptoss_export.exporter.progress import SilentProgress, Task
from gptoss_export.validators import reference_cache
from gptoss_export.validators.floor import run_floor
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.reference_cache import cache_key, default_cache, reference_for

SHARDS = ("model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors")
FILES = {"config.json": "0" * 64, **dict.fromkeys(SHARDS, "1" * 64)}
PROBES = (Probe("three", (1, 2, 3)), Probe("one", (7,)))


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        self.lines.append(line)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The dtypes of the runs that were really made."""
    made: list[str] = []
    run = reference_cache.run_reference

    def counting(*args: object, **kwargs: object) -> Reference:
        made.append(str(kwargs["dtype"]))
        return run(*args, **kwargs)

    monkeypatch.setattr(reference_cache, "run_reference", counting)
    return made


def ask(tiny: Checkpoint, cache: Path | None, notes: Notes | None = None, **change: object) -> Reference:
    given = {"files": FILES, "probes": PROBES, "dtype": "float32", **change}
    return reference_for(tiny, given["files"], given["probes"], given["dtype"], cache=cache, progress=notes)


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "reference").iterdir())


def assert_the_same(a: Reference, b: Reference) -> None:
    assert (a.description, a.dtype, a.probes, a.config) == (b.description, b.dtype, b.probes, b.config)
    for row, probe in enumerate(a.probes):
        np.testing.assert_array_equal(a.logits(row, 0, len(probe.ids)), b.logits(row, 0, len(probe.ids)))
        for n in range(4):
            np.testing.assert_array_equal(a.router_logits(n, row), b.router_logits(n, row))
            np.testing.assert_array_equal(a.trace.residual(n, row), b.trace.residual(n, row))
        for n in range(5):
            np.testing.assert_array_equal(a.trace.hidden(n, row), b.trace.hidden(n, row))
    assert a.trace.peaks == b.trace.peaks


def test_five_times_cost_one_run(tiny: Checkpoint, tmp_path: Path, runs: list[str]) -> None:
    notes = Notes()
    first = ask(tiny, tmp_path / "a" / "b", notes)
    assert notes.lines == []
    for _ in range(4):
        assert_the_same(ask(tiny, tmp_path / "a" / "b", notes), first)
    assert runs == ["float32"]
    assert notes.lines == [f"reference from the cache: {first.description}"] * 4
    assert [path.name for path in entries(tmp_path / "a" / "b")] == [cache_key(FILES, PROBES, "float32")]


def test_folders_are_this_user_s_alone(tiny: Checkpoint, tmp_path: Path) -> None:
    ask(tiny, tmp_path / "cache")
    [entry] = entries(tmp_path / "cache")
    for folder in (tmp_path / "cache", tmp_path / "cache" / "reference", entry):
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_hit_loads_neither_torch_nor_transformers_and_takes_no_time(
    tiny: Checkpoint, tiny_dir: Path, tmp_path: Path
) -> None:
    ask(tiny, tmp_path)
    program = """
import sys, time
from pathlib import Path
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference_cache import reference_for
checkpoint = open_checkpoint(Path(sys.argv[1]))
files = {"config.json": "0" * 64, **{file.name: "1" * 64 for file in checkpoint.weight_files}}
started = time.process_time()
probes = (Probe("three", (1, 2, 3)), Probe("one", (7,)))
run = reference_for(checkpoint, files, probes, "float32", cache=Path(sys.argv[2]))
run.trace.hidden(4, 0), run.router_logits(0, 1)
print(time.process_time() - started < 0.5, "torch" in sys.modules, "transformers" in sys.modules)
"""
    args = [sys.executable, "-c", program, str(tiny_dir), str(tmp_path)]
    assert subprocess.run(args, capture_output=True, text=True, check=True).stdout == "True False False\n"


KEY_CHANGES: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "a file's content": lambda _: cache_key(FILES | {"config.json": "2" * 64}, PROBES, "float32"),
    "a file's name": lambda _: cache_key({"config.json": "0" * 64, "m.safetensors": "1" * 64}, PROBES, "float32"),
    "a file more": lambda _: cache_key(FILES | {"x": "2" * 64}, PROBES, "float32"),
    "a probe's name": lambda _: cache_key(FILES, (Probe("3", (1, 2, 3)), PROBES[1]), "float32"),
    "a probe's ids": lambda _: cache_key(FILES, (Probe("three", (1, 2, 4)), PROBES[1]), "float32"),
    "the order of the probes": lambda _: cache_key(FILES, PROBES[::-1], "float32"),
    "a probe less": lambda _: cache_key(FILES, PROBES[:1], "float32"),
    "the dtype": lambda _: cache_key(FILES, PROBES, "float16"),
    "a version": lambda patch: _with(patch, "version", lambda name: f"{name}-next"),
    "the processor": lambda patch: _with(patch, "floating_point", lambda: "another"),
    "the architecture": lambda patch: _with(patch, "platform", SimpleNamespace(machine=lambda: "another")),
    "the schema": lambda patch: _with(patch, "SCHEMA", reference_cache.SCHEMA + 1),
}


def _with(patch: pytest.MonkeyPatch, name: str, value: object) -> str:
    patch.setattr(reference_cache, name, value)
    return cache_key(FILES, PROBES, "float32")


@pytest.mark.parametrize("what", KEY_CHANGES)
def test_the_key_is_of_everything_that_a_run_depends_on(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache_key(dict(reversed(FILES.items())), PROBES, "float32")
    assert key == cache_key(FILES, PROBES, "float32")
    assert KEY_CHANGES[what](monkeypatch) != key


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def reindex(entry: Path) -> None:
    """Hashes that agree with whatever lies there."""
    index = json.loads((entry / "index.json").read_text())
    paths = [path for path in entry.iterdir() if path.name != "index.json"]
    index["files"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    (entry / "index.json").write_text(json.dumps(index))


def forged(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(entry: Path) -> None:
        change(entry)
        reindex(entry)

    return damage


def replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{
        f"a bit of {name}": lambda entry, name=name: flip(entry / name)
        for name in ("hidden.npy", "residual.npy", "router_logits.npy", "final.npy", "peaks.json", "index.json")
    },
    "cut short": lambda entry: os.truncate(entry / "hidden.npy", 300),
    "an empty index": lambda entry: (entry / "index.json").write_text(""),
    "no index": lambda entry: (entry / "index.json").unlink(),
    "an index of nothing": lambda entry: (entry / "index.json").write_text("{}"),
    "an index too deep": lambda entry: (entry / "index.json").write_text('{"files":' + "[" * 200_000),
    "an index too large": lambda entry: (entry / "index.json").write_text(" " * (2 << 20)),
    "another key": lambda entry: (entry / "index.json").write_text(
        (entry / "index.json").read_text().replace(entry.name, "0" * 64)
    ),
    "no router": lambda entry: (entry / "router_logits.npy").unlink(),
    "no router, and the index knows": forged(lambda entry: (entry / "router_logits.npy").unlink()),
    "a file more": lambda entry: (entry / "x.npy").write_text(""),
    "a pipe": lambda entry: replaced(entry / "final.npy", os.mkfifo),
    "a folder": lambda entry: replaced(entry / "final.npy", Path.mkdir),
    "a link to nowhere": lambda entry: replaced(entry / "final.npy", lambda path: path.symlink_to("/nowhere")),
    "pickled objects": forged(
        lambda entry: np.save(entry / "final.npy", np.array([{}] * 4, object), allow_pickle=True)
    ),
    "another shape": forged(lambda entry: np.save(entry / "final.npy", np.zeros((1, 9, 192), np.float32))),
    "a hostile header": forged(
        lambda entry: (entry / "final.npy").write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)
    ),
    "an empty array": forged(lambda entry: (entry / "final.npy").write_bytes(b"")),
    "peaks of text": forged(lambda entry: (entry / "peaks.json").write_text('{"hidden": "large"}')),
    "peaks of nothing": forged(lambda entry: (entry / "peaks.json").write_text('{"hidden": [[null, 1]]}')),
    "a file for a folder": lambda entry: (entry.rename(entry.with_name("0")), entry.write_text("")),
}


@pytest.fixture(scope="module")
def made(tiny: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    cache = tmp_path_factory.mktemp("made")
    return cache, ask(tiny, cache)


def copied(made: tuple[Path, Reference], to: Path) -> Path:
    """A cache of its own with that entry; returns the entry."""
    [source] = entries(made[0])
    entry = to / "reference" / source.name
    for folder in (to / "reference", entry):
        folder.mkdir(mode=0o700)
    for path in source.iterdir():
        (entry / path.name).write_bytes(path.read_bytes())
    return entry


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_entry_is_never_used_and_is_made_again(
    what: str, made: tuple[Path, Reference], tiny: Checkpoint, tmp_path: Path, runs: list[str]
) -> None:
    entry = copied(made, tmp_path)
    DAMAGE[what](entry)
    notes = Notes()
    assert_the_same(ask(tiny, tmp_path, notes), made[1])
    assert runs == ["float32"]
    assert len(notes.lines) == 1
    assert notes.lines[0].startswith("a cached reference is damaged and is made again: ")
    assert "\n" not in notes.lines[0]
    assert_the_same(ask(tiny, tmp_path), made[1])
    assert runs == ["float32"], "the entry is whole again"


def test_an_entry_is_read_even_when_it_is_removed_meanwhile(
    made: tuple[Path, Reference], tiny: Checkpoint, tmp_path: Path
) -> None:
    entry = copied(made, tmp_path)
    hit = ask(tiny, tmp_path)
    for path in entry.iterdir():
        path.unlink()
    entry.rmdir()
    assert_the_same(hit, made[1])


def test_no_cache(tiny: Checkpoint, runs: list[str]) -> None:
    for _ in range(2):
        assert ask(tiny, None).logits(0, 0, 3).shape == (3, 2048)
    assert runs == ["float32"] * 2


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "cache"


def file_in_the_way(folder: Path) -> Path:
    (folder / "reference").write_text("")
    return folder


def linked(folder: Path) -> Path:
    (folder / "elsewhere").mkdir()
    (folder / "reference").symlink_to(folder / "elsewhere")
    return folder


def open_to_all(folder: Path) -> Path:
    (folder / "reference").mkdir()
    (folder / "reference").chmod(0o777)
    return folder


@pytest.mark.parametrize("place", [below_a_file, file_in_the_way, linked, open_to_all])
def test_a_place_that_is_no_good_is_done_without(
    place: Callable[[Path], Path], tiny: Checkpoint, tmp_path: Path, runs: list[str]
) -> None:
    cache, notes = place(tmp_path), Notes()
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        assert ask(tiny, cache, notes).logits(0, 0, 3).shape == (3, 2048)
    assert runs == ["float32"] * 2
    assert [line.startswith("the reference is not cached: ") for line in notes.lines] == [True, True]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    notes = Notes()
    assert ask(tiny, tmp_path, notes).logits(0, 0, 3).shape == (3, 2048)
    assert [line.rsplit(": ", 1)[1] for line in notes.lines] == ["No space left on device"]
    assert entries(tmp_path) == []


def test_an_index_that_cannot_be_written(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_cache, "_sha256", full)
    assert ask(tiny, tmp_path).logits(0, 0, 3).shape == (3, 2048)
    assert entries(tmp_path) == []


def test_what_is_too_large_is_not_kept(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "MOST_BYTES", 1000)
    assert ask(tiny, tmp_path).logits(0, 0, 3).shape == (3, 2048)
    assert entries(tmp_path) == []


def test_the_least_recently_used_entry_goes(
    made: tuple[Path, Reference], tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[str]
) -> None:
    entry = copied(made, tmp_path)
    size = sum(path.stat().st_size for path in entry.iterdir())
    other = ask(tiny, tmp_path, files=FILES | {"x": "3" * 64})
    assert len(entries(tmp_path)) == 2
    for age, path in enumerate([entry, *(p for p in entries(tmp_path) if p != entry)]):
        os.utime(path / "index.json", (1000 - age, 1000 - age))
    ask(tiny, tmp_path, files=FILES | {"x": "3" * 64})  # used now, so the other is the older one
    monkeypatch.setattr(reference_cache, "MOST_BYTES", 2 * size + 100)
    abandoned, busy = (tmp_path / "reference" / f".partial-{digit * 16}" for digit in "ab")
    for folder in (abandoned, busy):
        folder.mkdir()
        (folder / "hidden.npy").write_text("")
    os.utime(abandoned, (time.time() - 8 * 86400,) * 2)
    stranger = tmp_path / "reference" / "notes.txt"
    stranger.write_text("mine")
    ask(tiny, tmp_path, files=FILES | {"y": "4" * 64})
    keys = {cache_key(FILES | {name: digit * 64}, PROBES, "float32") for name, digit in (("x", "3"), ("y", "4"))}
    assert {path.name for path in entries(tmp_path)} == keys | {busy.name, stranger.name}
    assert runs == ["float32"] * 2
    assert_the_same(ask(tiny, tmp_path, files=FILES | {"x": "3" * 64}), other)


def test_an_interrupted_run_leaves_nothing(tiny: Checkpoint, tmp_path: Path) -> None:
    class Interrupting(SilentProgress):
        @contextmanager
        def task(self, label: str, total: int | None = None, unit: str = "steps") -> Iterator[Task]:
            yield SimpleNamespace(advance=self.interrupt)

        def interrupt(self, amount: int) -> None:
            assert [path.name[:9] for path in entries(tmp_path)] == [".partial-"]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reference_for(tiny, FILES, PROBES, "float32", cache=tmp_path, progress=Interrupting())
    assert entries(tmp_path) == []


def test_two_at_a_time(
    made: tuple[Path, Reference], tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends first: its entry stays, and this run is as good."""
    run = reference_cache.run_reference
    (tmp_path / "reference").mkdir(mode=0o700)

    def overtaken(*args: object, **kwargs: object) -> Reference:
        found = run(*args, **kwargs)
        [partial] = entries(tmp_path)
        (tmp_path / "reference").rename(tmp_path / "aside")
        copied(made, tmp_path)
        partial.with_name(partial.name).parent.mkdir(exist_ok=True)
        (tmp_path / "aside" / partial.name).rename(partial)
        return found

    monkeypatch.setattr(reference_cache, "run_reference", overtaken)
    assert_the_same(ask(tiny, tmp_path), made[1])
    assert [path.name for path in entries(tmp_path)] == [cache_key(FILES, PROBES, "float32")]


@pytest.mark.parametrize("ids", [(), (2048,), (-1,), (1 << 70,)])
def test_tokens_that_cannot_be_run_are_no_key(tiny: Checkpoint, tmp_path: Path, ids: tuple[int, ...]) -> None:
    with pytest.raises(PromptError):
        ask(tiny, tmp_path, probes=(Probe("bad", ids),))
    assert list(tmp_path.iterdir()) == []


def test_the_floor_s_run_is_kept_as_well(tiny: Checkpoint, tmp_path: Path, runs: list[str]) -> None:
    reference = ask(tiny, tmp_path)
    first, second = (run_floor(tiny, reference, "bfloat16", files=FILES, cache=tmp_path) for _ in range(2))
    assert runs == ["float32", "bfloat16"]
    assert first.record == second.record
    assert first.record.metrics.positions == 4
    np.testing.assert_array_equal(first.rounded.logits(0, 0, 3), second.rounded.logits(0, 0, 3))
    np.testing.assert_array_equal(first.rounded.router_logits(3, 0), second.rounded.router_logits(3, 0))
    assert second.rounded.dtype == "bfloat16"


HOME = Path("/home/somebody")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"GPTOSS_EXPORT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"GPTOSS_EXPORT_CACHE": "", "XDG_CACHE_HOME": "/b"}, Path("/b/gptoss-export")),
        ({"XDG_CACHE_HOME": "b"}, HOME / ".cache" / "gptoss-export"),
        ({}, HOME / ".cache" / "gptoss-export"),
    ],
)
def test_where_the_cache_is(given: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTOSS_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(HOME))
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert default_cache() == expected


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("GPTOSS_EXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_cache() is None


@pytest.mark.parametrize("absent", FILES)
def test_without_the_hash_of_every_file_nothing_is_cached(absent: str, tiny: Checkpoint, tmp_path: Path) -> None:
    files = {name: digest for name, digest in FILES.items() if name != absent}
    assert ask(tiny, tmp_path, files=files).trace.hidden(0, 0).shape == (len(PROBES[0].ids), tiny.config.hidden_size)
    assert not list(tmp_path.iterdir())

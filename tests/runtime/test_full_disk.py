"""Disks that are full, read-only or gone, files that vanish, memory that ends: one error each, and nothing left behind.

Real writes on a real file system of a few megabytes, which takes the right to mount one.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest

from gptoss_export.engines.tensorrt.build import build_engine
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter import cli, pipeline, shared_stages
from gptoss_export.exporter.checkpoint import open as open_module
from gptoss_export.exporter.errors import DiskSpaceError, OutOfMemoryError

MIB = 1 << 20


@contextmanager
def mounted(folder: Path, nbytes: int) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "none", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this machine has no mount")
    if done.returncode:
        pytest.skip(f"this user cannot mount a file system: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that an export of the small checkpoint just fits on."""
    with mounted(tmp_path / "disk", 48 * MIB) as folder:
        yield folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One that its weights do not fit on."""
    with mounted(tmp_path / "small", 5 * MIB) as folder:
        yield folder


def run(model: Path, out: Path, *more: str) -> int:
    return cli.main(["--target", "ort-cpu", "--model", str(model), "--output", str(out), "--quiet", *more])


def fill(disk: Path) -> None:
    """Leaves not a single block."""
    with (disk / "filler").open("wb") as f:
        try:
            while True:
                os.write(f.fileno(), bytes(4096))
        except OSError:
            return


def before(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, act: Callable[[], object]) -> None:
    """Has something happen just before a stage begins."""
    stage = getattr(module, name)

    def late(*args: Any, **named: Any) -> Any:
        act()
        return stage(*args, **named)

    monkeypatch.setattr(module, name, late)


def says(capsys: pytest.CaptureFixture[str]) -> str:
    """What the error says; it is two lines, and no traceback."""
    lines = capsys.readouterr().err.strip().splitlines()
    first, second = lines[-2:]
    assert first.startswith("error: ") and second.startswith("  next: "), lines
    return first


def test_a_disk_too_small_for_the_weights_is_refused_with_figures(
    tiny_dir: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_dir, small_disk / "release") == 45
    error = says(capsys)
    assert f"are needed below {small_disk} for the artifacts" in error and "5.2 MB are free" in error
    assert list(small_disk.iterdir()) == []


def test_space_for_the_weights_is_taken_before_the_first_byte(
    tiny_dir: Path,
    small_disk: Path,
    known_graph: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "readv", lambda *_: pytest.fail("a byte was read"))
    assert run(tiny_dir, small_disk / "a" / "release", "--ignore-preflight", "--parity", "off") == 45
    assert "no space left for model-0000" in says(capsys)
    assert list(small_disk.iterdir()) == []


STAGES = {
    "the graph": ("gptoss_export.engines.ort.build", "_write", "the model of ort-cpu"),
    "genai_config": ("gptoss_export.engines.ort.build", "write_genai_config", "the model of ort-cpu"),
    "the report": ("gptoss_export.validators.report", "write_report", "the parity report"),
    "provenance": ("gptoss_export.exporter.pipeline", "attest", "provenance.intoto.json"),
    "the manifest": ("gptoss_export.exporter.pipeline", "write_manifest", "manifest.json"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_fills_up(
    stage: str,
    tiny_dir: Path,
    disk: Path,
    known_graph: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, name, named = STAGES[stage]
    before(monkeypatch, importlib.import_module(module), name, lambda: fill(disk))
    assert run(tiny_dir, disk / "release", "--ignore-preflight") == 45
    error = says(capsys)
    assert "no space left" in error and named in error
    (disk / "filler").unlink()
    assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_under_an_engine(disk: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float16[2,4] x) => (float16[2,4] y) { y = Add(x, x) }'
    )
    onnx.save(model, tmp_path / "model.onnx")
    (disk / "release").mkdir()
    fill(disk)
    with pytest.raises(DiskSpaceError, match="no space left on the device for the engine"):
        build_engine(tmp_path / "model.onnx", disk / "release" / "engine.plan", EngineOptions())
    assert list((disk / "release").iterdir()) == []


def test_a_read_only_disk(tiny_dir: Path, disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert run(tiny_dir, disk / "release") == 47
    assert "Read-only file system" in says(capsys)


def test_a_folder_of_somebody_else(tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o555)
    root = os.geteuid() == 0
    for path in (folder, *folder.parents) if root else ():
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o555 if path == folder else 0o755)
    if root:
        os.seteuid(65534)
    try:
        code = run(tiny_dir, folder / "release")
    finally:
        if root:
            os.seteuid(0)
    assert code == 47
    assert "Permission denied" in says(capsys)
    assert list(folder.iterdir()) == []


def copied(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


def replace(file: Path, data: bytes) -> None:
    other = file.with_name("other")
    other.write_bytes(data)
    other.replace(file)


FAULTS: dict[str, tuple[Callable[[Path], object], set[int], str]] = {
    "deleted": (lambda file: file.unlink(), {12, 16, 44}, "model-00001-of-00002.safetensors"),
    "cut short": (lambda file: os.truncate(file, 1000), {24, 44}, ""),
    "replaced": (lambda file: replace(file, file.read_bytes()[::-1]), {15, 44}, ""),
}


@pytest.mark.parametrize("moment", ["before it is copied", "before its scales are read", "after the plan"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_that_changes_under_the_export(
    fault: str,
    moment: str,
    tiny_dir: Path,
    tmp_path: Path,
    known_graph: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, (act, codes, text) = copied(tiny_dir, tmp_path), FAULTS[fault]
    where: dict[str, tuple[Any, str]] = {
        "before it is copied": (shared_stages, "place_weights"),
        "before its scales are read": (open_module, "check_scales"),
        "after the plan": (pipeline, "export_key"),
    }
    done = []

    def once() -> None:
        if not done:
            done.append(act(model / "model-00001-of-00002.safetensors"))

    before(monkeypatch, *where[moment], once)
    code = run(model, tmp_path / "out" / "release", "--parity", "off")
    if moment == "before its scales are read" and code == 0:  # the copy was quicker, and is what it was
        return
    assert code in codes
    assert text in says(capsys)
    assert not (tmp_path / "out").exists()


LIMITED = """
import resource, sys
from gptoss_export.exporter import cli
from gptoss_export.exporter.graph import build

def hungry(config, layout):
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return bytearray(1 << 40)

build.build_graph = hungry
sys.exit(cli.main(sys.argv[1:]))
"""


def test_memory_that_is_limited(tiny_dir: Path, tmp_path: Path) -> None:
    """First by the plan, then by a stage that takes more than any plan said."""
    args = ["--target", "ort-cpu", "--model", str(tiny_dir), "--output", str(tmp_path / "release"), "--quiet"]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29));"
    command = [
        sys.executable,
        "-c",
        f"{limit} import sys; from gptoss_export.exporter import cli; sys.exit(cli.main())",
    ]
    planned = subprocess.run([*command, *args], capture_output=True, text=True, check=False)
    assert planned.returncode == 61
    assert "weights and graph takes about 629.1 MB of memory, and the process's limit on data" in planned.stderr
    later = subprocess.run([sys.executable, "-c", LIMITED, *args], capture_output=True, text=True, check=False)
    assert later.returncode == 61, later.stderr
    assert "memory was not enough: this process had up to" in later.stderr and "(ulimit -v) leaves" in later.stderr
    assert "Traceback" not in later.stderr
    assert list(tmp_path.iterdir()) == []


GROUPS = Path("/sys/fs/cgroup/memory")

HUNGRY_CHILD = """
import json, os, sys
request = json.load(sys.stdin)
open(request["engine"], "wb").write(b"half an engine")
group = os.environ["TMPDIR"]
with open(os.path.join(group, "cgroup.procs"), "w") as f:
    f.write(str(os.getpid()))
taken = [bytes(range(256)) * (1 << 16) for _ in range(64)]
"""


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A group below this process's own that may have 64 MiB."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    version_1 = next((line.split(":", 2)[2] for line in lines if line.split(":")[1] == "memory"), None)
    if version_1 is None:
        pytest.skip("this machine has no control groups of version 1")
    folder = GROUPS / version_1.lstrip("/") / "gptoss-export-test"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(64 * MIB))
    except OSError as error:
        pytest.skip(f"this user cannot make a control group: {error}")
    try:
        yield folder
    finally:
        folder.rmdir()


def test_a_child_that_the_kernel_kills_for_its_memory(
    control_group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from gptoss_export.engines.tensorrt import build as builds

    (tmp_path / "some_child.py").write_text(HUNGRY_CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(control_group))
    monkeypatch.setattr(builds, "CHILD", "some_child")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(
        OutOfMemoryError, match=r"was killed, .*for its memory; it takes about 6\.4 GB; .* are free now"
    ):
        build_engine(tmp_path / "model.onnx", work / "engine.plan", EngineOptions(), ram_bytes=6_400_000_000)
    assert list(work.iterdir()) == []

"""Real exports, killed at the end of every stage and at random moments, then run again: nothing is lost, bytes agree.

A driver traces the graph once and forks a child for each run, so that a run takes seconds.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from gptoss_export.exporter import interrupt
from gptoss_export.exporter.artifact import read_manifest
from gptoss_export.exporter.weights import FileRecord, hash_files

pytestmark = pytest.mark.serial

DRIVER = """
import json, os, signal, sys
os.environ |= {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "1700000000"}
import torch
torch.set_num_threads(1)
from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.output import journal, staging, swap
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.graph import build

signal.signal(signal.SIGINT, signal.default_int_handler)
checkpoint = open_checkpoint(__import__("pathlib").Path(sys.argv[1]))
graph = build.build_graph(checkpoint.config, checkpoint.layout)
ran = []
build.build_graph = lambda *_: ran.append("graph") or graph

def die_after(call, when):
    def wrapped(*args, **options):
        result = call(*args, **options)
        if when(*args):
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

def child(request):
    os.dup2(os.dup2(os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1), 2)
    stage = request.get("stage")
    if stage == "swap":
        staging.swap = die_after(staging.swap, lambda *_: True)
    elif stage == "clean":
        staging.clear = die_after(staging.clear, lambda home: not (home / "journal.json").exists())
    elif stage is not None:
        journal.Journal.finish = die_after(journal.Journal.finish, lambda self, name, *_: name == stage)
    code = cli.main(request["args"])
    print("ran:", *ran, flush=True)
    os._exit(code)

print("ready", flush=True)
for line in sys.stdin:
    if (pid := os.fork()) == 0:
        child(json.loads(line))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

STAGES = (
    "weights config.json",
    "weights model-00001-of-00002.safetensors",
    "side files",
    "build ort-cpu",
    "measure ort-cpu",
    "seal",
    "swap",
)


@dataclass
class Driver:
    """Runs the command in forks of a process that has the graph."""

    process: subprocess.Popen[str]
    arguments: list[str]
    log: Path

    def run(self, out: Path, *, stage: str | None = None, number: int = 0, after: float = 0.0) -> int:
        """Exit code of one export, negative for a signal.

        stage: to be killed at its end. number: of a signal that is sent `after` seconds.
        """
        request = {"args": [*self.arguments, "--output", str(out)], "stage": stage, "log": str(self.log)}
        stdin, stdout = self.pipes
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        pid = int(stdout.readline())
        if number:
            time.sleep(after)
            # Nobody else waits for it, so the number is still its own.
            subprocess.run(["kill", f"-{number}", str(pid)], check=False, capture_output=True)
        return int(stdout.readline())

    @property
    def pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout


@pytest.fixture(scope="module")
def driver(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    arguments = ["--target", "ort-cpu", "--model", str(tiny_dir)]
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", DRIVER, str(tiny_dir)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        made = Driver(process, arguments, tmp_path_factory.mktemp("log") / "stderr")
        assert made.pipes[1].readline() == "ready\n"
        yield made
        made.pipes[0].close()


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an export gives that nobody kills."""
    out = tmp_path_factory.mktemp("whole") / "release"
    assert driver.run(out) == 0, driver.log.read_text()
    return out


def contents(folder: Path) -> dict[str, FileRecord]:
    return hash_files({path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()})


def stages(out: Path) -> list[str]:
    journal: dict[str, Any] = json.loads((out.parent / f".{out.name}.partial" / "journal.json").read_text())
    return [stage["name"] for stage in journal["stages"]]


def same(out: Path, whole: Path) -> bool:
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert read_manifest(out).content_sha256 == read_manifest(whole).content_sha256
    return contents(out) == contents(whole)


def test_killed_after_every_stage_in_turn(driver: Driver, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "release"
    for stage in STAGES:
        assert driver.run(out, stage=stage) == -signal.SIGKILL, (stage, driver.log.read_text())
        assert stages(out)[-1] == ("seal" if stage == "swap" else stage)
        assert out.exists() == (stage == "swap")
    assert driver.run(out) == 0, driver.log.read_text()
    assert "ran:\n" in driver.log.read_text()
    assert same(out, whole)
    assert driver.run(out) == 40


@pytest.mark.parametrize("stage", ["measure ort-cpu", "swap"])
def test_an_older_artifact_stands_until_the_new_one_does(
    stage: str, driver: Driver, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "release"
    assert driver.run(out) == 0
    old = (out / "manifest.json").stat().st_ino
    driver.arguments.append("--force")
    try:
        assert driver.run(out, stage=stage) == -signal.SIGKILL
        assert ((out / "manifest.json").stat().st_ino == old) == (stage != "swap")
        assert contents(out) == contents(whole)
        assert driver.run(out) == 0, driver.log.read_text()
    finally:
        driver.arguments.remove("--force")
    assert same(out, whole)


def test_other_options_begin_anew(driver: Driver, tmp_path: Path) -> None:
    out = tmp_path / "release"
    assert driver.run(out, stage="build ort-cpu") == -signal.SIGKILL
    driver.arguments += ["--parity", "off"]
    try:
        assert driver.run(out) == 0
    finally:
        del driver.arguments[-2:]
    assert "ran: graph" in driver.log.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["release"]


def test_killed_at_random_moments(driver: Driver, whole: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "release", random.Random(6)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT] * 3
    for number in numbers:
        begun = time.monotonic()
        after = draw.uniform(0.2, 3.0)
        code = driver.run(out, number=number, after=after)
        if code in (0, 40):
            break
        assert code in ({-signal.SIGKILL} if number == signal.SIGKILL else {128 + number}), driver.log.read_text()
        if number != signal.SIGKILL:
            assert time.monotonic() - begun < after + 2
            # Nothing, as far as it goes: killed before it had opened what the run before it had left.
            said = driver.log.read_text()
            assert (interrupt.RESUME in said) != (interrupt.NOTHING in said)
            assert interrupt.NOTHING in said or stages(out)
        assert not out.exists()
    assert driver.run(out) in (0, 40), driver.log.read_text()
    assert same(out, whole)


def test_two_runs_on_one_output(driver: Driver, tiny_dir: Path, tmp_path: Path) -> None:
    from gptoss_export.exporter.output.staging import in_use, journaled

    out = tmp_path / "release"
    with journaled(out, "another run"):
        assert driver.run(out) == 48
        assert "is being written by process" in driver.log.read_text()
    assert driver.run(out) == 0
    with in_use(out):
        driver.arguments.append("--force")
        assert driver.run(out) == 48
        driver.arguments.remove("--force")
    assert [path.name for path in tmp_path.iterdir()] == ["release"]

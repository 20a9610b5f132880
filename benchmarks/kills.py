"""Kills real exports at random moments, runs the same command again, and compares what comes out in the end.

    python benchmarks/kills.py --model tests/data/tiny-gpt-oss --kills 50

An export is started and sent SIGKILL, SIGINT or SIGTERM: half of them at any moment of the time that a whole one takes,
half within a fifth of a second after a line of its progress, since one stage takes most of the time. The same command
follows, is killed in turn, and so on until one ends by itself. Its folder has to be, file by file, that of an export
that nobody killed; SOURCE_DATE_EPOCH fixes the time stamps. Engines of TensorRT are not the same bytes twice: with them
the files have to have the same names, and `gptoss-export verify` to find them whole. No process may outlive an export.
Prints a table in Markdown; exits 1 when something was lost.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KNOWN_GRAPH = """
import pickle, sys
from pathlib import Path
from gptoss_export.exporter.cli import main
from gptoss_export.exporter.graph import build
build.build_graph = lambda *_: pickle.loads(Path(sys.argv[1]).read_bytes())
sys.exit(main(sys.argv[2:]))
"""
MAKE_GRAPH = """
import pickle, sys
from pathlib import Path
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.graph.build import build_graph
sys.setrecursionlimit(100_000)
checkpoint = open_checkpoint(Path(sys.argv[1]))
Path(sys.argv[2]).write_bytes(pickle.dumps(build_graph(checkpoint.config, checkpoint.layout)))
"""
CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143}
PARTIAL = ".release.partial"
IMPORT_SECONDS = 0.5
"""Before the command line is read, a signal does what it does to every Python program."""
AFTER_LINE_SECONDS = 0.2
DONE = re.compile(r"^(.+): done in ", re.MULTILINE)


@dataclass
class Tally:
    """kills: by the stage that ran. seconds: from a signal to the end of the process, SIGKILL left out.

    names: of the files of a whole artifact. resumed: kills after which finished work was there.
    """

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    names: frozenset[str] = frozenset()
    resumed: int = 0
    finished: int = 0
    faults: list[str] = field(default_factory=list)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000"}
    with log.open("wb") as stderr:
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def orphans(group: int) -> list[str]:
    """Names of processes of the group that are there a second after its leader has ended."""
    deadline = time.monotonic() + 1
    while left := [name for name, of in processes() if of == group]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def processes() -> Iterator[tuple[str, int]]:
    """Name and process group of all that run; zombies have ended."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, _, rest = (entry / "stat").read_text().partition(") ")
            except OSError:
                continue
            state, _, group = rest.split()[:3]
            if state != "Z":
                yield name.partition("(")[2], int(group)


def stage_of(log: Path) -> str:
    """What ran when the process ended, by the last line that it wrote before."""
    text = log.read_text(errors="replace")
    if not text:
        return "start"
    done = DONE.findall(text)
    return f"after {done[-1]}" if done else "weights, scales, graph"


def wait(child: subprocess.Popen[bytes], log: Path, lines: int, seconds: float) -> bool:
    """Waits for so many lines and then so long; whether the process still runs."""
    while child.poll() is None and log.read_bytes().count(b"\n") < lines:
        time.sleep(0.01)
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def moment(draw: random.Random, lines: int, whole: float) -> tuple[int, float]:
    """When to kill: after so many lines of progress, and so many seconds after that."""
    if draw.random() < 0.5:
        return 0, draw.uniform(IMPORT_SECONDS, whole)
    return draw.randint(1, lines), draw.uniform(0, AFTER_LINE_SECONDS)


def kill_once(
    command: list[str], out: Path, log: Path, when: tuple[int, float], number: signal.Signals, tally: Tally
) -> bool:
    """One attempt; whether it was cut off."""
    child = start(command, log)
    if wait(child, log, *when):
        child.send_signal(number)
        sent = time.monotonic()
        code = child.wait(timeout=60)
        took = time.monotonic() - sent
        if code == 0 or ((out / "manifest.json").exists() and not (out.parent / PARTIAL).exists()):
            return False  # it was through before the signal came to it
        if number != signal.SIGKILL:
            tally.seconds.append(took)
        tally.kills[stage_of(log), number.name] += 1
        if left := orphans(child.pid):
            tally.faults.append(f"{number.name} left processes running: {', '.join(left)}")
        written = log.read_text(errors="replace")
        if code not in (CODES[number], -number):
            tally.faults.append(f"{number.name} gave exit code {code}: {written[-300:]}")
        if "Traceback" in written:
            tally.faults.append(f"{number.name} printed a traceback: {written[-3000:]}")
        if (out / "manifest.json").exists() and hashes(out).keys() != tally.names:
            tally.faults.append("a manifest stood in a folder that was not complete")
        return True
    if child.returncode != 0:
        tally.faults.append(f"exit code {child.returncode}: {log.read_text(errors='replace')[-300:]}")
    return False


def differences(out: Path, expected: dict[str, str], *, exact: bool) -> list[str]:
    """Of the export that came to its end in `out` from the one that nobody killed."""
    found = hashes(out)
    names = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if not exact:
        names = sorted(found.keys() ^ expected.keys())
        verify = [sys.executable, "-m", "gptoss_export.exporter", "verify", str(out)]
        if (result := subprocess.run(verify, capture_output=True, text=True, check=False)).returncode != 0:
            return [f"verify: {result.stderr[-300:]}"]
    return [f"other files than without a kill: {', '.join(names)}"] if names else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--parity", choices=("off", "quick"), default="quick")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after the export that is under way then")
    parser.add_argument("--known-graph", action="store_true", help="trace once, for more kills of what comes after")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, tally = random.Random(options.seed), Tally()
    exact = not options.target.startswith("trt-")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        log, out = root / "log", root / "work" / "release"
        out.parent.mkdir()
        command = [sys.executable, "-m", "gptoss_export.exporter"]
        if options.known_graph:
            graph = str(root / "graph")
            subprocess.run([sys.executable, "-c", MAKE_GRAPH, str(options.model), graph], check=True)
            command = [sys.executable, "-c", KNOWN_GRAPH, graph]
        command += ["--target", options.target, "--parity", options.parity, "--allow-unexecuted"]
        command += ["--model", str(options.model.resolve()), "--output"]
        started = time.monotonic()
        if start([*command, str(root / "whole")], log).wait() != 0:
            print(log.read_text(), file=sys.stderr)
            return 1
        lines = log.read_bytes().count(b"\n")
        whole, expected = time.monotonic() - started, hashes(root / "whole")
        tally.names = frozenset(expected)
        print(f"a whole export takes {whole:.1f} s", file=sys.stderr)
        while sum(tally.kills.values()) < options.kills and time.monotonic() - started < 60 * options.minutes:
            attempt = [*command, str(out)]
            while kill_once(attempt, out, log, moment(draw, lines, whole), draw.choice(list(CODES)), tally):
                tally.resumed += (out.parent / PARTIAL / "journal.json").exists()
            tally.finished += 1
            tally.faults += differences(out, expected, exact=exact)
            if left := [path.name for path in out.parent.iterdir() if path != out]:
                tally.faults.append(f"left behind: {', '.join(left)}")
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
            print(f"{sum(tally.kills.values())} kills, {tally.finished} exports ended", file=sys.stderr)
    print_table(tally, whole, "every file as without a kill" if exact else "verified, with the same files")
    return 1 if tally.faults else 0


def print_table(tally: Tally, whole: float, outcome: str) -> None:
    names = [number.name for number in CODES]
    print(f"| last line before the kill | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for stage in sorted({stage for stage, _ in tally.kills}):
        print(f"| {stage} | {' | '.join(str(tally.kills[stage, name]) for name in names)} |")
    print(f"| all | {' | '.join(str(sum(n for (_, k), n in tally.kills.items() if k == name)) for name in names)} |\n")
    slowest = max(tally.seconds, default=0.0)
    print(f"{sum(tally.kills.values())} kills at random moments of exports that take {whole:.1f} s; after")
    print(f"{tally.resumed} of them work was there to go on with. {tally.finished} exports came to their end,")
    print(f"{outcome}. SIGINT and SIGTERM ended the process within {slowest:.2f} s ({len(tally.seconds)} times).")
    print(f"Faults: {len(tally.faults)}")
    for fault in tally.faults:
        print(f"- {fault}")


if __name__ == "__main__":
    sys.exit(main())

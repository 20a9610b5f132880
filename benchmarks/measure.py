"""Runs a command and says what it took; writes the machine's description for RESULTS.md."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, peak resident set of the largest process in bytes, and the exit code."""

    seconds: float
    peak_rss: int
    exit_code: int


def run(command: Sequence[str | Path], *, expect: int = 0) -> Cost:
    """Runs `command` with its output on stderr. Exits when it ends with another code than `expect`."""
    words = [str(word) for word in command]
    print("$", shlex.join(words), file=sys.stderr, flush=True)
    started = time.perf_counter()
    process = subprocess.Popen(words, stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    cost = Cost(time.perf_counter() - started, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
    if cost.exit_code != expect:
        sys.exit(f"exit code {cost.exit_code}: {shlex.join(words)}")
    return cost


def cold() -> bool:
    """Empties the page cache, so that every run reads from the disk. False where the system does not allow it."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def machine() -> str:
    """One line: processor, cores, memory, system."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"

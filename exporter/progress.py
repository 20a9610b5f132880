"""How far the work is: bars on a terminal, plain lines in a log, nothing when asked to be quiet.

    with progress.task("weights", total=nbytes, unit="bytes") as task:
        task.advance(len(chunk))

Everything goes to stderr, because stdout carries only results. Tasks may run in several threads at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID

Unit = Literal["bytes", "steps"]

_LINE_EVERY_SECONDS = 10.0


class Task(Protocol):
    """A piece of work under way."""

    def advance(self, amount: int) -> None:
        """Says that `amount` more bytes or steps are done."""
        ...


class Progress(Protocol):
    """Where the stages of the pipeline report to."""

    def task(self, label: str, total: int | None = None, unit: Unit = "steps") -> AbstractContextManager[Task]:
        """A task named `label` that ends with the block; `total` in `unit`, None when it cannot be known."""
        ...

    def note(self, line: str) -> None:
        """A line worth keeping in the log."""
        ...


def format_bytes(nbytes: int) -> str:
    """Decimal units, as disks and the checkpoint's published sizes use them: `13.8 GB`."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def format_seconds(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


class _SilentTask:
    def advance(self, amount: int) -> None:
        """Nobody listens."""


class SilentProgress:
    """Says nothing."""

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Task]:
        yield _SilentTask()

    def note(self, line: str) -> None:
        """Nobody listens."""


class _PlainTask:
    def __init__(self, progress: PlainProgress, label: str, total: int | None, unit: Unit) -> None:
        self._progress, self._label, self._total, self._unit = progress, label, total, unit
        self._done = 0
        self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= _LINE_EVERY_SECONDS:
            self._said = now
            self._progress.note(f"{self._label}: {self.describe()}")

    def describe(self) -> str:
        show = format_bytes if self._unit == "bytes" else str
        return show(self._done) if self._total is None else f"{show(self._done)} of {show(self._total)}"


class PlainProgress:
    """One line when a task ends, and one every ten seconds while it lasts."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Task]:
        started = time.monotonic()
        task = _PlainTask(self, label, total, unit)
        yield task
        amount = f" ({task.describe()})" if total is not None else ""
        self.note(f"{label}: done in {format_seconds(time.monotonic() - started)}{amount}")

    def note(self, line: str) -> None:
        with self._lock:
            print(line, file=self._stream or sys.stderr, flush=True)


class _RichTask:
    def __init__(self, bars: RichBars, task_id: TaskID) -> None:
        self._bars, self._id = bars, task_id

    def advance(self, amount: int) -> None:
        self._bars.advance(self._id, amount)


class RichProgress:
    """Bars that are drawn while any task runs; a finished task leaves one line."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichBars

        self._console = Console(stderr=True)
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def task(self, label: str, total: int | None = None, unit: Unit = "steps") -> Iterator[Task]:
        started = time.monotonic()
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._bars.start()
        task_id = self._bars.add_task(label, total=total)
        try:
            yield _RichTask(self._bars, task_id)
            amount = f" ({format_bytes(total)})" if total is not None and unit == "bytes" else ""
            self.note(f"{label}: done in {format_seconds(time.monotonic() - started)}{amount}")
        finally:
            self._bars.remove_task(task_id)
            with self._lock:
                self._running -= 1
                if self._running == 0:
                    self._bars.stop()

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)


def choose_progress(quiet: bool) -> Progress:
    """Bars on a terminal's stderr, lines elsewhere, silence when `quiet`."""
    if quiet:
        return SilentProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()

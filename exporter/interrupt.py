"""Ctrl-C and SIGTERM end the program within two seconds, whatever it does at that moment.

    with prompt_end():
        ...                     # KeyboardInterrupt or Terminated is raised in it, and cleans up on its way out

Python raises nothing while the main thread is inside of a library's code, which may last for minutes. So a thread
waits for the signal as well (signal.set_wakeup_fd), and when the block has not ended in time, it ends the process: the
journal of an export is complete at every moment.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

PATIENCE_SECONDS = 1.2
RESUME = "run the same command again to go on"
NOTHING = "this run left nothing behind"

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_STAGING = "gptoss_export.exporter.output.staging"
_SHOW_CURSOR = "\x1b[?25h"


_received: list[signal.Signals] = []


class Terminated(BaseException):
    """SIGTERM, on its way up through the cleanups."""


def terminate(signum: int, frame: FrameType | None) -> None:
    """The handler of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleanup short
    _received.append(signal.SIGTERM)
    if not _is_importing(frame):
        raise Terminated


def interrupt(signum: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C."""
    _received.append(signal.SIGINT)
    if not _is_importing(frame):
        raise KeyboardInterrupt


def received() -> signal.Signals | None:
    """The signal that ends this run, if one has come: whatever is raised then may be its doing."""
    return _received[0] if _received else None


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being loaded. An exception in the middle of that makes some libraries crash, or is taken for
    a broken installation; there the process is ended by the other thread instead.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def say_goodbye(number: signal.Signals, error: BaseException) -> int:
    """The last line on stderr and the exit code of a run that a signal has ended."""
    staging = sys.modules.get(_STAGING)
    kept = staging is not None and staging.is_kept(error)
    print(f"{_WORDS[number]}: {RESUME if kept else NOTHING}", file=sys.stderr, flush=True)
    return 128 + number


@contextmanager
def prompt_end() -> Iterator[None]:
    """A block of the main thread that a signal ends in time, by an exception or with the process."""
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminate)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, in the background
        before[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    ended = threading.Event()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader, ended), name="signals", daemon=True)
    watcher.start()
    _received.clear()
    before_hook, sys.unraisablehook = sys.unraisablehook, _unraisable(sys.unraisablehook)
    try:
        yield
    except Exception as error:
        if (number := received()) is None:
            raise
        raise (Terminated if number == signal.SIGTERM else KeyboardInterrupt) from error
    finally:
        ended.set()
        sys.unraisablehook = before_hook
        _received.clear()
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(reader)


def _unraisable(other: Callable[[sys.UnraisableHookArgs], object]) -> Callable[[sys.UnraisableHookArgs], object]:
    """A hook that is silent about a signal's exception that a destructor or a callback has swallowed: the watcher ends
    the process then, and a user has no need of a traceback.
    """

    def hook(unraisable: sys.UnraisableHookArgs) -> object:
        is_ours = received() is not None and issubclass(unraisable.exc_type, Terminated | KeyboardInterrupt)
        return None if is_ours else other(unraisable)

    return hook


def _watch(reader: int, ended: threading.Event) -> None:
    while data := os.read(reader, 1):
        number = data[0]
        if number in _WORDS and not ended.wait(PATIENCE_SECONDS):
            _end(signal.Signals(number))


def _end(number: signal.Signals) -> NoReturn:
    """Ends the process from here; the main thread is busy and may hold any lock, that of stderr too."""
    staging = sys.modules.get(_STAGING)
    kept = staging is not None and staging.abandon()
    cursor = _SHOW_CURSOR if os.isatty(2) else ""
    line = f"{cursor}{_WORDS[number]}: {RESUME if kept else NOTHING}\n"
    os.write(2, line.encode("ascii"))
    os._exit(128 + number)

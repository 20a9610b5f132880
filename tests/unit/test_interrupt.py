"""Ctrl-C and SIGTERM: two seconds, the right exit code, and nothing lost that was finished."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptoss_export.exporter import interrupt
from gptoss_export.exporter.interrupt import prompt_end

SCRIPT = """
import hashlib, os, sys, threading, time
from pathlib import Path
from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.output.staging import journaled

def busy():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, where no exception is raised

def idle():
    time.sleep(60)

def deaf():
    while True:
        try:
            time.sleep(60)
        except BaseException:  # as in the callbacks of some libraries
            pass

def destructor():
    class Slow:
        def __del__(self):
            time.sleep(60)  # what is raised here is printed and lost
    Slow()
    time.sleep(60)

def importing():
    Path("slow.py").write_text("import time; time.sleep(60)")
    sys.path.insert(0, "")
    import slow

def library():
    try:
        time.sleep(60)
    except BaseException:
        raise ImportError("initialization failed")  # as pybind11 has it

def export(request, progress):
    with journaled(request.output, "key") as journal:
        (journal.root / "file").write_text("x")
        if sys.argv[3] == "finished":
            journal.finish("stage", journal.hash_new(journal.root))
        threading.Timer(0.2, lambda: os.write(1, b"x")).start()
        globals()[sys.argv[2]]()

pipeline.export = export
sys.exit(cli.main(["--target", "onnx", "--model", "m", "--output", sys.argv[1]]))
"""


@pytest.mark.serial
@pytest.mark.parametrize("finished", ["finished", "unfinished"])
@pytest.mark.parametrize("work", ["idle", "busy", "deaf", "destructor", "importing", "library"])
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_ends_the_program_in_two_seconds(
    number: signal.Signals,
    word: str,
    work: str,
    finished: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "release"), work, finished],
        cwd=tmp_path_factory.mktemp("current"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run in the background, Ctrl-C is ignored, and so it would be there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.read(1) == "x"
        sent = time.monotonic()
        child.send_signal(number)
        printed = child.communicate(timeout=20)[1]
        assert time.monotonic() - sent < 2
    assert child.returncode == 128 + number, printed
    assert "Traceback" not in printed
    kept = finished == "finished"
    assert printed.splitlines()[-1] == f"{word}: {interrupt.RESUME if kept else interrupt.NOTHING}"
    assert [path.name for path in tmp_path.iterdir()] == [".release.partial"][: int(kept)]


def test_what_was_there_before_is_there_again() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hook = sys.unraisablehook
    with pytest.raises(ValueError), prompt_end():
        assert signal.getsignal(signal.SIGTERM) is interrupt.terminate
        raise ValueError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert sys.unraisablehook is hook
    descriptor = signal.set_wakeup_fd(-1)
    assert descriptor == -1


def test_a_signal_that_ends_in_time_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(interrupt.Terminated), prompt_end():
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0.1)

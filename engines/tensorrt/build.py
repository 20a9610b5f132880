"""An ONNX file becomes a TensorRT engine, in a process of its own.

    result = build_engine(folder / "model.onnx", folder / "engine.plan", options, plugin_shape=shape, progress=progress)

The engine appears under its name when it is complete. Whatever happens to the other process, an abort in NVIDIA's
code, the kernel's out-of-memory killer, Ctrl-C, comes out as one error and leaves no file.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gptoss_export.engines.memory import machine_memory, oom_kills, rooms
from gptoss_export.engines.sandbox import child_environment
from gptoss_export.engines.tensorrt.flavor import Flavor, FlavorName, find_flavor
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter import errors
from gptoss_export.exporter.errors import EngineBuildError, GptossExportError, OutOfMemoryError
from gptoss_export.exporter.progress import Progress, SilentProgress, Task, Unit, format_bytes

if TYPE_CHECKING:
    from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

CHILD = "gptoss_export.engines.tensorrt.build_child"

MOST_BYTES = 1 << 40
"""Of an engine of which nothing more is known."""

_DRIVER = Path("/proc/driver/nvidia")

_LOG_LINES = 200
_LINE_BYTES = 4096
_MESSAGE = 400


@dataclass(frozen=True)
class BuildResult:
    """What was built. seconds: by phase, of `kernels`, `parse`, `build` and `write`. nbytes and sha256: of the engine.

    peak_rss: the building process's, in bytes. layers: of the network, plugin_layers those that are our kernels.
    kernel_bytes: size of the compiled kernels, which every plugin layer carries. log: TensorRT's warnings.
    """

    flavor: FlavorName
    version: str
    seconds: Mapping[str, float]
    nbytes: int
    sha256: str
    peak_rss: int
    layers: int
    plugin_layers: int
    kernel_bytes: int
    log: tuple[str, ...]


def build_engine(
    onnx: Path,
    engine: Path,
    options: EngineOptions,
    *,
    plugin_shape: MoEShape | None = None,
    ram_bytes: int | None = None,
    most_bytes: int = MOST_BYTES,
    progress: Progress | None = None,
) -> BuildResult:
    """Builds `engine` from the graph and external weights of `onnx`.

    plugin_shape: what the experts' kernels are compiled for; needed where options.plugin is set and the graph has
    experts. ram_bytes: what the build takes, for the message when it is not there. most_bytes: what no file that it
    writes may exceed. The process has no network and low limits, see `engines.sandbox`.

    Raises TargetUnavailableError where no TensorRT can build here, EngineBuildError where TensorRT refuses the graph
    or its process dies, OutOfMemoryError, DiskSpaceError.
    """
    flavor = find_flavor(options.flavor)
    partial = engine.with_name(f".{engine.name}.partial-{secrets.token_hex(4)}")
    request = {
        "parent": os.getpid(),
        "onnx": str(onnx.absolute()),
        "engine": str(partial.absolute()),
        "flavor": asdict(flavor),
        "options": asdict(options),
        "shape": asdict(plugin_shape) if plugin_shape is not None else None,
        "ram_bytes": ram_bytes,
        # What CUDA reserves on a host with a GPU is more than any limit on data that would help.
        "limits": {"file_bytes": most_bytes, "memory_bytes": None if _DRIVER.exists() else machine_memory()},
    }
    try:
        with flavor.library_path() as environment, _child(child_environment(environment)) as child:
            result = _follow(child, request, flavor, progress or SilentProgress())
        partial.replace(engine)
    finally:
        partial.unlink(missing_ok=True)
    return result


class _Log:
    """The end of what a process writes to stderr, whoever writes it there; read in a thread, so it never blocks."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.lines: deque[str] = deque(maxlen=_LOG_LINES)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with suppress(ValueError):  # closed while reading
            while line := self._stream.readline(_LINE_BYTES):
                if text := line.decode("utf-8", "replace").strip():
                    self.lines.append(text)

    def wait(self) -> None:
        self._thread.join(timeout=5)

    def reason(self) -> str:
        """The last errors if there are any, else the last line that is no warning."""
        marked = [line.removeprefix("[E] ") for line in self.lines if line.startswith(("[E] ", "[ERROR]"))]
        other = [line for line in self.lines if not line.startswith("[W] ")]
        return "; ".join(marked[-3:] or other[-1:])[-_MESSAGE:] or "it gave no reason"


@contextmanager
def _child(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The building process, which does not outlive the block."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-P", "-m", CHILD]  # -P: nothing is imported from the folder that the user is in
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


def _follow(child: subprocess.Popen[bytes], request: dict[str, Any], flavor: Flavor, progress: Progress) -> BuildResult:
    """Hands over the request and turns what comes back into progress, a result or an error."""
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    log, kills = _Log(child.stderr), oom_kills()
    with suppress(BrokenPipeError):  # it died at once: its log says why
        child.stdin.write(json.dumps(request).encode())
        child.stdin.close()
    last: dict[str, Any] = {}
    with ExitStack() as stack:
        task: Task | None = None
        for line in child.stdout:
            try:
                last = json.loads(line)
            except json.JSONDecodeError:  # it died while writing this line
                break
            if last["event"] == "phase":
                stack.close()
                unit: Unit = "bytes" if last["name"] == "write" else "steps"
                task = stack.enter_context(progress.task(f"engine: {last['name']}", unit=unit))
            elif last["event"] == "note":
                progress.note(last["text"])
            elif last["event"] == "written" and task is not None:
                task.advance(last["nbytes"])
    code = child.wait()
    log.wait()
    if last.get("event") == "error":
        raise _error(last)
    if code == -signal.SIGKILL:
        raise _killed(flavor, log, request["ram_bytes"], by_kernel=oom_kills() > kills)
    if last.get("event") != "result" or code != 0:
        raise _death(code, flavor, log)
    del last["event"]
    return BuildResult(**last, log=tuple(dict.fromkeys(log.lines)))


def _error(event: dict[str, Any]) -> GptossExportError:
    """The error that the child raised; it names only classes of exporter/errors.py."""
    kind: type[GptossExportError] = getattr(errors, event["class"])
    return kind(event["what"], event["next_step"])


def _killed(flavor: Flavor, log: _Log, ram_bytes: int | None, *, by_kernel: bool) -> OutOfMemoryError:
    who = "by the kernel for its memory" if by_kernel else "most likely for its memory"
    need = f"; it takes about {format_bytes(ram_bytes)}" if ram_bytes else ""
    left = min((room.nbytes for room in rooms() if not room.address_space), default=None)
    free = f"; {format_bytes(left)} are free now" if left is not None else ""
    return OutOfMemoryError(
        f"the process that builds with {flavor.title} was killed, {who}{need}{free}: {log.reason()}",
        "close other programs or use a machine with more memory; --engine-weights external needs least",
    )


def _death(code: int, flavor: Flavor, log: _Log) -> EngineBuildError:
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code} and no result"
    return EngineBuildError(
        f"the process that builds with {flavor.title} {how}: {log.reason()}",
        "report this with the output of --debug; another version or flavor of TensorRT may build",
    )

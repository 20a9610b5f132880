"""The process that builds one engine: `python -m gptoss_export.engines.tensorrt.build_child`, started by `build.py`.

TensorRT can abort, be killed for memory, or print past every logger; in here none of that harms anybody. Reads one
JSON request from stdin, writes JSON lines to stdout, the last of which is a result or an error, and everything that
anybody prints to stderr.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_export.engines.sandbox import Limits, confine
from gptoss_export.engines.tensorrt import plugin
from gptoss_export.engines.tensorrt.flavor import Flavor, gpu_problem
from gptoss_export.engines.tensorrt.network import (
    REFUSED,
    add_profiles,
    allow_decomposition,
    check_plugins,
    one_line,
    parse_network,
    set_compute_capabilities,
)
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import (
    DiskSpaceError,
    EngineBuildError,
    EngineMismatchError,
    GptossExportError,
    OutOfMemoryError,
    TargetUnavailableError,
)
from gptoss_export.exporter.progress import format_bytes

if TYPE_CHECKING:
    from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

Send = Callable[[dict[str, Any]], None]

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|bad_alloc", re.IGNORECASE)
_PIECE = 64 << 20
_LONGEST_REASON = 600
_PR_SET_PDEATHSIG = 1


class _Phases:
    """Says what the process is at, and keeps how long each part took."""

    def __init__(self, send: Send) -> None:
        self._send, self._name, self._since = send, "", 0.0
        self.seconds: dict[str, float] = {}

    def start(self, name: str) -> None:
        self.stop()
        self._name, self._since = name, time.monotonic()
        self._send({"event": "phase", "name": name})

    def stop(self) -> None:
        if self._name:
            self.seconds[self._name] = time.monotonic() - self._since
        self._name = ""


class _Log:
    """TensorRT's errors and warnings: all to stderr, the last errors kept for the message to the user."""

    def __init__(self, trt: Any) -> None:
        severity = trt.ILogger.Severity
        marks = {severity.INTERNAL_ERROR: "[E]", severity.ERROR: "[E]", severity.WARNING: "[W]"}
        errors: deque[str] = deque(maxlen=3)

        def write(logger: Any, level: Any, text: str) -> None:
            if (mark := marks.get(level)) and (line := one_line(text)):
                print(mark, line, file=sys.stderr, flush=True)
                if mark == "[E]":
                    errors.append(line)

        self._errors = errors
        self.logger = type("Logger", (trt.ILogger,), {"log": write, "__init__": trt.ILogger.__init__})()

    def last(self) -> str:
        return "; ".join(self._errors)[-_LONGEST_REASON:] or "it gave no reason"


class _Writer:
    """Takes the engine in pieces: file, hash, progress. Keeps its exceptions: TensorRT prints them and goes on."""

    def __init__(self, path: Path, phases: _Phases, send: Send) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb")
        self._phases, self._send = phases, send
        self._hash = hashlib.sha256()
        self._error: OSError | None = None
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """The number of bytes taken, or -1."""
        try:
            if self.nbytes == 0:
                self._phases.start("write")
            self._file.write(data)
            self._hash.update(data)
            self.nbytes += len(data)
            self._send({"event": "written", "nbytes": len(data)})
        except OSError as error:
            self._error = error
            return -1
        return len(data)

    def close(self) -> str:
        """Closes the file and returns its sha256. Raises the error that a piece met."""
        if self._error is not None:
            raise self._error
        self._file.close()
        return self._hash.hexdigest()


def build(
    onnx_path: Path, engine: Path, flavor: Flavor, options: EngineOptions, shape: MoEShape | None, send: Send
) -> dict[str, Any]:
    """Builds the engine into a new file and returns what `BuildResult` holds. Raises errors of exporter/errors.py."""
    phases = _Phases(send)
    experts = _count_experts(onnx_path)
    trt = flavor.load()
    if flavor.needs_gpu and (why := gpu_problem()):
        raise TargetUnavailableError(
            f"{flavor.title} builds for the GPU of the host that it runs on; here: {why}",
            "build where the engine will run, or choose the flavor rtx, which builds without a GPU",
        )
    log = _Log(trt)
    kernels, bundle = None, b""
    if options.plugin and experts:
        phases.start("kernels")
        bundle = _compile(shape, options)
        kernels = plugin.register(trt, bundle, log.logger)
    try:
        phases.start("parse")
        builder = trt.Builder(log.logger)
        network, parser = parse_network(trt, builder, onnx_path, options, flavor, log.last)
        check_plugins(network, experts if options.plugin else 0, shape)
        allow_decomposition(trt, network)
        phases.start("build")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        set_compute_capabilities(trt, config, options, flavor)
        add_profiles(builder, config, network, options)
        writer = _Writer(engine, phases, send)
        built = _serialize(trt, builder, network, config, writer)
        sha256 = writer.close()
        del parser
        if not built or not writer.nbytes:
            if _OUT_OF_MEMORY.search(reason := log.last()):
                raise MemoryError(reason)
            raise EngineBuildError(f"{flavor.title} does not build the graph: {reason}", REFUSED)
    finally:
        if kernels is not None:
            kernels.require_no_failures()  # it says more than TensorRT does, and TensorRT may not have noticed
    phases.stop()
    return {
        "flavor": flavor.name,
        "version": str(trt.__version__),
        "seconds": phases.seconds,
        "nbytes": writer.nbytes,
        "sha256": sha256,
        "layers": network.num_layers,
        "plugin_layers": experts if options.plugin else 0,
        "kernel_bytes": len(bundle),
        "peak_rss": _peak_rss(),
    }


def _count_experts(path: Path) -> int:
    """How many nodes of the graph have to become plugins, if any do."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # OSError, and types of protobuf
        raise EngineBuildError(f"{path} cannot be read as ONNX: {error}", "export again") from error
    return sum((node.domain, node.op_type) == (plugin.NAMESPACE, plugin.NAME) for node in graph.node)


def _compile(shape: MoEShape | None, options: EngineOptions) -> bytes:
    """The serialised kernels for all experts of a graph, for the GPUs that were chosen, else for all there are."""
    from gptoss_export.engines.tensorrt.kernels.aot import ARCHS, compile_bundle
    from gptoss_export.engines.tensorrt.kernels.driver import matching_arch

    if shape is None:
        raise EngineBuildError("the graph has experts, and nothing says for what shape their kernels are", REFUSED)
    archs = set()
    for name in options.compute_capabilities:
        major, minor = map(int, name.split("."))
        try:
            archs.add(matching_arch((major, minor), ARCHS))
        except EngineMismatchError as error:
            raise EngineBuildError(
                f"there are no kernels for GPUs of compute capability {name}",
                "leave it out, or build without the plugin",
            ) from error
    return compile_bundle(shape, tuple(sorted(archs)) or ARCHS).to_bytes()


def _serialize(trt: Any, builder: Any, network: Any, config: Any, writer: _Writer) -> bool:
    """Whether TensorRT says that it built the engine; the writer knows what came of it."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        members = {"__init__": trt.IStreamWriter.__init__, "write": lambda self, data: writer.write(data)}
        stream = type("Stream", (trt.IStreamWriter,), members)()
        return bool(builder.build_serialized_network_to_stream(network, config, stream))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return False
    data = memoryview(serialized)
    return all(writer.write(data[start : start + _PIECE]) >= 0 for start in range(0, len(data), _PIECE))


def _peak_rss() -> int:
    """Bytes, 0 where it cannot be known. Not getrusage's, which begins with the peak of the process before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _die_with(parent: int) -> None:
    """This process ends when its parent does, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _as_known(error: Exception, ram_bytes: int | None, limits: Limits) -> GptossExportError:
    if isinstance(error, GptossExportError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        need = f"about {format_bytes(ram_bytes)}" if ram_bytes else "more memory than there is"
        return OutOfMemoryError(
            f"building the engine takes {need}, and no more was to be had: {one_line(str(error)) or 'no memory'}",
            "close other programs or use a machine with more memory; --engine-weights external needs least",
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError("no space left on the device for the engine", "free space, or choose another --output")
    if number == errno.EFBIG:
        return EngineBuildError(
            f"the engine grew beyond {format_bytes(limits.file_bytes)}, which none of this checkpoint does", REFUSED
        )
    return EngineBuildError(f"the engine's build failed: {type(error).__name__}: {error}", REFUSED)


def main() -> int:
    """Serves one request."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    _die_with(request["parent"])
    limits = Limits(**request["limits"])

    def send(event: dict[str, Any]) -> None:
        channel.write(json.dumps(event) + "\n")
        channel.flush()

    for problem in confine(limits):
        send({"event": "note", "text": problem})
    try:
        shape = None
        if request["shape"] is not None:
            from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

            shape = MoEShape(**request["shape"])
        chosen = request["options"]
        options = EngineOptions(**chosen | {"compute_capabilities": tuple(chosen["compute_capabilities"])})
        result = build(
            Path(request["onnx"]), Path(request["engine"]), Flavor(**request["flavor"]), options, shape, send
        )
    except Exception as error:
        known = _as_known(error, request["ram_bytes"], limits)
        send({"event": "error", "class": type(known).__name__, "what": known.what, "next_step": known.next_step})
        return 1
    send({"event": "result"} | result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

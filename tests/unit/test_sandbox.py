"""Least power: engines built without network and with low limits, no pickle, no sockets, no library but our own."""

from __future__ import annotations

import ast
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackagePath, files
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines import sandbox
from gptoss_export.engines.ort import library
from gptoss_export.engines.sandbox import child_environment
from gptoss_export.engines.tensorrt import build as builds
from gptoss_export.engines.tensorrt.build import build_engine
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import EngineBuildError, IntegrityError
from gptoss_export.exporter.progress import SilentProgress

ROOT = Path(__file__).parents[2]
FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

CONFINED = """
import errno, json, os, resource, socket, subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
from gptoss_export.engines.sandbox import Limits, confine
problems = confine(Limits(file_bytes=1000, memory_bytes=1 << 30))

def tried(act):
    try:
        act()
    except (OSError, MemoryError) as error:
        return errno.errorcode[error.errno] if isinstance(error, OSError) and error.errno else type(error).__name__
    return "done"

def write():
    with open(sys.argv[1], "wb", buffering=0) as f:
        while f.write(bytes(700)):
            pass

def in_a_thread():
    result = []
    thread = threading.Thread(target=lambda: result.append(tried(socket.socket)))
    thread.start()
    thread.join()
    return result[0]

sockets = {name: tried(lambda: socket.socket(getattr(socket, name), socket.SOCK_DGRAM))
           for name in ("AF_INET", "AF_INET6", "AF_PACKET", "AF_VSOCK", "AF_UNIX")}
child = subprocess.run([sys.executable, "-c", "import socket; socket.socket()"], capture_output=True, text=True)
limits = {name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_CORE", "RLIMIT_NOFILE")}
print(json.dumps({
    "problems": problems, "sockets": sockets, "thread": in_a_thread(), "child": child.stderr[-40:], "limits": limits,
    "getaddrinfo": tried(lambda: socket.create_connection(("192.0.2.1", 80), 1)),
    "file": tried(write), "memory": tried(lambda: bytearray(2 << 30)),
}))
"""


@pytest.mark.skipif(not FILTERED, reason="the filter is for Linux on x86-64 and aarch64")
def test_a_confined_process_has_no_network_and_low_limits(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONFINED, tmp_path / "file"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["problems"] == []
    denied = dict.fromkeys(("AF_INET", "AF_INET6", "AF_PACKET", "AF_VSOCK"), "EACCES")
    assert found["sockets"] == denied | {"AF_UNIX": "done"}
    assert found["thread"] == found["getaddrinfo"] == "EACCES"
    assert "Permission denied" in found["child"]
    assert found["limits"]["RLIMIT_CORE"] == [0, 0]
    assert max(found["limits"]["RLIMIT_NOFILE"]) <= sandbox.OPEN_FILES
    assert (found["file"], found["memory"]) == ("EFBIG", "MemoryError")
    assert (tmp_path / "file").stat().st_size == 1000


def test_where_there_is_no_filter_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "sparc64")
    assert sandbox._no_network() == f"no filter for {sys.platform} on sparc64"


def test_the_environment_has_no_secrets() -> None:
    given = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "CUDA_VISIBLE_DEVICES": "0",
        "HF_TOKEN": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "https_proxy": "http://user:secret@proxy",
        "LD_PRELOAD": "/tmp/evil.so",
        "PYTHONSTARTUP": "/tmp/evil.py",
        "SSH_AUTH_SOCK": "/tmp/agent",
    }
    assert child_environment(given) == {"PATH": "/bin", "LC_ALL": "C", "CUDA_VISIBLE_DEVICES": "0"}


TELLING_CHILD = """
import json, os, socket, sys
sys.argv[1:] = []
from gptoss_export.engines.tensorrt import build_child

def build(*_):
    try:
        socket.socket()
        network = "network"
    except OSError as error:
        network = error.strerror
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    fds = sorted(os.readlink(link) for link in links if os.path.lexists(link))
    print(json.dumps({"network": network, "fds": fds, "names": sorted(os.environ)}), file=sys.stderr, flush=True)
    raise build_child.EngineBuildError("enough", "stop")

build_child.build = build
sys.exit(build_child.main())
"""


class Notes(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def telling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Starts the building process with another work to do, and returns what it wrote to stderr and noted."""
    pytest.importorskip("tensorrt_rtx")

    def start(source: str) -> tuple[dict[str, Any], list[str]]:
        (tmp_path / "telling_child.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(builds, "CHILD", "telling_child")
        progress, logs = Notes(), []
        log = builds._Log
        monkeypatch.setattr(builds, "_Log", lambda stream: logs.append(log(stream)) or logs[-1])
        with pytest.raises(EngineBuildError, match="enough"):
            build_engine(tmp_path / "model.onnx", tmp_path / "engine.plan", EngineOptions(), progress=progress)
        logs[0].wait()
        return json.loads(logs[0].lines[-1]), progress.notes

    return start


@pytest.mark.skipif(not FILTERED, reason="the filter is for Linux on x86-64 and aarch64")
def test_the_process_that_builds_an_engine_is_confined(
    telling: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    with (tmp_path / "secret").open("w") as open_here:
        os.set_inheritable(open_here.fileno(), True)
        found, notes = telling(TELLING_CHILD)
    assert found["network"] == "Permission denied"
    assert notes == []
    assert "HF_TOKEN" not in found["names"]
    inherited = [name for name in found["fds"] if not name.startswith(("pipe:", "/proc/", "/dev/"))]
    assert inherited == []


def test_a_process_that_cannot_be_confined_says_so_once(telling: Any) -> None:
    source = TELLING_CHILD.replace(
        "def build(*_):",
        "from gptoss_export.engines import sandbox\nsandbox._no_network = lambda: 'not on this planet'\ndef build(*_):",
    )
    _, notes = telling(source)
    assert notes == ["the process that builds has the network: not on this planet"]


def test_an_engine_that_grows_without_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "growing_child.py").write_text(
        "import sys\n"
        "from gptoss_export.engines.tensorrt import build_child\n"
        "def build(onnx, engine, *_):\n"
        "    with open(engine, 'wb') as f:\n"
        "        while True:\n"
        "            f.write(bytes(1 << 20))\n"
        "build_child.build = build\n"
        "sys.exit(build_child.main())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(builds, "CHILD", "growing_child")
    work = tmp_path / "work"
    work.mkdir()
    with pytest.raises(EngineBuildError, match=r"the engine grew beyond 5\.0 MB"):
        build_engine(tmp_path / "model.onnx", work / "engine.plan", EngineOptions(), most_bytes=5_000_000)
    assert list(work.iterdir()) == []


# The kernel library


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Path:
    found = library.kernel_library()
    if found is None:
        pytest.skip("installed without the kernel library")
    return found


def listed() -> list[PackagePath]:
    return [file for file in files("gptoss-export") or () if file.name == library.LIBRARY_FILE]


def test_a_library_that_was_changed_is_not_loaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit of another file than RECORD's is enough."""
    data = bytearray(installed.read_bytes())
    data[len(data) // 2] ^= 1
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: bytes(data) if path == installed else read_bytes(path))
    with pytest.raises(IntegrityError, match="is not the kernel library that was installed"):
        library.kernel_library.__wrapped__()


def test_a_library_of_somewhere_else_is_not_loaded(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata that come first in sys.path may name any file; another one of the name is none of ours."""
    monkeypatch.setattr(library.package, "__path__", [str(tmp_path)])
    assert library.kernel_library.__wrapped__() is None
    assert listed()
    stranger = PackagePath("elsewhere", library.LIBRARY_FILE)
    monkeypatch.setattr(library, "files", lambda _: [stranger])
    assert library.kernel_library.__wrapped__() is None


def test_no_variable_names_a_library(installed: Path, tmp_path: Path) -> None:
    """And none in the current folder or in LD_LIBRARY_PATH takes its place."""
    (tmp_path / library.LIBRARY_FILE).write_bytes(b"no library")
    code = "from gptoss_export.engines.ort.library import kernel_library; print(kernel_library())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "GPTOSS_EXPORT_LIBRARY": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(installed)


# Nothing that a file could say is run


def sources() -> list[Path]:
    return [path for part in ("exporter", "engines", "validators") for path in sorted((ROOT / part).rglob("*.py"))]


FORBIDDEN_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "socket", "ssl", "http", "urllib"}
FORBIDDEN_IMPORTS |= {"requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib", "xmlrpc"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "system", "popen"}
FORBIDDEN_METHODS = {("torch", "load"), ("np", "load"), ("numpy", "load"), ("yaml", "load"), ("hub", "load")}


def test_no_pickle_no_network_and_no_code_in_the_source() -> None:
    found = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            names = [name for name in names if name != "urllib.parse"]  # splits text and opens nothing
            found += [f"{path}: import {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS]
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle", "shell"):
                value = getattr(node.value, "value", None)
                found += [f"{path}:{node.value.lineno}: {node.arg}"] if value is not False else []
            if isinstance(node, ast.Call):
                function = node.func
                if isinstance(function, ast.Name) and function.id in FORBIDDEN_CALLS:
                    found.append(f"{path}:{node.lineno}: {function.id}")
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                    pair = (function.value.id, function.attr)
                    if pair in FORBIDDEN_METHODS or (pair[0] == "os" and pair[1] in FORBIDDEN_CALLS):
                        found.append(f"{path}:{node.lineno}: {'.'.join(pair)}")
    assert found == []


AUDITED = """
import sys
events = []

def watch(event, arguments):
    if event.startswith(("socket.", "pickle.", "os.system", "os.exec", "urllib.", "http.", "ftplib.", "smtplib.")):
        events.append(event)
        raise PermissionError(f"{event} {arguments}")

sys.addaudithook(watch)
from gptoss_export.exporter import cli
code = cli.main(sys.argv[1:])
print("events:", sorted(set(events)))
sys.exit(code)
"""


def audited(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AUDITED, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_whole_export_opens_no_socket_and_unpickles_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    """Python's own audit events, refused where they happen: graph, build, reference and parity of a folder."""
    done = audited("--target", "ort-cpu", "--model", tiny_dir, "--output", tmp_path / "release", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "events: []" in done.stdout
    for command in (("inspect",), ("generate", "--prompt", "a", "--max-new-tokens", "2")):
        done = audited(command[0], tmp_path / "release", *command[1:])
        assert done.returncode == 0, done.stderr
        assert "events: []" in done.stdout


def test_only_a_hub_id_asks_for_the_network(tmp_path: Path) -> None:
    arguments = ("--target", "ort-cpu", "--output", tmp_path / "release", "--model")
    offline = audited(*arguments, "someone/something", HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert offline.returncode == 12, offline.stderr
    assert "events: []" in offline.stdout
    missing = audited(*arguments, "./nothing-here", HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert missing.returncode == 12, missing.stderr
    assert "events: []" in missing.stdout
    online = audited(*arguments, "someone/something", HF_HUB_OFFLINE="0", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert online.returncode == 13, online.stderr
    assert "socket." in online.stdout

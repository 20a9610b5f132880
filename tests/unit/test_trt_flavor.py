"""Which TensorRT package is used, how its library gets its name, and what options are refused."""

import ctypes
import importlib
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptoss_export.engines.tensorrt import flavor as flavors
from gptoss_export.engines.tensorrt.flavor import Flavor, find_flavor, gpu_problem
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter.errors import EngineBuildError, TargetUnavailableError

ENTERPRISE = {"tensorrt": "11.4.0.1", "tensorrt_libs": "11.4.0.1"}
RTX = {"tensorrt_rtx": "1.7.1.116", "tensorrt_rtx_libs": "1.7.1.116"}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes it look as if exactly these modules were installed; returns the folder where their files are."""

    def pretend(modules: dict[str, str], files: tuple[str, ...] = ()) -> Path:
        folder = tmp_path / "libs"
        folder.mkdir(exist_ok=True)
        for name in files:
            (folder / name).write_bytes(b"")

        def find_spec(name: str) -> ModuleSpec | None:
            if name not in modules:
                return None
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [str(folder)]
            return spec

        def version(name: str) -> str:
            module = {"tensorrt": "tensorrt", "tensorrt-rtx-cu13": "tensorrt_rtx"}.get(name)
            if module not in modules:
                raise PackageNotFoundError(name)
            return modules[module]

        monkeypatch.setattr(flavors, "find_spec", find_spec)
        monkeypatch.setattr(flavors, "version", version)
        monkeypatch.setattr(flavors, "find_library", lambda name: None)
        return folder

    return pretend


def test_tensorrt_is_preferred_and_rtx_is_next(install) -> None:
    install(ENTERPRISE | RTX)
    assert find_flavor("auto") == Flavor("tensorrt", "11.4.0.1")
    assert find_flavor("rtx") == Flavor("rtx", "1.7.1.116")
    install(RTX)
    assert find_flavor("auto") == Flavor("rtx", "1.7.1.116")


def test_tensorrt_without_its_libraries_is_no_tensorrt(install) -> None:
    install({"tensorrt": "11.4.0.1"} | RTX)
    assert find_flavor("auto").name == "rtx"
    with pytest.raises(TargetUnavailableError, match="without its libraries") as caught:
        find_flavor("tensorrt")
    assert "https://pypi.nvidia.com" in caught.value.next_step


def test_a_system_wide_library_counts(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install({"tensorrt": "11.4.0.1"})
    monkeypatch.setattr(flavors, "find_library", lambda name: "libnvinfer.so.11" if name == "nvinfer" else None)
    assert find_flavor("auto").name == "tensorrt"


@pytest.mark.parametrize(
    ("choice", "says", "next_step"),
    [
        ("auto", "neither TensorRT nor TensorRT for RTX", "pip install tensorrt-rtx-cu13"),
        ("rtx", "tensorrt_rtx is not installed", "pip install tensorrt-rtx-cu13"),
        ("tensorrt", "tensorrt is not installed", "pip install --extra-index-url https://pypi.nvidia.com tensorrt"),
    ],
)
def test_a_missing_package_is_named_with_its_command(install, choice, says: str, next_step: str) -> None:
    install({})
    with pytest.raises(TargetUnavailableError, match=says) as caught:
        find_flavor(choice)
    assert next_step in caught.value.next_step


@pytest.mark.parametrize(
    ("modules", "accepted"),
    [
        (ENTERPRISE | {"tensorrt": "10.16.0.72"}, True),
        (ENTERPRISE | {"tensorrt": "10.15.9"}, False),
        (ENTERPRISE | {"tensorrt": "12.0.1"}, False),
        (RTX | {"tensorrt_rtx": "1.6.9"}, False),
        (RTX | {"tensorrt_rtx": "2.0.0"}, False),
        (RTX | {"tensorrt_rtx": "unknown"}, False),
    ],
)
def test_versions(install, modules: dict[str, str], accepted: bool) -> None:
    install(modules)
    if accepted:
        assert find_flavor("auto").version == modules["tensorrt"]
        return
    with pytest.raises(TargetUnavailableError, match="gptoss-export works with"):
        find_flavor("auto")


def test_load_checks_the_version_of_the_module_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__="1.2.0"))
    with pytest.raises(TargetUnavailableError, match=r"tensorrt_rtx is 1\.2\.0"):
        Flavor("rtx", None).load()


def test_a_package_that_does_not_import_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(TargetUnavailableError, match="cannot open shared object file"):
        Flavor("tensorrt", "11.4.0.1").load()


def test_the_library_gets_the_name_that_the_parser_opens(install, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(RTX, ("libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/some/lib")
    with find_flavor("rtx").library_path() as environment:
        private, rest = environment["LD_LIBRARY_PATH"].split(":")
        assert rest == "/opt/some/lib"
        assert [path.name for path in Path(private).iterdir()] == ["libtensorrt_rtx.so"]
        assert Path(private, "libtensorrt_rtx.so").resolve() == folder / "libtensorrt_rtx.so.1"
        assert Path(private).stat().st_mode & 0o077 == 0
    assert not Path(private).exists()
    assert os.environ["LD_LIBRARY_PATH"] == "/opt/some/lib"
    assert sorted(path.name for path in folder.iterdir()) == ["libtensorrt_onnxparser_rtx.so.1", "libtensorrt_rtx.so.1"]


def test_the_search_path_never_names_the_current_folder(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(RTX, ("libtensorrt_rtx.so.1",))
    for before in (None, ""):
        if before is None:
            monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
        else:
            monkeypatch.setenv("LD_LIBRARY_PATH", before)
        with find_flavor("rtx").library_path() as environment:
            assert "" not in environment["LD_LIBRARY_PATH"].split(":")


def test_a_library_that_has_its_name_is_left_alone(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(RTX, ("libtensorrt_rtx.so.1", "libtensorrt_rtx.so"))
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    with find_flavor("rtx").library_path() as environment:
        assert "LD_LIBRARY_PATH" not in environment


class _Driver:
    """The part of libcuda that tells whether there is a device."""

    def __init__(self, init: int, devices: int) -> None:
        self._init, self._devices = init, devices

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name
        return self._init

    def cuDeviceGetCount(self, count: object) -> int:  # noqa: N802 - CUDA's name
        count._obj.value = self._devices
        return 0


@pytest.mark.parametrize(
    ("driver", "problem"),
    [(_Driver(0, 1), None), (_Driver(0, 0), "no GPU"), (_Driver(100, 0), "CUDA error 100"), (None, "no NVIDIA driver")],
)
def test_gpu_problem(monkeypatch: pytest.MonkeyPatch, driver: _Driver | None, problem: str | None) -> None:
    def load(name: str) -> _Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    found = gpu_problem()
    assert found is None if problem is None else problem in (found or "")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"max_batch": 0}, "max_batch is 0"),
        ({"max_prompt": True}, "max_prompt is True"),
        ({"max_context": "4096"}, "max_context is '4096'"),
        ({"max_prompt": 512, "max_context": 511}, "max_prompt is 512, more than max_context, 511"),
        ({"max_batch": 9, "max_logits": 8}, "max_batch is 9, more than max_logits, 8"),
        ({"flavor": "lean"}, "flavor is 'lean'"),
        ({"engine_weights": "none"}, "engine_weights is 'none'"),
        ({"compute_capabilities": ("sm_90",)}, "'sm_90' is no compute capability"),
        ({"compute_capabilities": ("8.6", "8.6")}, "named twice"),
        ({"compute_capabilities": ("8.6",), "flavor": "tensorrt"}, "only be chosen with TensorRT for RTX"),
    ],
)
def test_options_that_no_engine_can_have(values: dict[str, object], says: str) -> None:
    with pytest.raises(EngineBuildError, match=says):
        EngineOptions(**values)


def test_importing_imports_nothing_heavy() -> None:
    modules = ("build", "build_child", "flavor", "header", "network", "options", "plugin")
    imports = "; ".join(f"import gptoss_export.engines.tensorrt.{name}" for name in modules)
    heavy = "{'tensorrt', 'tensorrt_rtx', 'torch', 'onnx', 'triton', 'cuda', 'rich'}"
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"

"""Which TensorRT: the package `tensorrt`, or TensorRT for RTX, `tensorrt_rtx`. Both have the same Python interface.

    flavor = find_flavor("auto")             # nothing imported yet
    with flavor.library_path() as env:
        subprocess.Popen(..., env=env)       # in there: trt = flavor.load()

RTX builds for GPUs that are not there; `tensorrt` builds for the GPU of this host only.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from gptoss_export.engines.tensorrt.options import FlavorChoice
from gptoss_export.exporter.errors import TargetUnavailableError

FlavorName = Literal["tensorrt", "rtx"]


@dataclass(frozen=True)
class _Package:
    """module: what is imported. library: the name without version that C++ code opens. distributions: names on PyPI.

    libraries: the module that carries the shared libraries, if they come from a wheel. at_least, below: versions.
    """

    module: str
    library: str
    libraries: str
    distributions: tuple[str, ...]
    at_least: tuple[int, int]
    below: tuple[int, int]
    install: str


_PACKAGES: dict[FlavorName, _Package] = {
    "tensorrt": _Package(
        module="tensorrt",
        library="libnvinfer.so",
        libraries="tensorrt_libs",
        distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        at_least=(10, 16),
        below=(12, 0),
        install="pip install --extra-index-url https://pypi.nvidia.com tensorrt",
    ),
    "rtx": _Package(
        module="tensorrt_rtx",
        library="libtensorrt_rtx.so",
        libraries="tensorrt_rtx_libs",
        distributions=("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
        at_least=(1, 7),
        below=(2, 0),
        install="pip install tensorrt-rtx-cu13",
    ),
}


@dataclass(frozen=True)
class Flavor:
    """One of the two packages, installed. version: as its metadata says, None where it has none."""

    name: FlavorName
    version: str | None

    @property
    def title(self) -> str:
        """`TensorRT for RTX 1.7.1.116`."""
        name = "TensorRT for RTX" if self.name == "rtx" else "TensorRT"
        return f"{name} {self.version}" if self.version else name

    @property
    def module(self) -> str:
        """What is imported: `tensorrt` or `tensorrt_rtx`, by which engines name what runs them."""
        return _PACKAGES[self.name].module

    @property
    def needs_gpu(self) -> bool:
        """Whether it can only build where there is a GPU, for this GPU."""
        return self.name == "tensorrt"

    def load(self) -> Any:
        """The imported module. Raises TargetUnavailableError where it cannot be imported or has another version."""
        package = _PACKAGES[self.name]
        try:
            module = importlib.import_module(package.module)
        except (ImportError, OSError) as error:
            raise TargetUnavailableError(
                f"{package.module} is installed and cannot be imported: {str(error).splitlines()[0]}", package.install
            ) from error
        _check_version(package, str(module.__version__))
        return module

    @contextmanager
    def library_path(self) -> Iterator[dict[str, str]]:
        """An environment for a process that builds engines with plugins.

        The parser opens TensorRT's library by its name without version when it adds a plugin layer, and calls
        through a null pointer where that name does not exist, as in NVIDIA's wheels. The loader reads
        LD_LIBRARY_PATH only when a process starts, so this is not for the process that calls it.
        """
        with tempfile.TemporaryDirectory(prefix="gptoss-export-") as folder:
            environment = dict(os.environ)
            library = _wheel_library(_PACKAGES[self.name])
            if library is not None:
                Path(folder, _PACKAGES[self.name].library).symlink_to(library)
                before = environment.get("LD_LIBRARY_PATH")
                environment["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else folder
            yield environment


def distributions_of(engine: str) -> tuple[str, ...]:
    """What runs artifacts of an engine, by its names on PyPI; of a package that has several, all are there."""
    names = next((package.distributions for package in _PACKAGES.values() if package.module == engine), ())
    return (*names, "cuda-bindings") if names else (engine,)


def find_flavor(choice: FlavorChoice = "auto") -> Flavor:
    """The package that `choice` means; `auto` is `tensorrt` where it is installed, else RTX. Imports neither.

    Raises TargetUnavailableError where it is missing, or has a version that this program was not made for.
    """
    if choice == "auto":
        found = next((name for name in _PACKAGES if _is_installed(_PACKAGES[name])), None)
        if found is None:
            raise TargetUnavailableError(
                "neither TensorRT nor TensorRT for RTX is installed",
                f"{_PACKAGES['rtx'].install}   (or: {_PACKAGES['tensorrt'].install})",
            )
    else:
        found = choice
        package = _PACKAGES[found]
        if find_spec(package.module) is None:
            raise TargetUnavailableError(f"{package.module} is not installed", package.install)
        if not _is_installed(package):
            raise TargetUnavailableError(
                f"{package.module} is installed without its libraries, which come from NVIDIA's own index",
                package.install,
            )
    version_found = _version(_PACKAGES[found])
    if version_found is not None:
        _check_version(_PACKAGES[found], version_found)
    return Flavor(found, version_found)


def gpu_problem() -> str | None:
    """Why CUDA finds no GPU on this host, in a few words; None if it finds one. Starts CUDA in this process."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    if code := cuda.cuInit(0):
        return f"the NVIDIA driver does not start, CUDA error {code}"
    count = ctypes.c_int(0)
    if code := cuda.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver finds no device, CUDA error {code}"
    return None if count.value else "no GPU"


def _is_installed(package: _Package) -> bool:
    if find_spec(package.module) is None:
        return False
    stem = package.library.removeprefix("lib").removesuffix(".so")
    return find_spec(package.libraries) is not None or find_library(stem) is not None


def _wheel_library(package: _Package) -> Path | None:
    """The library in the wheel, where the wheel has it under a name with version only."""
    spec = find_spec(package.libraries)
    folders = spec.submodule_search_locations if spec is not None else None
    for folder in map(Path, folders or ()):
        if not (folder / package.library).exists():
            return max(folder.glob(f"{package.library}.*"), default=None)
    return None


def _version(package: _Package) -> str | None:
    for name in package.distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _check_version(package: _Package, found: str) -> None:
    parts = tuple(int(part) for part in found.split(".")[:2] if part.isdecimal())
    if not package.at_least <= parts < package.below:
        first, last = (".".join(map(str, bound)) for bound in (package.at_least, package.below))
        raise TargetUnavailableError(
            f"{package.module} is {found}; gptoss-export works with {first} and later, below {last}", package.install
        )

"""The custom-op library of this installation: kernels for the ops of the dialect.

It is loaded from the installed package and from nowhere else. Where it was not built, everything still runs, by the
function bodies that every model carries.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from gptoss_export.exporter.errors import TargetUnavailableError

LIBRARY_FILE = "libgptoss_ort_ops.so"


@cache
def kernel_library() -> Path | None:
    """The library's file, or None where the package was installed without it."""
    try:
        installed = files("gptoss-export") or []
    except PackageNotFoundError:
        return None
    for file in installed:
        if file.name == LIBRARY_FILE:
            path = Path(str(file.locate()))
            return path if path.is_file() else None
    return None


@cache
def kernels_work() -> str | None:
    """None if the library is there and this onnxruntime takes it; otherwise why not, in a few words."""
    import onnxruntime as ort

    library = kernel_library()
    if library is None:
        return "gptoss-export was installed without its kernel library (no C++ compiler then)"
    try:
        ort.SessionOptions().register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime raises its own unexported types
        return f"onnxruntime {ort.__version__} refuses the kernel library: {str(error).splitlines()[0]}"
    return None


def require_kernels() -> Path:
    """The library's file. Raises TargetUnavailableError where there is none that this onnxruntime takes."""
    library, why_not = kernel_library(), kernels_work()
    if library is None or why_not is not None:
        raise TargetUnavailableError(
            f"--bundle-kernels has no kernels to bundle: {why_not}",
            "install a C++ compiler and then gptoss-export again, or leave --bundle-kernels out",
        )
    return library

"""The custom-op library of this installation: kernels for the ops of the dialect.

It is loaded from the installed package and from nowhere else, least of all from an artifact, and only if it is the file
that was installed: its sha256 is the one in the package's RECORD. Where it was not built, everything still runs, by
the function bodies that every model carries.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import gptoss_export.engines.ort as package
from gptoss_export.exporter.errors import IntegrityError, TargetUnavailableError

LIBRARY_FILE = "libgptoss_ort_ops.so"
_INSTALLED = f"gptoss_export/engines/ort/{LIBRARY_FILE}"


@cache
def kernel_library() -> Path | None:
    """The library's file, hashed before its first use; None where the package was installed without it.

    Raises IntegrityError where it is not the file that was installed.
    """
    try:
        installed = files("gptoss-export") or []
    except PackageNotFoundError:
        return None
    # Metadata of another installation may be found first, in the current folder for one.
    folders = {Path(folder).resolve() for folder in package.__path__}
    for file in (file for file in installed if file.as_posix() == _INSTALLED):
        path = Path(str(file.locate()))
        if not path.is_file() or path.parent.resolve() not in folders:
            return None
        if file.hash is None or file.hash.mode != "sha256" or file.hash.value != _record_hash(path):
            raise IntegrityError(
                f"{path} is not the kernel library that was installed: the package's RECORD has another sha256",
                "install gptoss-export again, and find out who changed it",
            )
        return path
    return None


def _record_hash(path: Path) -> str:
    """As RECORD has it, see the specification of recorded installations."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")


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

"""An artifact depends on what made it: TensorRT, Triton and CUDA's bindings, of any version or none, change no byte of
another target's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_export.exporter.artifact import read_manifest

TARGETS = ("onnx", "ort-cpu")
OTHERS = ("tensorrt", "tensorrt_rtx_cu13", "triton", "cuda_bindings")
HIDE = """
import importlib.metadata as metadata
from importlib.machinery import PathFinder

DISTRIBUTIONS = {"tensorrt", "tensorrt-rtx-cu13", "triton", "cuda-bindings"}
MODULES = {"cuda", "tensorrt", "tensorrt_libs", "tensorrt_rtx", "tensorrt_rtx_libs", "triton"}
from_name, find_spec = metadata.Distribution.from_name, PathFinder.find_spec


def distribution(name):
    if name.lower().replace("_", "-") in DISTRIBUTIONS:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)


def spec(name, path=None, target=None):
    return None if name in MODULES else find_spec(name, path, target)


metadata.Distribution.from_name = staticmethod(distribution)
PathFinder.find_spec = staticmethod(spec)
"""


def hidden(folder: Path) -> None:
    """A start of Python in which none of them is there."""
    (folder / "sitecustomize.py").write_text(HIDE)


def other_versions(folder: Path) -> None:
    """Metadata that are found before those of what is installed."""
    for number, name in enumerate(OTHERS):
        (folder / f"{name}-9{number}.dist-info").mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: 9{number}\n"
        (folder / f"{name}-9{number}.dist-info" / "METADATA").write_text(text)


def python(shim: Path, folder: Path, *arguments: str) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(shim),
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def versions_seen(shim: Path, folder: Path) -> str:
    code = f"from gptoss_export.exporter.output.identity import _version; print([_version(n) for n in {OTHERS!r}])"
    return python(shim, folder, "-c", code).strip()


@pytest.fixture(scope="module")
def outputs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """By what was visible, the exports and what of the others was seen."""
    shims: dict[str, Callable[[Path], None]] = {"hidden": hidden, "other versions": other_versions}
    found = {}
    for name, make in shims.items():
        folder = tmp_path_factory.mktemp("export")
        shim = folder / "shim"
        shim.mkdir()
        make(shim)
        targets = [part for target in TARGETS for part in ("--target", target)]
        arguments = ["-q", *targets, "--model", str(tiny_dir), "--output", "out"]
        python(shim, folder, "-m", "gptoss_export.exporter", *arguments)
        found[name] = folder / "out", versions_seen(shim, folder)
    return found


def test_what_is_hidden_is_not_seen(outputs: dict[str, tuple[Path, str]]) -> None:
    assert outputs["hidden"][1] == "[None, None, None, None]"
    assert outputs["other versions"][1] == "['90', '91', '92', '93']"


@pytest.mark.parametrize("target", TARGETS)
def test_the_bytes_are_the_same(target: str, outputs: dict[str, tuple[Path, str]]) -> None:
    one, other = (outputs[name][0] / target for name in ("hidden", "other versions"))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    assert [str(name) for name in files if (one / name).read_bytes() != (other / name).read_bytes()] == []
    manifest = read_manifest(one)
    assert manifest.content_sha256 == read_manifest(other).content_sha256
    assert {"gptoss-export", "torch", "onnxruntime"} <= manifest.versions.keys()
    assert not {name for name in manifest.versions if name.startswith(("tensorrt", "triton", "cuda"))}

"""Compiled kernels as bytes: what is written is read, what is damaged or foreign is refused, twice the same bytes."""

import hashlib
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines.tensorrt.kernels.bundle import (
    MAGIC,
    VERSION,
    CompiledKernel,
    KernelBundle,
    parameter_kinds,
)
from gptoss_export.engines.tensorrt.kernels.launch import MoEShape, kernel_specs
from gptoss_export.exporter.errors import EngineBuildError, EngineMismatchError, GptossExportError, IntegrityError

SHAPE = MoEShape(5, 96, 160, 3, "bf16", 1.702, 7.0)

COMPILE = """
import sys
from pathlib import Path
from gptoss_export.engines.tensorrt.kernels.aot import compile_bundle
from gptoss_export.engines.tensorrt.kernels.launch import MoEShape

bundle = compile_bundle(MoEShape(4, 64, 32, 2, "fp16", 1.702, 7.0), (90,))
Path(sys.argv[1]).write_bytes(bundle.to_bytes())
"""


def made_up(archs: tuple[int, ...] = (80, 90)) -> KernelBundle:
    kernels = {
        name: {
            arch: CompiledKernel(spec.function, spec.warps, 512, parameter_kinds(spec), b"\x7fELF" + bytes([arch] * n))
            for n, arch in enumerate(archs, 1)
        }
        for name, spec in kernel_specs(SHAPE).items()
    }
    return KernelBundle(SHAPE, "3.9.0", archs, kernels)


def with_header(change: Callable[[dict[str, Any]], None], version: int = VERSION) -> bytes:
    """The bundle with another header, its sha256 made to fit."""
    data = made_up().to_bytes()
    _, _, length = struct.unpack_from("<8sII", data)
    document = json.loads(data[16 : 16 + length])
    change(document)
    header = json.dumps(document).encode()
    return sealed(struct.pack("<8sII", MAGIC, version, len(header)) + header + data[16 + length : -32])


def sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


def test_what_is_written_is_read() -> None:
    bundle = made_up()
    assert KernelBundle.from_bytes(bundle.to_bytes()) == bundle
    assert bundle.to_bytes() == made_up().to_bytes()


def test_every_flipped_byte_is_noticed() -> None:
    data = made_up().to_bytes()
    for place in range(len(data)):
        with pytest.raises((IntegrityError, EngineMismatchError)):
            KernelBundle.from_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])


def test_every_shortened_bundle_is_noticed() -> None:
    data = made_up().to_bytes()
    for length in range(0, len(data), 7):
        with pytest.raises(IntegrityError):
            KernelBundle.from_bytes(data[:length])


BAD_HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no shape": lambda d: d.pop("shape"),
    "surplus in shape": lambda d: d["shape"].update(layers=3),
    "impossible shape": lambda d: d["shape"].update(hidden=33),
    "type of a size": lambda d: d["shape"].update(hidden="96"),
    "archs": lambda d: d.update(archs=[]),
    "archs twice": lambda d: d.update(archs=[80, 80, 90]),
    "arch is text": lambda d: d.update(archs=["80", 90]),
    "kernels": lambda d: d.update(kernels=7),
    "kernel is a list": lambda d: d["kernels"].__setitem__(0, []),
    "unhashable name": lambda d: d["kernels"][0].update(kernel={}),
    "huge cubin": lambda d: d["kernels"][0].update(nbytes=1 << 60),
    "negative cubin": lambda d: d["kernels"][0].update(nbytes=-1),
    "shifted cubins": lambda d: d["kernels"][0].update(nbytes=d["kernels"][0]["nbytes"] + 1),
    "shared memory": lambda d: d["kernels"][0].update(shared=1 << 20),
    "symbol": lambda d: d["kernels"][0].update(symbol="free"),
    "surplus bytes": lambda d: d["kernels"].pop(),
}
FOREIGN_HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another kernel": lambda d: d["kernels"][0].update(kernel="decode_sideways"),
    "other parameters": lambda d: d["kernels"][0]["parameters"].append("pointer"),
    "other warps": lambda d: d["kernels"][0].update(warps=64),
    "an architecture without kernels": lambda d: d["archs"].append(120),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_headers_are_one_line(name: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        KernelBundle.from_bytes(with_header(lambda d: (BAD_HEADERS[name](d), None)[1]))
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("name", FOREIGN_HEADERS)
def test_other_versions_kernels_are_refused(name: str) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        KernelBundle.from_bytes(with_header(lambda d: (FOREIGN_HEADERS[name](d), None)[1]))
    assert "\n" not in caught.value.what


def test_other_formats_are_refused() -> None:
    with pytest.raises(EngineMismatchError, match=f"format {VERSION + 1}"):
        KernelBundle.from_bytes(with_header(lambda _: None, VERSION + 1))


@pytest.mark.parametrize("header", [b"[]", b"{}", b"null", b"\xff", b"[" * 100_000, b""])
def test_headers_that_are_no_object(header: bytes) -> None:
    with pytest.raises(GptossExportError) as caught:
        KernelBundle.from_bytes(sealed(struct.pack("<8sII", MAGIC, VERSION, len(header)) + header))
    assert isinstance(caught.value, IntegrityError)


def test_a_header_longer_than_the_bundle() -> None:
    with pytest.raises(IntegrityError, match="shorter"):
        KernelBundle.from_bytes(sealed(struct.pack("<8sII", MAGIC, VERSION, 1 << 19) + b"{}"))


def test_two_processes_compile_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Triton's cache holds, and whatever the environment says of line tables."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("one", "two"):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / f"cache-{name}"))
        command = [sys.executable, "-W", "error", "-c", COMPILE, tmp_path / name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stderr == ""
    data = (tmp_path / "one").read_bytes()
    assert data == (tmp_path / "two").read_bytes()
    bundle = KernelBundle.from_bytes(data)
    assert bundle.archs == (90,)
    assert all(kernel[90].shared <= 99 << 10 for kernel in bundle.kernels.values())
    assert str(Path.cwd()).encode() not in data
    assert not (tmp_path / "cache-one").exists()


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_export.engines.tensorrt.kernels.aot import compile_bundle

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(EngineBuildError, match="TRITON_INTERPRET"):
        compile_bundle(SHAPE, (90,))

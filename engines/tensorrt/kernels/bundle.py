"""Compiled kernels as bytes: what an engine carries in the plugin's fields.

    magic "GPTOSSKB", version, length of the header (little-endian uint32)
    header    JSON: shape, Triton's version, architectures, and of every kernel and architecture its symbol, warps,
              shared memory, kinds of parameters and the length of its cubin
    cubins    one after the other in the header's order
    sha256    of everything before it

Reading checks all of it: a bundle is what this version of the package would have compiled, or an error of one line.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gptoss_export.engines.tensorrt.kernels.launch import KernelSpec, MoEShape, kernel_specs
from gptoss_export.exporter.errors import EngineMismatchError, IntegrityError

MAGIC = b"GPTOSSKB"
VERSION = 1
MAX_BYTES = 64 << 20
_MAX_HEADER = 1 << 20
_MAX_SHARED = 227 << 10
_PREFIX = struct.Struct("<8sII")
_ELF = b"\x7fELF"

POINTER, INT32 = "pointer", "int32"


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture. shared: bytes of dynamic shared memory; parameters: POINTER or INT32 each.

    Behind its parameters a kernel takes two more pointers, Triton's scratch memories, which are null here.
    """

    symbol: str
    warps: int
    shared: int
    parameters: tuple[str, ...]
    cubin: bytes


@dataclass(frozen=True)
class KernelBundle:
    """The kernels of one shape. archs: compute capabilities as 90 for 9.0; kernels: by name, then architecture."""

    shape: MoEShape
    triton: str
    archs: tuple[int, ...]
    kernels: Mapping[str, Mapping[int, CompiledKernel]]

    def to_bytes(self) -> bytes:
        """The same kernels give the same bytes."""
        entries, cubins = [], []
        for name in sorted(self.kernels):
            for arch in self.archs:
                kernel = self.kernels[name][arch]
                entry = {"kernel": name, "arch": arch, "symbol": kernel.symbol, "warps": kernel.warps}
                entry |= {"shared": kernel.shared, "parameters": kernel.parameters, "nbytes": len(kernel.cubin)}
                entries.append(entry)
                cubins.append(kernel.cubin)
        document = {"shape": asdict(self.shape), "triton": self.triton, "archs": self.archs, "kernels": entries}
        header = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
        # Four copies a layer lie in an engine, so their size counts.
        data = b"".join([_PREFIX.pack(MAGIC, VERSION, len(header)), header, zlib.compress(b"".join(cubins), 9)])
        return data + hashlib.sha256(data).digest()

    @staticmethod
    def from_bytes(data: bytes) -> KernelBundle:
        """Raises IntegrityError for bytes that are no intact bundle, EngineMismatchError for another version's."""
        if not _PREFIX.size + 32 <= len(data) <= MAX_BYTES or data[:8] != MAGIC:
            raise _damaged("do not begin as a bundle does, or have an impossible size")
        _, version, length = _PREFIX.unpack_from(data)
        if version != VERSION:
            raise _foreign(f"are of format {version}, this version reads {VERSION}")
        if hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise _damaged("have another sha256 than they say")
        end = _PREFIX.size + length
        if length > _MAX_HEADER or end > len(data) - 32:
            raise _damaged("are shorter than their header says")
        try:
            document = json.loads(data[_PREFIX.size : end])
            return _bundle(document, _unpacked(document, data[end:-32]))
        except (ValueError, KeyError, zlib.error, TypeError, RecursionError) as error:
            raise _damaged(f"have an unreadable header ({type(error).__name__})") from error


def _unpacked(document: dict[str, Any], packed: bytes) -> memoryview:
    """The cubins, of exactly the size that the header says, whatever was packed."""
    size = sum(_integer(entry["nbytes"], 1, MAX_BYTES) for entry in document["kernels"])
    if size > MAX_BYTES:
        raise ValueError("cubins")
    unpacker = zlib.decompressobj()
    cubins = unpacker.decompress(packed, size + 1)
    if len(cubins) != size or unpacker.unconsumed_tail or not unpacker.eof or unpacker.unused_data:
        raise ValueError("cubins")
    return memoryview(cubins)


def parameter_kinds(spec: KernelSpec) -> tuple[str, ...]:
    """How each parameter of a kernel is passed."""
    return tuple(POINTER if kind.startswith("*") else INT32 for _, kind in spec.parameters)


def _bundle(document: dict[str, Any], cubins: memoryview) -> KernelBundle:
    if set(document["shape"]) != {field.name for field in fields(MoEShape)}:
        raise ValueError("shape")
    shape = MoEShape(**document["shape"])
    archs = tuple(_integer(arch, 10, 999) for arch in document["archs"])
    if len(set(archs)) != len(archs) or not archs or not isinstance(document["triton"], str):
        raise ValueError("archs")
    specs = kernel_specs(shape)
    kernels: dict[str, dict[int, CompiledKernel]] = {}
    start = 0
    for entry in document["kernels"]:
        name, arch, size = entry["kernel"], entry["arch"], _integer(entry["nbytes"], 1, MAX_BYTES)
        cubin = bytes(cubins[start : start + size])
        start += size
        if len(cubin) != size or cubin[:4] != _ELF:
            raise ValueError("cubin")
        spec, parameters = specs.get(name), tuple(entry["parameters"])
        if spec is None or parameters != parameter_kinds(spec) or entry["warps"] != spec.warps:
            raise _foreign(f"have another kernel {str(name)[:40]!r}")
        if arch in kernels.setdefault(name, {}) or entry["symbol"] != spec.function:
            raise ValueError("kernels")
        shared = _integer(entry["shared"], 0, _MAX_SHARED)
        kernels[name][arch] = CompiledKernel(spec.function, spec.warps, shared, parameters, cubin)
    if start != len(cubins):
        raise ValueError("cubins")
    if set(kernels) != set(specs) or any(set(by_arch) != set(archs) for by_arch in kernels.values()):
        raise _foreign("have not all kernels")
    return KernelBundle(shape, document["triton"], archs, kernels)


def _integer(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is no integer from {low} to {high}")
    return value


def _damaged(what: str) -> IntegrityError:
    return IntegrityError(f"the compiled kernels {what}", "build the engine again")


def _foreign(what: str) -> EngineMismatchError:
    return EngineMismatchError(f"the compiled kernels {what}", "build the engine again with this version")

"""The first 64 bytes of an engine of TensorRT for RTX, read without TensorRT and without a GPU.

NVIDIA does not document them: this is what engines of 1.7.1, built for known GPUs, begin with. It serves to say early
and clearly that an engine is not for this host; what runs is decided by TensorRT alone.

    0x00  4  "vtrt"
    0x10  8  size of the file, little-endian as all that follows
    0x18  4  version, one byte a part: 1, 7, 1, 116
    0x1c  4  "vtrt"
    0x20  8  the GPUs that it was built for, one bit each from the lowest: COMPUTE_CAPABILITIES, then FORWARD_BIT

Engines of the package `tensorrt` begin otherwise.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.exporter.checkpoint.files import open_regular, stamp_of
from gptoss_export.exporter.errors import EngineMismatchError

MAGIC = b"vtrt"
COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What the mask's bits stand for, the lowest bit first."""
FORWARD_BIT = 6
"""Set, with all bits from 8.0 on, where no GPU was named at build time; by that it should mean all later GPUs."""

_LAYOUT = struct.Struct("<4s12xQ4s4sQ24x")


@dataclass(frozen=True)
class EngineHeader:
    """version: of the package that built it, four parts. capability_mask: as stored. nbytes: size of the file."""

    magic: bytes
    version: tuple[int, int, int, int]
    capability_mask: int
    nbytes: int

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs that the mask names: `("8.6", "12.0")`; "8.0+" for an engine that is bound to none."""
        if self.capability_mask >> FORWARD_BIT & 1:
            return (f"{self._named()[0]}+",) if self._named() else ()
        return self._named()

    def _named(self) -> tuple[str, ...]:
        return tuple(name for bit, name in enumerate(COMPUTE_CAPABILITIES) if self.capability_mask >> bit & 1)


def read_header(path: Path) -> EngineHeader:
    """The header of an RTX engine.

    Raises EngineMismatchError for a file that is none, or one whose size is not the one that its header says, and what
    `open_regular` raises.
    """
    with open_regular(path) as file:
        data, actual = file.read(_LAYOUT.size), stamp_of(file).nbytes
    if len(data) < _LAYOUT.size:
        raise _mismatch(path, f"has {len(data)} bytes, less than an engine's header")
    magic, nbytes, version, again, mask = _LAYOUT.unpack(data)
    if magic != MAGIC or again != MAGIC:
        raise _mismatch(path, f"is no engine of TensorRT for RTX: it begins with {magic!r}")
    if nbytes != actual:
        raise _mismatch(path, f"has {actual} bytes, its header says {nbytes}")
    return EngineHeader(magic, tuple(version), mask, nbytes)


def _mismatch(path: Path, why: str) -> EngineMismatchError:
    return EngineMismatchError(f"{path} {why}", "build the engine again with gptoss-export")

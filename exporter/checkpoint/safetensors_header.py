"""The header of a safetensors file, read and checked without touching a byte of tensor data.

A file is eight bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}`,
and one buffer that the tensors fill without holes or overlaps: https://github.com/huggingface/safetensors
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from gptoss_export.exporter.checkpoint.files import Stamp, open_regular, shown, stamp_of
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import (
    CheckpointError,
    DuplicateTensorError,
    HeaderError,
    OverlappingTensorError,
    TruncatedFileError,
)

# gpt-oss-120b's headers have 0.1 MB in all; the reference implementation would parse 100 MB.
MAX_HEADER_BYTES = 16 << 20
MAX_RANK = 32

# Bits of one element; types below a byte are packed.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_AGAIN = "Download the file again, or write it anew with safetensors."


@dataclass(frozen=True)
class HeaderEntry:
    """One tensor of one file. offset and nbytes are absolute in the file; stamp: of that file, as it was read."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    stamp: Stamp | None = None


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """Reads the header of `path`: every tensor by its name, in the order of their bytes.

    Raises HeaderError, DuplicateTensorError, OverlappingTensorError, TruncatedFileError; UnsafeFileError or
    CheckpointNotFoundError when `path` is no regular file.
    """
    with open_regular(path) as f:
        stamp = stamp_of(f)
        size = stamp.nbytes
        prefix = f.read(8)
        if prefix == b"version ":
            raise HeaderError(f"{path} is a Git LFS pointer, not the weights", "Run `git lfs pull` in the checkpoint.")
        if len(prefix) < 8:
            raise TruncatedFileError(f"{path} has {size} bytes, not even a header's length", _AGAIN)
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(f"{path}: a header of {length} bytes; this is no safetensors file", _AGAIN)
        if length > size - 8:
            raise TruncatedFileError(f"{path}: {size} bytes end within its header of {length} bytes", _AGAIN)
        data = f.read(length)
    if len(data) != length:
        raise TruncatedFileError(f"{path} was cut short while it was read", _AGAIN)
    entries = parse_header(data, size - 8 - length, 8 + length, str(path))
    return {name: replace(entry, stamp=stamp) for name, entry in entries.items()}


def parse_header(data: bytes, buffer_bytes: int, base: int, where: str) -> dict[str, HeaderEntry]:
    """Checks a header against the buffer of buffer_bytes that follows it at file offset `base`."""
    if not data.startswith(b"{"):
        raise HeaderError(f"{where}: the header does not start with an object", _AGAIN)
    raw = parse_json_object(data, f"{where}: header", HeaderError, duplicate=DuplicateTensorError)
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(f"{where}: __metadata__ is not a table of strings", _AGAIN)
    entries = [_entry(name, fields, base, where) for name, fields in raw.items()]
    entries.sort(key=lambda e: (e.offset, e.nbytes))
    _check_tiling(entries, base, buffer_bytes, where)
    return {e.name: e for e in entries}


def _entry(name: str, fields: object, base: int, where: str) -> HeaderEntry:
    def bad(problem: str) -> CheckpointError:
        return HeaderError(f"{where}: tensor {shown(name)}: {problem}", _AGAIN)

    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise bad("not described by dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise bad(f"unknown dtype {shown(dtype)}")
    if not _naturals(shape) or len(shape) > MAX_RANK:
        raise bad("its shape is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise bad("its data_offsets are not [begin, end]")
    bits = DTYPE_BITS[dtype]
    for size in shape:
        bits *= size
    begin, end = offsets
    if bits != 8 * (end - begin):
        raise bad(f"{end - begin} bytes for {dtype} {list(shape)}, which takes {bits // 8}")
    return HeaderEntry(name, dtype, tuple(shape), base + begin, end - begin)


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_tiling(entries: list[HeaderEntry], base: int, buffer_bytes: int, where: str) -> None:
    for before, e in pairwise(entries):
        if e.offset < before.offset + before.nbytes:
            raise OverlappingTensorError(
                f"{where}: tensors {shown(before.name)} and {shown(e.name)} share bytes", _AGAIN
            )
    position = base
    for e in entries:
        if e.offset > position:
            raise HeaderError(f"{where}: {e.offset - position} bytes before {shown(e.name)} are no tensor's", _AGAIN)
        if e.offset + e.nbytes > base + buffer_bytes:
            raise TruncatedFileError(
                f"{where}: tensor {shown(e.name)} ends at byte {e.offset + e.nbytes}, "
                f"the file at {base + buffer_bytes}",
                "Download the file again; it is not complete.",
            )
        position += e.nbytes
    if position < base + buffer_bytes:
        raise HeaderError(f"{where}: {base + buffer_bytes - position} bytes at its end are no tensor's", _AGAIN)

"""A safetensors file of the artifact's own: planned before it is written, filled a few rows at a time.

file = plan_tensor_file([("lm_head.weight", "F16", (201088, 2880))], folder / "dense" / "fp16.safetensors")
write_tensor_file(file, pieces)     # (offset in the file, array), in any order
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.tensors import TensorRef
from gptoss_export.exporter.weights import disk_errors, write_all

_ITEMSIZE = {"I8": 1, "BF16": 2, "F16": 2, "F32": 4}
_PADDING = "padding."
_ALIGNMENT = 64


@dataclass(frozen=True)
class TensorFile:
    """A file before it is written: header with its length, places of the tensors, bytes in all."""

    path: Path
    header: bytes
    tensors: Mapping[str, TensorRef]
    nbytes: int


def plan_tensor_file(stored: Iterable[tuple[str, str, tuple[int, ...]]], path: Path) -> TensorFile:
    """stored: name, safetensors' name of the type, and shape of each tensor, in the order of the file.

    Every tensor begins at a multiple of 64 bytes. The format has no holes, so what fills them is a tensor.
    """
    tensors: list[TensorRef] = []
    end = 0
    for name, dtype, shape in stored:
        nbytes = _ITEMSIZE[dtype] * math.prod(shape)
        tensors.append(TensorRef(name, name, path, dtype, shape, end, nbytes))
        end += nbytes
        if gap := -end % _ALIGNMENT:
            tensors.append(TensorRef(f"{_PADDING}{end}", f"{_PADDING}{end}", path, "U8", (gap,), end, gap))
            end += gap
    fields = {
        t.name: {"dtype": t.dtype, "shape": t.shape, "data_offsets": [t.offset, t.offset + t.nbytes]} for t in tensors
    }
    encoded = json.dumps(fields, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % _ALIGNMENT)
    header = len(encoded).to_bytes(8, "little") + encoded
    placed = {t.name: replace(t, offset=t.offset + len(header)) for t in tensors if not t.name.startswith(_PADDING)}
    return TensorFile(path, header, placed, len(header) + end)


def write_tensor_file(file: TensorFile, pieces: Iterable[tuple[int, NDArray[Any]]]) -> None:
    """Writes `file`, which must not exist, with its folder.

    Raises DiskSpaceError, and whatever making the pieces raises; what was written so far then stays for the caller to
    remove.
    """
    file.path.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(file.path.name):
        fd = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(fd, 0, file.nbytes)
            write_all(fd, memoryview(file.header), 0)
            for offset, data in pieces:
                write_all(fd, data.reshape(-1).view(np.uint8).data, offset)
            os.fsync(fd)
        finally:
            os.close(fd)

"""Headers of .npy files of float32 in C order, as numpy writes them; numpy's own reader evaluates them as Python.

https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html, version 1.0: magic, two bytes of length, header.
"""

from __future__ import annotations

import re

PREFIX_BYTES = 10
_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \(((?:[0-9]{1,12}, ?){1,8}[0-9]{0,12})\), \} *\n"
)


def data_offset(prefix: bytes) -> int:
    """Where the data begin, by the file's first PREFIX_BYTES. Raises ValueError for what is no such file."""
    if len(prefix) < PREFIX_BYTES or not prefix.startswith(_MAGIC):
        raise ValueError("it is no .npy file of version 1.0")
    return PREFIX_BYTES + int.from_bytes(prefix[8:10], "little")


def header_shape(header: bytes) -> tuple[int, ...]:
    """The shape that a header says, from PREFIX_BYTES to `data_offset`. Raises ValueError for any other array."""
    found = _HEADER.fullmatch(header)
    if found is None:
        raise ValueError("it is no .npy file of float32 in C order")
    return tuple(int(size) for size in found[1].replace(b",", b" ").split())

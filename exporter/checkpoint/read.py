"""The only place where bytes of tensors are read, never more than asked for: through a memory map, but for a scan,
which a file that is cut short meanwhile must not end with a SIGBUS."""

from __future__ import annotations

from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.files import open_regular, stamp_of
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import IntegrityError, InvalidScaleError, TruncatedFileError

DTYPES: dict[str, np.dtype[Any]] = {"BF16": np.dtype(ml_dtypes.bfloat16), "U8": np.dtype(np.uint8)}

# What a scan holds at a time, in bytes.
SCAN_BYTES = 64 << 20

NAN_SCALE = 255


def read_tensor(ref: TensorRef) -> NDArray[Any]:
    """Maps one tensor, read-only, in its own shape; BF16 as ml_dtypes.bfloat16, U8 as uint8.

    The map lives as long as the array. Raises TruncatedFileError when the file has become shorter than its
    header said, IntegrityError when it is another file or was written to since, and what `open_regular` raises.
    """
    return _map(ref, ref.offset, ref.nbytes, DTYPES[ref.dtype]).reshape(ref.shape)


def read_rows(ref: TensorRef, start: int, stop: int) -> NDArray[Any]:
    """Maps the rows `start` to `stop` of the first dimension, [stop - start, ...]; the rest is as for `read_tensor`."""
    row = ref.nbytes // ref.shape[0]
    rows = _map(ref, ref.offset + start * row, (stop - start) * row, DTYPES[ref.dtype])
    return rows.reshape(stop - start, *ref.shape[1:])


def check_scales(checkpoint: Checkpoint) -> None:
    """Reads every MXFP4 scale once. Raises InvalidScaleError for a 255, which is NaN in OCP MX v1.0."""
    for ref in checkpoint.tensors.values():
        if ref.name.endswith("_scales"):
            for start in range(0, ref.nbytes, SCAN_BYTES):
                window = _read(ref, ref.offset + start, min(SCAN_BYTES, ref.nbytes - start))
                if window.max() == NAN_SCALE:
                    _refuse_scale(ref, start + int(np.argmax(window)))


def _refuse_scale(ref: TensorRef, index: int) -> None:
    expert, row, group = (int(i) for i in np.unravel_index(index, ref.shape))
    raise InvalidScaleError(
        f"{ref.name}: the scale of expert {expert}, row {row}, group {group} is 255, which is NaN in MXFP4",
        f"Download {ref.file.name} again, or quantise that expert anew.",
    )


def _map(ref: TensorRef, offset: int, nbytes: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    with open_regular(ref.file) as f:
        _check(ref, f, offset + nbytes)
        return np.memmap(f, dtype=dtype, mode="r", offset=offset, shape=(nbytes // dtype.itemsize,))


def _read(ref: TensorRef, offset: int, nbytes: int) -> NDArray[np.uint8]:
    with open_regular(ref.file) as f:
        _check(ref, f, offset + nbytes)
        f.seek(offset)
        data = f.read(nbytes)
    if len(data) < nbytes:
        raise _cut_short(ref, offset + len(data))
    return np.frombuffer(data, np.uint8)


def _check(ref: TensorRef, file: BinaryIO, end: int) -> None:
    """Raises what `read_tensor` does for a file that is not as its header was, or ends before `end`."""
    stamp = stamp_of(file)
    if end > stamp.nbytes:
        raise _cut_short(ref, stamp.nbytes)
    if ref.stamp is not None and ref.stamp != stamp:
        raise IntegrityError(
            f"{ref.file} is not the file whose header was checked: it was replaced or written to since",
            "Leave the checkpoint alone while it is read, then run again.",
        )


def _cut_short(ref: TensorRef, nbytes: int) -> TruncatedFileError:
    return TruncatedFileError(
        f"{ref.file} has {nbytes} bytes, and {ref.name} ends at {ref.offset + ref.nbytes}: it was cut short since it "
        "was opened",
        "Leave the checkpoint alone while it is read; download it again if it stays so.",
    )

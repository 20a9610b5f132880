"""What one run of transformers left behind, layer by layer: streams, router logits, and how large everything became.

    writer = TraceWriter(folder, TraceShape(lengths, num_layers, hidden_size, num_experts), "states")
    writer.append("router_logits", rows)            # as the layers run; one layer in RAM at a time
    writer.finish(peaks)
    trace = Trace(folder, shape, "states")
    trace.router_logits(3, 0)                       # [n, E] float32, layer 3, of the first probe

A folder holds one .npy file a kind, [layers, positions, width], the probes' positions end to end, and peaks.json.
"""

from __future__ import annotations

import errno
import json
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.files import open_regular, read_capped, shown, stamp_of
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import AccessError, ConfigError, DiskSpaceError
from gptoss_export.validators.npy import PREFIX_BYTES, data_offset, header_shape

Rows = NDArray[np.float32]

Extent = Literal["states", "routing"]
"""How much is recorded: everything, or router logits and the last states alone."""

PEAKS_NAME = "peaks.json"
MAX_PEAKS_BYTES = 4 << 20
_STORED = np.dtype("<f4")


@dataclass(frozen=True)
class Peak:
    """The largest finite |value|, 0 where there is none, and how many values are not finite."""

    largest: float
    non_finite: int

    def merge(self, other: Peak) -> Peak:
        return Peak(max(self.largest, other.largest), self.non_finite + other.non_finite)


@dataclass(frozen=True)
class TraceShape:
    """The sizes of a trace; lengths: positions of each probe, in order."""

    lengths: tuple[int, ...]
    num_layers: int
    hidden_size: int
    num_experts: int

    def arrays(self, extent: Extent) -> dict[str, tuple[int, int, int]]:
        """The recorded arrays by name, [layers, positions, width]."""
        L, T, H = self.num_layers, sum(self.lengths), self.hidden_size
        arrays = {"final": (1, T, H), "router_logits": (L, T, self.num_experts)}
        if extent == "states":
            arrays |= {"hidden": (L + 1, T, H), "residual": (L, T, H)}
        return arrays

    def nbytes(self, extent: Extent) -> int:
        """Bytes of all arrays, headers aside."""
        return sum(math.prod(shape) for shape in self.arrays(extent).values()) * _STORED.itemsize


class TraceWriter:
    """Writes a trace into an existing folder, the layers of each array in order.

    Every method raises DiskSpaceError or AccessError where the folder cannot be written.
    """

    def __init__(self, folder: Path, shape: TraceShape, extent: Extent) -> None:
        self._folder = folder
        self._left = {name: list(dims) for name, dims in shape.arrays(extent).items()}
        self._files: dict[str, BinaryIO] = {}
        with disk_errors():
            for name, dims in self._left.items():
                self._files[name] = (folder / f"{name}.npy").open("xb")
                header = {"descr": _STORED.str, "fortran_order": False, "shape": tuple(dims)}
                np.lib.format.write_array_header_1_0(self._files[name], header)

    def append(self, name: str, rows: Rows) -> None:
        """The next layer's rows [positions, width]; ignored where the extent does not hold that array."""
        if name not in self._files:
            return
        assert self._left[name][0] > 0
        assert list(rows.shape) == self._left[name][1:]
        self._left[name][0] -= 1
        with disk_errors():
            self._files[name].write(np.ascontiguousarray(rows, _STORED).data)

    def finish(self, peaks: Mapping[str, tuple[Peak, ...]]) -> None:
        """Closes the files; every layer must have been written."""
        assert all(dims[0] == 0 for dims in self._left.values()), self._left
        self.close()
        content = {name: [[peak.largest, peak.non_finite] for peak in row] for name, row in peaks.items()}
        with disk_errors():
            (self._folder / PEAKS_NAME).write_text(json.dumps(content, allow_nan=False), encoding="ascii")

    def close(self) -> None:
        with disk_errors():
            for file in self._files.values():
                file.close()


class Trace:
    """A finished trace. Its files are held open, so that the folder may be removed; they are mapped while read.

    peaks: by name, one of each layer: of every name of OPS and EXPERT_PARTS in `layer_hooks`, `residual`, and
    `hidden`, which has one more, of what the final norm gets; of `router` alone for the extent `routing`.
    Padding is in none of them.
    """

    def __init__(self, folder: Path, shape: TraceShape, extent: Extent) -> None:
        """Raises ValueError for files that are not of this shape, CheckpointError for missing ones."""
        self.shape, self.extent = shape, extent
        self._ends = np.cumsum((0, *shape.lengths)).tolist()
        self._dims = shape.arrays(extent)
        self._files: dict[str, tuple[BinaryIO, int]] = {}
        for name, dims in self._dims.items():
            file, start = _open_array(folder / f"{name}.npy", dims)
            self._files[name] = file, start
            weakref.finalize(self, file.close)
        self.peaks = _read_peaks(folder / PEAKS_NAME)

    def hidden(self, layer: int, probe: int) -> Rows:
        """What enters the layer, [n, H]; for layer num_layers what the final norm gets.

        Raises LookupError for a trace of routing alone, IndexError for a layer or probe that is not there.
        """
        return self._map("hidden", layer, probe)

    def residual(self, layer: int, probe: int) -> Rows:
        """The stream after attention, which enters post_attention_layernorm, [n, H]; errors as for `hidden`."""
        return self._map("residual", layer, probe)

    def router_logits(self, layer: int, probe: int) -> Rows:
        """Logits of all experts, [n, E]; IndexError as for `hidden`."""
        return self._map("router_logits", layer, probe)

    def final(self, probe: int) -> Rows:
        """After the final norm, which is what lm_head gets, [n, H]."""
        return self._map("final", 0, probe)

    def _map(self, name: str, layer: int, probe: int) -> Rows:
        if name not in self._files:
            raise LookupError(f"{name} was not recorded: this trace is of {self.extent} alone")
        layers, positions, width = self._dims[name]
        if not (0 <= layer < layers and 0 <= probe < len(self.shape.lengths)):
            raise IndexError(f"layer {layer} of {layers}, probe {probe} of {len(self.shape.lengths)}")
        file, header = self._files[name]
        start, stop = self._ends[probe], self._ends[probe + 1]
        offset = header + (layer * positions + start) * width * _STORED.itemsize
        return np.asarray(np.memmap(file, _STORED, "r", offset, (stop - start, width)))


def _open_array(path: Path, dims: tuple[int, ...]) -> tuple[BinaryIO, int]:
    """The open file and where its data begin."""
    file = open_regular(path)
    try:
        start = data_offset(file.read(PREFIX_BYTES))
        found = header_shape(file.read(start - PREFIX_BYTES))
        nbytes = stamp_of(file).nbytes - start
        if found != dims or nbytes != math.prod(dims) * _STORED.itemsize:
            raise ValueError(f"{list(found)} in {nbytes} bytes, expected {list(dims)}")
    except ValueError as error:
        file.close()
        raise ValueError(f"{path.name}: {error}") from error
    except BaseException:
        file.close()
        raise
    return file, start


def _read_peaks(path: Path) -> dict[str, tuple[Peak, ...]]:
    with open_regular(path) as file:
        raw = parse_json_object(read_capped(file, MAX_PEAKS_BYTES), path.name, ConfigError)
    peaks: dict[str, tuple[Peak, ...]] = {}
    for name, row in raw.items():
        if not isinstance(row, list) or not all(_is_peak(pair) for pair in row):
            raise ValueError(f"{path.name}: {shown(name)} is no list of peaks")
        peaks[name] = tuple(Peak(float(largest), non_finite) for largest, non_finite in row)
    return peaks


def _is_peak(pair: object) -> bool:
    if not isinstance(pair, list) or len(pair) != 2 or any(isinstance(value, bool) for value in pair):
        return False
    largest, non_finite = pair
    return isinstance(largest, int | float) and largest >= 0 and isinstance(non_finite, int) and non_finite >= 0


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk, or one that may not be written, becomes an error with a next step."""
    next_step = "Free space, or set TMPDIR and GPTOSS_EXPORT_CACHE to folders on a disk that has some."
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError("no space left for the reference's states", next_step) from error
        if isinstance(error, PermissionError | FileNotFoundError) or error.errno == errno.EROFS:
            raise AccessError(f"the reference's states cannot be written: {error.strerror}", next_step) from error
        raise

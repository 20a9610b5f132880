"""The weights that an engine takes as inputs, from their files to the device, through a few pinned megabytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gptoss_export.engines.external_data import check_weight_file
from gptoss_export.engines.tensorrt.cuda import Device, DeviceMemory
from gptoss_export.engines.tensorrt.metadata import EngineInput, EngineMetadata
from gptoss_export.exporter.errors import IntegrityError
from gptoss_export.exporter.inside import open_inside

CHUNK_BYTES = 16 << 20
"""Of each of two buffers: one is read into while the other is copied."""


def upload_weights(folder: Path, metadata: EngineMetadata, device: Device) -> dict[str, DeviceMemory]:
    """Device memory with the bytes of every external weight, by the engine's names.

    Raises OutOfMemoryError, IntegrityError for a file that ends too early, or that is not the artifact's.
    """
    weights = {name: device.allocate(entry.nbytes) for name, entry in metadata.inputs.items()}
    buffers = [(device.pin(CHUNK_BYTES), device.stream()) for _ in range(2)] if weights else []
    turn = 0
    try:
        for file, names in _by_file(metadata).items():
            last = metadata.inputs[names[-1]]
            check_weight_file(folder, file, last.offset + last.nbytes)
            with open_inside(folder, file) as source:
                for name in names:
                    for done, offset, nbytes in _chunks(metadata.inputs[name]):
                        buffer, stream = buffers[turn]
                        turn = 1 - turn
                        stream.synchronize()  # what was in the buffer before has left it
                        _read(source.fileno(), buffer.array[:nbytes].data, offset, folder / file)
                        stream.upload(weights[name].pointer + done, buffer, nbytes)
    finally:
        for buffer, stream in buffers:
            stream.synchronize()
            stream.close()
            buffer.close()
    return weights


def _by_file(metadata: EngineMetadata) -> dict[str, list[str]]:
    """Names by file, in the order of their bytes, which is the order that disks like."""
    files: dict[str, list[str]] = {}
    for name, entry in sorted(metadata.inputs.items(), key=lambda item: (item[1].file, item[1].offset)):
        files.setdefault(entry.file, []).append(name)
    return files


def _chunks(entry: EngineInput) -> Iterator[tuple[int, int, int]]:
    """(bytes before, offset in the file, bytes) of each chunk."""
    for done in range(0, entry.nbytes, CHUNK_BYTES):
        yield done, entry.offset + done, min(CHUNK_BYTES, entry.nbytes - done)


def _read(descriptor: int, target: memoryview, offset: int, path: Path) -> None:
    while target:
        nbytes = os.preadv(descriptor, [target], offset)
        if nbytes == 0:
            raise IntegrityError(
                f"{path} ends at byte {offset}, within a weight", "copy the artifact again from where it was made"
            )
        target, offset = target[nbytes:], offset + nbytes

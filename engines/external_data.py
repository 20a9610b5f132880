"""model.onnx of an artifact, read once, with every file that it points to checked before a runtime sees it.

    model = read_model(folder)        # bytes; hand these to the runtime, not the path

ONNX external data is a path, an offset and a length out of an untrusted file. Readers have followed the path out of the
folder, through `..` and through links, and set keys that the format does not have as attributes of their own objects.
The known keys are taken here, no others, and each location has to be a regular file below the folder that the manifest
lists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_export.exporter.artifact import MANIFEST_NAME, MODEL_NAME, Manifest, read_manifest
from gptoss_export.exporter.checkpoint.files import read_capped, shown
from gptoss_export.exporter.errors import IntegrityError, SessionError
from gptoss_export.exporter.inside import AGAIN, open_inside
from gptoss_export.exporter.weights import WeightsMode

if TYPE_CHECKING:
    import onnx

MAX_MODEL_BYTES = 256 << 20
"""A graph without weights has 1 to 3 MB."""

_KEYS = {"location", "offset", "length", "checksum"}
_NUMBER = re.compile(r"[0-9]{1,18}")


def read_model(folder: Path) -> bytes:
    """The bytes of `folder`/model.onnx, whose references were checked.

    Raises SessionError for what is no ONNX, IntegrityError for a file that is not the manifest's or a reference that
    leads elsewhere. While an artifact is being made it has no manifest; then the files have to be in the folder.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    listed = _Listed(folder, read_manifest(folder) if os.path.lexists(folder / MANIFEST_NAME) else None)
    with open_inside(folder, MODEL_NAME) as file:
        data = read_capped(file, MAX_MODEL_BYTES)
    if len(data) > MAX_MODEL_BYTES:
        raise SessionError(f"{folder / MODEL_NAME} has more than {MAX_MODEL_BYTES} bytes", "Export again.")
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise SessionError(f"{folder / MODEL_NAME} cannot be read as ONNX: {error}", "Export again.") from error
    for tensor in tensors_of(model):
        _check(tensor, listed)
    return data


def check_weight_file(folder: Path, name: str, end: int) -> None:
    """Raises IntegrityError unless `name` is a file of the artifact in `folder` that has at least `end` bytes."""
    listed = _Listed(folder, read_manifest(folder) if os.path.lexists(folder / MANIFEST_NAME) else None)
    if listed.size(name) < end:
        raise IntegrityError(f"{folder / name} has {listed.size(name)} bytes, and {end} are read of it", AGAIN)


@dataclass
class _Listed:
    """Sizes of the files of an artifact that may be read, each looked at once."""

    folder: Path
    manifest: Manifest | None
    sizes: dict[str, int] = field(default_factory=dict)

    def size(self, name: str) -> int:
        if name not in self.sizes:
            self.sizes[name] = self._size(name)
        return self.sizes[name]

    def _size(self, name: str) -> int:
        with open_inside(self.folder, name) as file:
            status = os.fstat(file.fileno())
        if self.manifest is None:
            return status.st_size
        record = self.manifest.files.get(name)
        if record is None or record.nbytes != status.st_size:
            raise IntegrityError(
                f"{self.folder / name} is not a file that the manifest lists, or of another size", AGAIN
            )
        if status.st_nlink > 1 and self.manifest.weights_mode is WeightsMode.COPY:
            raise IntegrityError(
                f"{self.folder / name} is a hard link, and the manifest says that the weights were copied",
                "copy the artifact with `cp -r`, which makes files of its own",
            )
        return status.st_size


def _check(tensor: onnx.TensorProto, listed: _Listed) -> None:
    import onnx

    model = listed.folder / MODEL_NAME
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not external and not tensor.external_data:
        return
    # Strings that are not UTF-8 come out of a message as bytes.
    given = {e.key: e.value for e in tensor.external_data if isinstance(e.key, str) and isinstance(e.value, str)}
    if not external or len(given) != len(tensor.external_data) or "location" not in given or not given.keys() <= _KEYS:
        raise IntegrityError(
            f"{model}: the external data of {shown(tensor.name)} has {len(tensor.external_data)} keys, the first "
            f"{shown(next(iter(given), None))}; location, offset, length and checksum are all that there can be, "
            "once each, in UTF-8",
            AGAIN,
        )
    numbers = [given.get("offset", "0"), given.get("length", "0")]
    if not all(_NUMBER.fullmatch(number) for number in numbers):
        raise IntegrityError(f"{model}: {shown(tensor.name)} has an offset or length that is no size", AGAIN)
    try:
        size = listed.size(given["location"])
    except IntegrityError as error:
        raise IntegrityError(f"{model}: the external data of {shown(tensor.name)}: {error.what}", AGAIN) from error
    end = sum(map(int, numbers))
    if end > size:
        raise IntegrityError(
            f"{model}: {shown(tensor.name)} ends at byte {end} of {given['location']}, which has {size}", AGAIN
        )


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds, in graphs, subgraphs, attributes, functions and training information alike."""
    import onnx

    waiting: list[Any] = [model]
    while waiting:
        message = waiting.pop()
        if isinstance(message, onnx.TensorProto):
            yield message
            continue
        for described, value in message.ListFields():
            if described.message_type is None:
                continue
            waiting.extend([value] if hasattr(value, "ListFields") else value)

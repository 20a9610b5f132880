"""engine.json: what an engine was built with and which bytes of which weights file it reads.

    write_metadata(EngineMetadata(...), folder)
    metadata = read_metadata(folder)          # checked; the folder may come from anybody

It lies beside engine.plan, whose own header is TensorRT's secret.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from gptoss_export.engines.tensorrt.cache import Limits
from gptoss_export.engines.tensorrt.flavor import FlavorName
from gptoss_export.engines.tensorrt.options import EngineWeights
from gptoss_export.exporter.checkpoint.files import read_capped, shown
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import ManifestError
from gptoss_export.exporter.inside import is_plain_path, open_inside

ENGINE_NAME = "engine.plan"
METADATA_NAME = "engine.json"
SCHEMA_VERSION = 1
MAX_METADATA_BYTES = 4 << 20

PrecisionName = Literal["fp16", "bf16", "fp32"]

_FLAVORS: tuple[FlavorName, ...] = ("rtx", "tensorrt")
_PRECISIONS: tuple[PrecisionName, ...] = ("fp16", "bf16", "fp32")
_ENGINE_WEIGHTS: tuple[EngineWeights, ...] = ("external", "embedded")
_MOST = {"max_batch": 1 << 12, "max_prompt": 1 << 20, "max_context": 1 << 24, "max_logits": 1 << 20}
_MOST_BYTES = 1 << 50
_ITEM_BYTES = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
_CAPABILITY = re.compile(r"([1-9][0-9]?)\.([0-9])(\+?)")
_VERSION = re.compile(r"[0-9]+(\.[0-9A-Za-z]+){1,5}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NEXT_STEP = "export again; the file is not as it was written"
_T = TypeVar("_T")


@dataclass(frozen=True)
class EngineInput:
    """A weight that the engine takes as an input: bytes `offset` to `offset + nbytes` of a file of the artifact.

    file: relative to the artifact. dtype: safetensors' name of the stored type.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class EngineMetadata:
    """An engine, described.

    version: of the package of that flavor, to which the engine is bound. compute_capabilities: `8.9`, or `8.0+` for
    that one and all later ones. dtype: of matmuls, attention and cache. plugin: whether the experts are a plugin.
    max_prompt: columns of one execution. max_context: columns of a text. max_logits: logit rows of one execution.
    inputs: by the engine's names; empty exactly when the weights are embedded.
    """

    flavor: FlavorName
    version: str
    compute_capabilities: tuple[str, ...]
    dtype: PrecisionName
    engine_weights: EngineWeights
    max_batch: int
    max_prompt: int
    max_context: int
    max_logits: int
    plugin: bool
    engine_sha256: str
    inputs: Mapping[str, EngineInput]

    @property
    def limits(self) -> Limits:
        return Limits(self.max_batch, self.max_prompt, self.max_context, self.max_logits)

    @property
    def input_bytes(self) -> int:
        """Device memory that the external weights take."""
        return sum(entry.nbytes for entry in self.inputs.values())

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of that compute capability (major, minor) is among those the engine was built for."""
        for text in self.compute_capabilities:
            if match := _CAPABILITY.fullmatch(text):
                built = (int(match[1]), int(match[2]))
                if capability == built or (match[3] and capability > built):
                    return True
        return False


def write_metadata(metadata: EngineMetadata, folder: Path) -> Path:
    """Writes engine.json; the same metadata give the same bytes."""
    path = folder / METADATA_NAME
    content = {"schema_version": SCHEMA_VERSION} | asdict(metadata)
    path.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="ascii")
    return path


def read_metadata(folder: Path) -> EngineMetadata:
    """The metadata of the engine in `folder`, every field checked.

    Raises IntegrityError when there is no such regular file, ManifestError for one that is malformed, of another
    schema, or that names files outside of the folder.
    """
    path = folder / METADATA_NAME
    with open_inside(folder, METADATA_NAME) as f:
        data = read_capped(f, MAX_METADATA_BYTES)
    if len(data) > MAX_METADATA_BYTES:
        raise _malformed(f"it has more than {MAX_METADATA_BYTES} bytes")
    raw = parse_json_object(data, METADATA_NAME, ManifestError, next_step=_NEXT_STEP)
    if raw.get("schema_version") != SCHEMA_VERSION or isinstance(raw.get("schema_version"), bool):
        raise ManifestError(
            f"{path} has schema version {shown(raw.get('schema_version'))}; this tool reads {SCHEMA_VERSION}",
            "use the version of gptoss-export that made the artifact, or export again",
        )
    return _from_dict(raw)


def _from_dict(raw: Mapping[str, object]) -> EngineMetadata:
    sizes = {name: _integer(raw, name, 1, most) for name, most in _MOST.items()}
    if sizes["max_logits"] < sizes["max_batch"]:
        raise _malformed(f"max_logits {sizes['max_logits']} is less than max_batch {sizes['max_batch']}")
    weights = _choice(raw, "engine_weights", _ENGINE_WEIGHTS)
    inputs = _inputs(_get(raw, "inputs", dict))
    if (weights == "external") != bool(inputs):
        raise _malformed(f"engine_weights is {weights!r}, and there are {len(inputs)} inputs")
    return EngineMetadata(
        flavor=_choice(raw, "flavor", _FLAVORS),
        version=_matching(_get(raw, "version", str), _VERSION, "version"),
        compute_capabilities=_capabilities(_get(raw, "compute_capabilities", list)),
        dtype=_choice(raw, "dtype", _PRECISIONS),
        engine_weights=weights,
        max_batch=sizes["max_batch"],
        max_prompt=sizes["max_prompt"],
        max_context=sizes["max_context"],
        max_logits=sizes["max_logits"],
        plugin=_get(raw, "plugin", bool),
        engine_sha256=_matching(_get(raw, "engine_sha256", str), _SHA256, "engine_sha256"),
        inputs=inputs,
    )


def _inputs(raw: Mapping[str, object]) -> dict[str, EngineInput]:
    return {_plain(name): _input(name, _get(raw, name, dict)) for name in raw}


def _input(name: str, raw: Mapping[str, object]) -> EngineInput:
    dtype = _choice(raw, "dtype", tuple(_ITEM_BYTES))
    shape = _get(raw, "shape", list)
    if not 0 < len(shape) <= 8 or not all(type(size) is int and 0 < size <= _MOST_BYTES for size in shape):
        raise _malformed(f"the shape of {name} is no list of sizes")
    nbytes = _integer(raw, "nbytes", 1, _MOST_BYTES)
    if math.prod(shape) * _ITEM_BYTES[dtype] != nbytes:
        raise _malformed(f"{name} has {nbytes} bytes, which {dtype} {shape} does not take")
    return EngineInput(
        file=_inside(_get(raw, "file", str)),
        dtype=dtype,
        shape=tuple(shape),
        offset=_integer(raw, "offset", 0, _MOST_BYTES),
        nbytes=nbytes,
    )


def _capabilities(raw: list[object]) -> tuple[str, ...]:
    if not 0 < len(raw) <= 64:
        raise _malformed(f"compute_capabilities is a list of {len(raw)}")
    texts = tuple(text for text in raw if isinstance(text, str) and _CAPABILITY.fullmatch(text))
    if len(texts) != len(raw):
        raise _malformed("compute_capabilities are not all like 8.9 or 8.0+")
    return texts


def _plain(name: str) -> str:
    if not name.isprintable() or not 0 < len(name) <= 256:
        raise _malformed(f"{shown(name)} is no name of a tensor")
    return name


def _inside(name: str) -> str:
    """A path below the artifact's folder, written the one way that names it."""
    if not is_plain_path(name):
        raise _malformed(f"{shown(name)} is no path inside of the artifact")
    return name


def _get(raw: Mapping[str, object], name: str, kind: type[_T]) -> _T:
    value = raw.get(name)
    if not isinstance(value, kind):
        raise _malformed(f"{shown(name)} is {shown(value)}, which is no {kind.__name__}")
    return value


def _integer(raw: Mapping[str, object], name: str, low: int, high: int) -> int:
    value = raw.get(name)
    if type(value) is not int or not low <= value <= high:
        raise _malformed(f"{name} is {shown(value)}, which is no integer from {low} to {high}")
    return value


def _choice(raw: Mapping[str, object], name: str, choices: tuple[_T, ...]) -> _T:
    value = raw.get(name)
    for choice in choices:
        if value == choice:
            return choice
    raise _malformed(f"{name} is {shown(value)}, which is none of {', '.join(str(c) for c in choices)}")


def _matching(text: str, pattern: re.Pattern[str], name: str) -> str:
    if not pattern.fullmatch(text) or len(text) > 64:
        raise _malformed(f"{name} is {shown(text)}")
    return text


def _malformed(problem: str) -> ManifestError:
    return ManifestError(f"{METADATA_NAME}: {problem}", _NEXT_STEP)

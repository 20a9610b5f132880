"""engine.json: what is written comes back, and nothing hostile gets through."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_export.engines.tensorrt.cache import Limits
from gptoss_export.engines.tensorrt.metadata import (
    MAX_METADATA_BYTES,
    METADATA_NAME,
    EngineInput,
    EngineMetadata,
    read_metadata,
    write_metadata,
)
from gptoss_export.exporter.errors import IntegrityError, ManifestError

EXTERNAL = EngineMetadata(
    flavor="rtx",
    version="1.7.1.116",
    compute_capabilities=("8.0+",),
    dtype="fp16",
    engine_weights="external",
    max_batch=2,
    max_prompt=512,
    max_context=4096,
    max_logits=128,
    plugin=True,
    engine_sha256="0" * 64,
    inputs={"model.embed_tokens.weight": EngineInput("weights/model.safetensors", "BF16", (8, 4), 128, 64)},
)
EMBEDDED = replace(EXTERNAL, flavor="tensorrt", version="10.16.0.72", engine_weights="embedded", inputs={})


@pytest.mark.parametrize("metadata", [EXTERNAL, EMBEDDED], ids=["external", "embedded"])
def test_what_is_written_is_read(metadata: EngineMetadata, tmp_path: Path) -> None:
    path = write_metadata(metadata, tmp_path)
    assert path.name == "engine.json"
    assert read_metadata(tmp_path) == metadata
    first = path.read_bytes()
    assert write_metadata(read_metadata(tmp_path), tmp_path).read_bytes() == first
    assert json.loads(first)["schema_version"] == 1


def test_what_a_runner_derives() -> None:
    assert EXTERNAL.limits == Limits(max_batch=2, max_prompt=512, max_context=4096, max_logits=128)
    assert EXTERNAL.input_bytes == 64
    assert EMBEDDED.input_bytes == 0


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        (("8.0+",), (8, 0), True),
        (("8.0+",), (9, 0), True),
        (("8.0+",), (12, 0), True),
        (("8.0+",), (7, 5), False),
        (("8.9",), (8, 9), True),
        (("8.9",), (9, 0), False),
        (("8.9",), (8, 6), False),
        (("8.0", "12.0+"), (12, 1), True),
        (("8.0", "12.0+"), (9, 0), False),
    ],
)
def test_compute_capabilities(built: tuple[str, ...], device: tuple[int, int], runs: bool) -> None:
    assert replace(EXTERNAL, compute_capabilities=built).runs_on(device) is runs


def hostile(change: dict[str, object], folder: Path) -> None:
    path = write_metadata(EXTERNAL, folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"schema_version": True},
        {"schema_version": None},
        {"flavor": "TensorRT"},
        {"flavor": ["rtx"]},
        {"version": 1.7},
        {"version": "1.7; rm"},
        {"version": "1." + "7" * 100},
        {"compute_capabilities": []},
        {"compute_capabilities": "8.0+"},
        {"compute_capabilities": ["8.0+", 8]},
        {"compute_capabilities": ["sm_80"]},
        {"compute_capabilities": ["8.0"] * 65},
        {"dtype": "int8"},
        {"engine_weights": "embedded"},
        {"engine_weights": None},
        {"max_batch": 0},
        {"max_batch": True},
        {"max_batch": 2.0},
        {"max_batch": 129},
        {"max_prompt": -1},
        {"max_context": 1 << 40},
        {"max_logits": "128"},
        {"plugin": 1},
        {"engine_sha256": "0" * 63},
        {"engine_sha256": "g" * 64},
        {"inputs": {}},
        {"inputs": []},
    ],
)
def test_hostile_fields_are_named(change: dict[str, object], tmp_path: Path) -> None:
    hostile(change, tmp_path)
    with pytest.raises(ManifestError) as caught:
        read_metadata(tmp_path)
    assert "\n" not in caught.value.what
    # A field that contradicts another may be reported by either name.
    assert next(iter(change)).split("_")[0] in caught.value.what


@pytest.mark.parametrize(
    "change",
    [
        {"file": None},
        {"file": "../outside"},
        {"file": "/etc/passwd"},
        {"file": "weights/../../outside"},
        {"file": "weights//model.safetensors"},
        {"file": "."},
        {"file": ""},
        {"file": "a\\b"},
        {"file": "a\nb"},
        {"file": 3},
        {"dtype": "F4"},
        {"shape": [8, 5]},
        {"shape": [8.0, 4]},
        {"shape": [-8, -4]},
        {"shape": []},
        {"shape": [1] * 9},
        {"shape": 32},
        {"offset": -1},
        {"offset": 1 << 60},
        {"offset": False},
        {"nbytes": 63},
        {"nbytes": 0},
    ],
)
def test_hostile_inputs_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    entry = {"file": "weights/model.safetensors", "dtype": "BF16", "shape": [8, 4], "offset": 128, "nbytes": 64}
    hostile({"inputs": {"w": entry}}, tmp_path)
    assert read_metadata(tmp_path).inputs["w"].shape == (8, 4), "the entry itself is good"
    hostile({"inputs": {"w": entry | change}}, tmp_path)
    with pytest.raises(ManifestError, match=r"engine\.json"):
        read_metadata(tmp_path)


def test_names_that_no_terminal_should_see_are_escaped(tmp_path: Path) -> None:
    entry = {"file": "w", "dtype": "U8", "shape": [1], "offset": 0, "nbytes": 1}
    hostile({"inputs": {"\x1b[2J": entry}}, tmp_path)
    with pytest.raises(ManifestError) as caught:
        read_metadata(tmp_path)
    assert "\x1b" not in caught.value.what


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"flavor": "rtx", "flavor": "rtx"}', b"\xff", b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / METADATA_NAME).write_bytes(data)
    with pytest.raises(ManifestError):
        read_metadata(tmp_path)


def test_size_and_absence(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="missing"):
        read_metadata(tmp_path)
    path = write_metadata(EXTERNAL, tmp_path)
    path.write_bytes(path.read_bytes() + b" " * MAX_METADATA_BYTES)
    with pytest.raises(ManifestError, match="more than"):
        read_metadata(tmp_path)

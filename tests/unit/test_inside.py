"""Files of a delivered folder: what a name may reach, and what a graph may point to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from onnx import ModelProto, TensorProto, helper

from gptoss_export.engines.external_data import check_weight_file, read_model, tensors_of
from gptoss_export.exporter.artifact import Manifest, ParityRecord, write_manifest
from gptoss_export.exporter.checkpoint.links import AllowedPlaces
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import IntegrityError, UnsafeFileError
from gptoss_export.exporter.inside import is_plain_path, open_inside
from gptoss_export.exporter.weights import WeightsMode, hash_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "release"
    (made / "weights").mkdir(parents=True)
    (made / "weights" / "data.bin").write_bytes(b"content" * 8)
    (tmp_path / "secret").write_bytes(b"private" * 8)
    return made


@pytest.mark.parametrize("name", ["a", "a/b.c", "weights/model-00001.safetensors", "..a", "a..b/c", "a b", "é"])
def test_plain_paths(name: str) -> None:
    assert is_plain_path(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../a", "a/..", "a/../b", "/a", "//a", "a//b", "a/", "./a", "a\\b", "a\0", "a\nb", "\ud800"),
        *("\u202ea", "x" * 256, "é" * 128, "x/" * 2048 + "x"),
    ],
)
def test_names_that_are_no_plain_path(name: str, folder: Path) -> None:
    assert not is_plain_path(name)
    with pytest.raises(IntegrityError, match="no path inside") as caught:
        open_inside(folder, name)
    assert caught.value.what.isprintable()


def test_a_file_is_opened_even_if_the_folder_is_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(folder)
    with open_inside(tmp_path / "current", "weights/data.bin") as file:
        assert file.read() == b"content" * 8


def test_no_step_may_be_a_link_or_anything_else(folder: Path, tmp_path: Path) -> None:
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "within").symlink_to("weights/data.bin")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "fifo")
    for name in ("link", "within", "up/secret", "fifo", "weights", "none", "weights/data.bin/x"):
        with pytest.raises(IntegrityError):
            open_inside(folder, name)


def test_descriptors_are_closed(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for name in ("weights/data.bin", "weights/none", "weights"):
        try:
            open_inside(folder, name).close()
        except IntegrityError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_links_may_end_in_the_blobs_of_the_same_snapshot_alone(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    other = tmp_path / "models--c--d" / "blobs"
    blobs = tmp_path / "models--a--b" / "blobs"
    for made in (snapshot, other, blobs):
        made.mkdir(parents=True)
    (snapshot / "good").symlink_to("../../blobs/1")
    (snapshot / "bad").symlink_to("../../../models--c--d/blobs/1")
    (snapshot / "loop").symlink_to("loop")
    places = AllowedPlaces.of(snapshot)
    for name in ("good", "plain", "loop"):
        places.check(snapshot / name)
    with pytest.raises(UnsafeFileError, match="out of the checkpoint"):
        places.check(snapshot / "bad")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "x").symlink_to(blobs)
    with pytest.raises(UnsafeFileError, match="out of the checkpoint"):
        AllowedPlaces.of(tmp_path / "plain").check(tmp_path / "plain" / "x")


def external(name: str, location: str = "weights/data.bin") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.UINT8, dims=[8], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_tensors_are_found_wherever_a_model_can_hold_them() -> None:
    inner = helper.make_graph([], "inner", [], [], [external("subgraph")])
    nodes = [
        helper.make_node("If", ["c"], [], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["y"], value=external("attribute")),
        helper.make_node("Custom", [], [], many=[external("list")], graphs=[inner]),
    ]
    sparse = helper.make_sparse_tensor(external("values"), external("indices"), [8])
    function = helper.make_function("d", "F", [], ["y"], [nodes[1]], [helper.make_opsetid("", 20)])
    graph = helper.make_graph(nodes, "g", [], [], [external("initializer")], sparse_initializer=[sparse])
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().initialization.initializer.append(external("training"))
    names = [tensor.name for tensor in tensors_of(ModelProto.FromString(model.SerializeToString()))]
    assert sorted(names) == sorted(
        ["subgraph"] * 3 + ["attribute"] * 2 + ["list", "values", "indices", "initializer", "training"]
    )


@pytest.mark.parametrize("mode", WeightsMode)
def test_hard_links_are_what_the_manifest_says(mode: WeightsMode, folder: Path, tiny: Checkpoint) -> None:
    graph = helper.make_graph([], "g", [], [], [external("w")])
    (folder / "model.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    os.link(folder / "weights" / "data.bin", folder.parent / "again")
    assert read_model(folder)  # an artifact that is being made has no manifest
    files = hash_files({name: folder / name for name in ("model.onnx", "weights/data.bin")})
    manifest = Manifest(
        {}, "onnx", "e", "p", (), tiny.layout, tiny.config, {}, mode, "weights", files,
        ParityRecord("not validated"), "2026-01-02T03:04:05+00:00",
    )  # fmt: skip
    write_manifest(manifest, folder)
    if mode is WeightsMode.COPY:
        with pytest.raises(IntegrityError, match="hard link"):
            read_model(folder)
        with pytest.raises(IntegrityError, match="hard link"):
            check_weight_file(folder, "weights/data.bin", 1)
    else:
        assert read_model(folder)
        check_weight_file(folder, "weights/data.bin", 56)
        with pytest.raises(IntegrityError, match="57 are read"):
            check_weight_file(folder, "weights/data.bin", 57)

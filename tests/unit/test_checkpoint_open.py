"""Opening checkpoints: three layouts, the Hub cache's links, and every way in which a folder can be broken."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gptoss_export.exporter.checkpoint import read as reading
from gptoss_export.exporter.checkpoint.layouts import detect_layout, stored_tensors
from gptoss_export.exporter.checkpoint.mxfp4 import decode, decode_bf16
from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.synth import PRESETS, SynthShape, raw_config, synthesize
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import (
    AbsurdSizeError,
    AmbiguousRopeError,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    DuplicateTensorError,
    HeaderError,
    IntegrityError,
    InvalidScaleError,
    MissingTensorError,
    OverlappingTensorError,
    ShardIndexError,
    SurplusTensorError,
    TruncatedFileError,
    UnsafeFileError,
    WrongDtypeError,
    WrongShapeError,
)

SHAPE = SynthShape(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_experts=4,
    top_k=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
)
INDEX = "model.safetensors.index.json"


class Broken:
    """A small checkpoint in a folder, taken apart so that a test can put it together wrongly."""

    def __init__(self, root: Path, name: str = "model.safetensors") -> None:
        self.root = root
        self.file = root / name
        raw = self.file.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        self.header = json.loads(raw[8 : 8 + length])
        self.header.pop("__metadata__")
        self.payload = bytearray(raw[8 + length :])

    def rename(self, old: str, new: str) -> None:
        self.header[new] = self.header.pop(old)

    def append(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        begin = len(self.payload)
        self.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
        self.payload += data

    def drop(self, name: str) -> None:
        begin, end = self.header.pop(name)["data_offsets"]
        del self.payload[begin:end]
        for fields in self.header.values():
            if fields["data_offsets"][0] >= end:
                fields["data_offsets"] = [o - (end - begin) for o in fields["data_offsets"]]

    def save(self) -> None:
        data = json.dumps(self.header).encode()
        self.file.write_bytes(len(data).to_bytes(8, "little") + data + bytes(self.payload))


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    synthesize(root / "single", SHAPE)
    synthesize(root / "sharded", SHAPE, shard_bytes=30_000)
    synthesize(root / "original", SHAPE, layout=Layout.ORIGINAL)
    synthesize(root / "bf16", SHAPE, layout=Layout.HF_BF16)
    return root


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(pristine / kind, tmp_path / kind)


def edit_json(path: Path, edit: Callable[[dict], None]) -> None:
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


# --- what is good ---------------------------------------------------------------------------------------------------


def test_the_released_format(tiny_dir: Path):
    checkpoint = open_checkpoint(tiny_dir)
    assert checkpoint.layout is Layout.HF_MXFP4
    assert checkpoint.root == tiny_dir
    assert [f.name for f in checkpoint.weight_files] == [f"model-0000{n}-of-00002.safetensors" for n in (0, 1)]
    assert [f.name for f in checkpoint.side_files] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    assert checkpoint.config.eos_token_ids == (2041, 2040, 2047)
    assert checkpoint.raw_config["transformers_version"] == "4.55.0"
    assert checkpoint.nbytes == sum(f.stat().st_size for f in tiny_dir.glob("*.safetensors"))
    check_scales(checkpoint)


def test_tensors_are_those_that_safetensors_reads(tiny_dir: Path):
    from safetensors.numpy import load_file

    checkpoint = open_checkpoint(tiny_dir)
    expected = {name: tensor for f in checkpoint.weight_files for name, tensor in load_file(f).items()}
    assert set(checkpoint.tensors) == set(expected)
    for name, ref in checkpoint.tensors.items():
        mapped = read_tensor(ref)
        assert mapped.dtype == (np.uint8 if ref.dtype == "U8" else ml_dtypes.bfloat16)
        assert mapped.shape == ref.shape == expected[name].shape
        assert mapped.tobytes() == expected[name].tobytes()
        assert not mapped.flags.writeable


def test_all_layouts_are_one_network(tiny_layouts: dict[Layout, Path]):
    opened = {layout: open_checkpoint(folder) for layout, folder in tiny_layouts.items()}
    assert all(c.layout is layout for layout, c in opened.items())
    assert len({c.config for c in opened.values()}) == 1
    released, original, bf16 = (opened[k] for k in (Layout.HF_MXFP4, Layout.ORIGINAL, Layout.HF_BF16))
    assert list(original.tensors) == list(released.tensors)
    for name, ref in released.tensors.items():
        assert read_tensor(original.tensors[name]).tobytes() == read_tensor(ref).tobytes()
    for name, ref in bf16.tensors.items():
        if name in released.tensors:
            assert read_tensor(ref).tobytes() == read_tensor(released.tensors[name]).tobytes()
        else:
            blocks, scales = (read_tensor(released.tensors[f"{name}_{kind}"]) for kind in ("blocks", "scales"))
            assert (read_tensor(ref).astype(np.float32).transpose(0, 2, 1) == decode(blocks, scales)).all()


def test_stacked_qkv_is_split_by_rows(pristine: Path):
    from safetensors.numpy import load_file

    checkpoint = open_checkpoint(pristine / "original")
    stacked = load_file(pristine / "original" / "model.safetensors")["block.1.attn.qkv.weight"]
    rows = [read_tensor(checkpoint.tensors[f"model.layers.1.self_attn.{x}_proj.weight"]) for x in "qkv"]
    assert [r.shape for r in rows] == [(64, 32), (32, 32), (32, 32)]
    assert np.concatenate(rows).tobytes() == stacked.tobytes()
    ref = checkpoint.tensors["model.layers.1.self_attn.k_proj.bias"]
    assert (ref.stored_name, ref.nbytes) == ("block.1.attn.qkv.bias", 64)


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize(("preset", "parameters"), [("20b", 20_914_757_184), ("120b", 116_829_156_672)])
def test_the_table_counts_the_parameters_of_the_release(layout, preset, parameters):
    from gptoss_export.exporter.checkpoint.config import parse_config

    config = parse_config(raw_config(PRESETS[preset], layout))
    count = 0
    for tensor in stored_tensors(config, layout):
        if not tensor.name.endswith(("_scales", ".scales")):
            packed = tensor.name.endswith(("_blocks", ".blocks"))
            count += int(np.prod(tensor.shape, dtype=object)) * (2 if packed else 1)
    assert count == parameters
    assert detect_layout([t.name for t in stored_tensors(config, layout)]) is layout


def test_snapshot_of_links(pristine: Path, tmp_path: Path):
    """As huggingface_hub keeps it: snapshots/<commit>/ full of links into ../../blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for n, file in enumerate(sorted((pristine / "sharded").iterdir())):
        shutil.copy(file, blobs / str(n))
        (snapshot / file.name).symlink_to(f"../../blobs/{n}")
    (blobs / "tokenizer").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/tokenizer")
    checkpoint = open_checkpoint(snapshot)
    assert all(f.parent == snapshot and f.is_symlink() for f in checkpoint.weight_files)
    assert checkpoint.side_files == (snapshot / "tokenizer.json",)
    plain = open_checkpoint(pristine / "sharded")
    for name, ref in checkpoint.tensors.items():
        assert read_tensor(ref).tobytes() == read_tensor(plain.tensors[name]).tobytes()


def test_a_release_with_only_its_original_folder(pristine: Path, tmp_path: Path):
    shutil.copytree(pristine / "original", tmp_path / "original")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"model_type": "of the Hugging Face layout, which is not here"}')
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.root, checkpoint.layout) == (tmp_path / "original", Layout.ORIGINAL)
    assert checkpoint.config.eos_token_ids == (5, 6)
    assert tmp_path / "tokenizer.json" in checkpoint.side_files


def test_weights_of_its_own_come_before_the_original_folder(pristine: Path, copy):
    root = copy("single")
    shutil.copytree(pristine / "original", root / "original")
    assert open_checkpoint(root).layout is Layout.HF_MXFP4


def test_pickles_beside_safetensors_are_ignored(copy):
    root = copy("single")
    (root / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (root / "training_args.bin").write_bytes(b"\x80\x04")
    assert open_checkpoint(root).layout is Layout.HF_MXFP4


def test_odd_offsets_are_read(copy):
    """safetensors aligns tensors, others need not; NumPy maps them all the same."""
    root = copy("single")
    b = Broken(root)
    sinks = np.frombuffer(b.payload, ml_dtypes.bfloat16)[:4].copy()
    b.drop("model.layers.0.self_attn.sinks")
    b.append("model.layers.0.self_attn.sinks", "BF16", [4], sinks.tobytes())
    b.save()
    raw = b.file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    padding = b" " * (1 - length % 2)
    b.file.write_bytes(
        (length + len(padding)).to_bytes(8, "little") + raw[8 : 8 + length] + padding + raw[8 + length :]
    )
    ref = open_checkpoint(root).tensors["model.layers.0.self_attn.sinks"]
    assert ref.offset % 2
    assert (read_tensor(ref) == sinks).all()


# --- what is broken -------------------------------------------------------------------------------------------------

Q = "model.layers.1.self_attn.q_proj.weight"
SCALES = "model.layers.2.mlp.experts.down_proj_scales"


def missing(root: Path) -> None:
    b = Broken(root)
    b.drop(Q)
    b.save()


def surplus(root: Path) -> None:
    b = Broken(root)
    b.append("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", [1], bytes(4))
    b.save()


def wrong_dtype(root: Path) -> None:
    b = Broken(root)
    b.header[Q]["dtype"] = "F16"
    b.save()


def wrong_shape(root: Path) -> None:
    b = Broken(root)
    b.header[Q]["shape"].reverse()
    b.save()


def overlap(root: Path) -> None:
    b = Broken(root)
    b.header[Q]["data_offsets"] = b.header["lm_head.weight"]["data_offsets"]
    b.save()


def duplicate(root: Path) -> None:
    b = Broken(root)
    b.save()
    raw = b.file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    twice = raw[8 : 7 + length] + b"," + raw[9 : 8 + length]
    b.file.write_bytes(len(twice).to_bytes(8, "little") + twice + raw[8 + length :])


def truncated(root: Path) -> None:
    os.truncate(root / "model.safetensors", (root / "model.safetensors").stat().st_size - 1)


def trailing(root: Path) -> None:
    with (root / "model.safetensors").open("ab") as f:
        f.write(b"\0")


def config(**changes: object) -> Callable[[Path], None]:
    return lambda root: edit_json(root / "config.json", lambda c: c.update(changes))


def replaced(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(data) and None


def only_pickle(root: Path) -> None:
    (root / "model.safetensors").rename(root / "pytorch_model.bin")


def fifo(name: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        os.mkfifo(root / name)

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(target)

    return make


def other_network(root: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"model.layers.0.mlp.gate_proj.weight": np.zeros((2, 2))}, root / "model.safetensors")


def no_truncate(root: Path) -> None:
    edit_json(root / "config.json", lambda c: c["rope_scaling"].pop("truncate"))


SINGLE = {
    "missing": (missing, MissingTensorError, Q),
    "surplus": (surplus, SurplusTensorError, "inv_freq"),
    "wrong dtype": (wrong_dtype, WrongDtypeError, "F16, expected BF16"),
    "wrong shape": (wrong_shape, WrongShapeError, r"\[32, 64\], expected \[64, 32\]"),
    "overlap": (overlap, OverlappingTensorError, "share"),
    "duplicate": (duplicate, DuplicateTensorError, "twice"),
    "truncated": (truncated, TruncatedFileError, "model.safetensors"),
    "trailing": (trailing, HeaderError, "1 bytes"),
    "header": (replaced("model.safetensors", b"\0" * 64), HeaderError, "header"),
    "fewer layers than the weights": (
        config(num_hidden_layers=2, layer_types=["full_attention"] * 2),
        SurplusTensorError,
        "layers.2",
    ),
    "more layers than the weights": (
        config(num_hidden_layers=4, layer_types=["full_attention"] * 4),
        MissingTensorError,
        "layers.3",
    ),
    "another hidden size": (config(hidden_size=64), WrongShapeError, "embed_tokens"),
    "another expert count": (config(num_local_experts=8), WrongShapeError, "router"),
    "absurd": (config(num_hidden_layers=10**9), AbsurdSizeError, "num_hidden_layers"),
    "ambiguous rope": (no_truncate, AmbiguousRopeError, "truncate"),
    "no config": (lambda root: (root / "config.json").unlink(), ConfigError, "missing"),
    "config no json": (replaced("config.json", b"{"), ConfigError, "not JSON"),
    "config too large": (replaced("config.json", b" " * (5 << 20)), ConfigError, "bytes"),
    "generation_config no json": (replaced("generation_config.json", b"[]"), ConfigError, "generation_config"),
    "config is a FIFO": (fifo("config.json"), UnsafeFileError, "FIFO"),
    "weights are a FIFO": (fifo("model.safetensors"), UnsafeFileError, "FIFO"),
    "weights are a device": (link("model.safetensors", "/dev/zero"), UnsafeFileError, "out of the checkpoint"),
    "weights link nowhere": (link("model.safetensors", "../blobs/none"), UnsafeFileError, "link"),
    "tokenizer is a FIFO": (fifo("tokenizer.json"), UnsafeFileError, "FIFO"),
    "tokenizer links nowhere": (link("tokenizer.json", "none"), UnsafeFileError, "link"),
    "only pickle": (only_pickle, UnsafeFileError, "pickle"),
    "no weights": (lambda root: (root / "model.safetensors").unlink(), CheckpointNotFoundError, "no weights"),
    "shards without index": (
        lambda root: (root / "model.safetensors").rename(root / "model-00001-of-00002.safetensors"),
        CheckpointNotFoundError,
        "index",
    ),
    "another network": (other_network, CheckpointNotFoundError, "not the tensors"),
    "no tensors": (
        replaced("model.safetensors", b"\x02" + bytes(7) + b"{}"),
        CheckpointNotFoundError,
        "not the tensors",
    ),
}


def assert_refused(root: Path, error: type[CheckpointError], named: str) -> None:
    with pytest.raises(error, match=named) as e:
        open_checkpoint(root)
    assert type(e.value) is error
    assert "\n" not in e.value.what and len(e.value.what) < 600 and e.value.next_step


@pytest.mark.parametrize(("break_it", "error", "named"), SINGLE.values(), ids=SINGLE.keys())
def test_broken(copy, break_it, error, named):
    root = copy("single")
    open_checkpoint(root)
    break_it(root)
    assert_refused(root, error, named)


def second(root: Path) -> str:
    return sorted(set(json.loads((root / INDEX).read_text())["weight_map"].values()))[1]


def in_index(**entries: str) -> Callable[[Path], None]:
    names = {"norm": "model.norm.weight", "unknown": "no.such.tensor"}
    return lambda root: edit_json(
        root / INDEX, lambda i: i["weight_map"].update({names[k]: v for k, v in entries.items()})
    )


def in_two_shards(root: Path) -> None:
    b = Broken(root, second(root))
    b.append("model.norm.weight", "BF16", [32], bytes(64))
    b.save()


def unlisted_surplus(root: Path) -> None:
    b = Broken(root, second(root))
    b.append("unlisted", "BF16", [32], bytes(64))
    b.save()


def in_no_shard(root: Path) -> None:
    shard = json.loads((root / INDEX).read_text())["weight_map"]["model.norm.weight"]
    b = Broken(root, shard)
    b.drop("model.norm.weight")
    b.save()


SHARDED = {
    "no json": (replaced(INDEX, b"{"), ShardIndexError, "not JSON"),
    "no weight_map": (replaced(INDEX, b"{}"), ShardIndexError, "weight_map"),
    "empty weight_map": (replaced(INDEX, b'{"weight_map": {}}'), ShardIndexError, "weight_map"),
    "duplicate key": (replaced(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), ShardIndexError, "twice"),
    "shard is not there": (lambda root: (root / second(root)).unlink(), ShardIndexError, "is not there"),
    "path upwards": (in_index(norm="../x.safetensors"), ShardIndexError, "plain"),
    "absolute path": (in_index(norm="/etc/x.safetensors"), ShardIndexError, "plain"),
    "backslash": (in_index(norm="..\\x.safetensors"), ShardIndexError, "plain"),
    "no safetensors": (in_index(norm="model.bin"), ShardIndexError, "plain"),
    "nul byte": (in_index(norm="a\0.safetensors"), ShardIndexError, "plain"),
    "no text": (in_index(norm=None), ShardIndexError, "plain"),
    "another shard": (lambda root: in_index(norm=second(root))(root), ShardIndexError, "model.norm.weight"),
    "unknown tensor": (lambda root: in_index(unknown=second(root))(root), ShardIndexError, "no.such.tensor"),
    "in two shards": (in_two_shards, DuplicateTensorError, "model.norm.weight"),
    "unlisted surplus": (unlisted_surplus, SurplusTensorError, "unlisted"),
    "in no shard": (in_no_shard, MissingTensorError, "model.norm.weight"),
}


@pytest.mark.parametrize(("break_it", "error", "named"), SHARDED.values(), ids=SHARDED.keys())
def test_broken_shards(copy, break_it, error, named):
    root = copy("sharded")
    assert len(open_checkpoint(root).weight_files) > 2
    break_it(root)
    assert_refused(root, error, named)


def test_no_folder(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert_refused(path, CheckpointNotFoundError, str(path.name))


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_side_files_have_caps(copy, name):
    root = copy("single")
    with (root / name).open("wb") as f:
        f.truncate(257 << 20)  # sparse
    assert_refused(root, AbsurdSizeError, name)


@pytest.mark.parametrize("kind", ["single", "original"])
@pytest.mark.parametrize("window", [reading.SCAN_BYTES, 7])
def test_scale_255(copy, monkeypatch, kind, window):
    monkeypatch.setattr(reading, "SCAN_BYTES", window)
    root = copy(kind)
    checkpoint = open_checkpoint(root)
    check_scales(checkpoint)
    ref = checkpoint.tensors[SCALES]
    assert ref.shape == (4, 32, 2)
    with ref.file.open("r+b") as f:
        f.seek(ref.offset + np.ravel_multi_index((3, 17, 1), ref.shape))
        f.write(b"\xff")
    with pytest.raises(InvalidScaleError, match=f"{SCALES}.*expert 3, row 17, group 1") as e:
        check_scales(open_checkpoint(root))
    assert e.value.next_step


def test_bf16_has_no_scales_to_check(pristine: Path):
    check_scales(open_checkpoint(pristine / "bf16"))


def test_files_that_shrink_after_opening(copy):
    root = copy("single")
    ref = open_checkpoint(root).tensors["lm_head.weight"]
    os.truncate(ref.file, ref.offset + ref.nbytes - 1)
    with pytest.raises(TruncatedFileError, match=r"lm_head\.weight"):
        read_tensor(ref)
    ref.file.unlink()
    with pytest.raises(CheckpointNotFoundError):
        read_tensor(ref)


def test_scales_that_are_cut_off_while_they_are_read(copy, monkeypatch):
    """A page of a map that is behind the end of its file would end the process."""
    checkpoint = open_checkpoint(copy("single"))
    ref, check = checkpoint.tensors[SCALES], reading._check

    def cut(of, file, end):
        check(of, file, end)
        if of is ref:
            os.truncate(ref.file, ref.offset)

    monkeypatch.setattr(reading, "_check", cut)
    with pytest.raises(TruncatedFileError, match=SCALES):
        check_scales(checkpoint)


def test_files_that_are_swapped_or_written_to_after_opening(copy):
    root = copy("single")
    checkpoint = open_checkpoint(root)
    ref = checkpoint.tensors["lm_head.weight"]
    before = read_tensor(ref).copy()
    shutil.copyfile(ref.file, root / "other")
    (root / "other").rename(ref.file)
    with pytest.raises(IntegrityError, match="not the file whose header was checked"):
        read_tensor(ref)
    with pytest.raises(IntegrityError):
        check_scales(checkpoint)
    ref = open_checkpoint(root).tensors["lm_head.weight"]
    assert (read_tensor(ref) == before).all()
    with ref.file.open("r+b") as f:
        f.seek(ref.offset)
        f.write(b"x")
    os.utime(ref.file, ns=(1, 1))
    with pytest.raises(IntegrityError):
        read_tensor(ref)


def test_decoding_through_a_map(pristine: Path):
    tensors = open_checkpoint(pristine / "single").tensors
    name = "model.layers.0.mlp.experts.gate_up_proj"
    one = [read_tensor(tensors[f"{name}_{kind}"])[2] for kind in ("blocks", "scales")]
    bf16 = open_checkpoint(pristine / "bf16").tensors[name]
    assert (read_tensor(bf16)[2] == decode_bf16(*one).T).all()

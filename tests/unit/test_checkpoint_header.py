"""The safetensors header: what the reference implementation refuses is refused, with an error that says what."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptoss_export.exporter.checkpoint.safetensors_header import parse_header, read_header
from gptoss_export.exporter.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    DuplicateTensorError,
    HeaderError,
    OverlappingTensorError,
    TruncatedFileError,
    UnsafeFileError,
)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header, payload: bytes = b"") -> Path:
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + payload)
    return path


TWO = {"a": entry("BF16", [2, 2], 0, 8), "b": entry("U8", [3], 8, 11)}


def changed(**entries):
    return TWO | entries


MUTATIONS = {
    "no json": (b"not json at all", HeaderError),
    "no object": (b"[]", HeaderError),
    "leading blank": (b" " + json.dumps(TWO).encode(), HeaderError),
    "not UTF-8": (b'{"\xff": {}}', HeaderError),
    "duplicate tensor": (
        b'{"a": {"dtype":"U8","shape":[11],"data_offsets":[0,11]},'
        b'"a": {"dtype":"I8","shape":[11],"data_offsets":[0,11]}}',
        DuplicateTensorError,
    ),
    "duplicate field": (b'{"a": {"dtype":"U8","dtype":"I8","shape":[11],"data_offsets":[0,11]}}', HeaderError),
    "unknown dtype": (changed(b=entry("Q8", [3], 8, 11)), HeaderError),
    "dtype no text": (changed(b=entry(8, [3], 8, 11)), HeaderError),
    "missing field": (changed(b={"dtype": "U8", "shape": [3]}), HeaderError),
    "surplus field": (changed(b=entry("U8", [3], 8, 11) | {"x": 1}), HeaderError),
    "entry no object": (changed(b=[]), HeaderError),
    "negative size": (changed(b=entry("U8", [-3], 8, 11)), HeaderError),
    "fractional size": (changed(b=entry("U8", [3.0], 8, 11)), HeaderError),
    "bool as size": (changed(b=entry("U8", [3, True], 8, 11)), HeaderError),
    "rank": (changed(b=entry("U8", [3] + [1] * 1000, 8, 11)), HeaderError),
    "overflowing product": (changed(b=entry("U8", [1 << 62, 1 << 62, 3], 8, 11)), HeaderError),
    "product of 2^64 + 3 bytes": (changed(b=entry("U8", [(1 << 64) + 3], 8, 11)), HeaderError),
    "negative offset": (changed(b=entry("U8", [3], -3, 0)), HeaderError),
    "swapped offsets": (changed(b=entry("U8", [3], 11, 8)), HeaderError),
    "one offset": (changed(b={"dtype": "U8", "shape": [3], "data_offsets": [8]}), HeaderError),
    "bytes are not the shape": (changed(b=entry("U8", [2], 8, 11)), HeaderError),
    "overlap": (changed(b=entry("U8", [5], 6, 11)), OverlappingTensorError),
    "same bytes twice": (changed(c=entry("U8", [3], 8, 11)), OverlappingTensorError),
    "hole": (changed(b=entry("U8", [2], 9, 11)), HeaderError),
    "hole at the start": ({"b": entry("U8", [3], 8, 11)}, HeaderError),
    "beyond the file": (changed(b=entry("U8", [4], 8, 12)), TruncatedFileError),
    "far beyond the file": (changed(b=entry("U8", [1 << 60], 8, 8 + (1 << 60))), TruncatedFileError),
    "trailing bytes": (changed(b=entry("U8", [2], 8, 10)), HeaderError),
    "metadata no strings": (TWO | {"__metadata__": {"format": 1}}, HeaderError),
    "metadata no object": (TWO | {"__metadata__": "pt"}, HeaderError),
}


@pytest.mark.parametrize(("header", "error"), MUTATIONS.values(), ids=MUTATIONS.keys())
def test_mutations(tmp_path: Path, header, error):
    path = write(tmp_path / "x.safetensors", header, bytes(11))
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    assert type(e.value) is error
    assert e.value.what.isprintable() and len(e.value.what) < 400 and e.value.next_step


# The reference tolerates these, and each leaves a reader in doubt.
STRICTER = {"leading blank", "duplicate tensor", "duplicate field", "surplus field", "rank"}


@pytest.mark.parametrize("name", sorted(set(MUTATIONS) - STRICTER))
def test_the_reference_refuses_them_too(tmp_path: Path, name):
    path = write(tmp_path / "x.safetensors", MUTATIONS[name][0], bytes(11))
    with pytest.raises(SafetensorError), safe_open(path, "numpy"):
        pass


FILES = {
    "empty": (b"", TruncatedFileError),
    "seven bytes": (bytes(7), TruncatedFileError),
    "header length of zero": (bytes(8), HeaderError),
    "header beyond the file": ((1000).to_bytes(8, "little") + b"{}", TruncatedFileError),
    "header of a gigabyte": ((1 << 30).to_bytes(8, "little") + b"{}", HeaderError),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", HeaderError),
    "a pickle": (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), HeaderError),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", HeaderError),
}


@pytest.mark.parametrize(("data", "error"), FILES.values(), ids=FILES.keys())
def test_files_that_are_no_safetensors(tmp_path: Path, data, error):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as e:
        read_header(path)
    assert type(e.value) is error


def test_a_pointer_says_how_to_get_the_weights(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(FILES["an LFS pointer"][0])
    with pytest.raises(HeaderError) as e:
        read_header(path)
    assert "git lfs pull" in e.value.next_step


@pytest.mark.parametrize("cut", [1, 3, 11])
def test_truncated(tmp_path: Path, cut):
    path = write(tmp_path / "x.safetensors", TWO, bytes(11 - cut))
    with pytest.raises(TruncatedFileError, match=r"x\.safetensors"):
        read_header(path)


def test_special_files(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("fifo", "zero", "dangling"):
        with pytest.raises(UnsafeFileError):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointNotFoundError):
        read_header(tmp_path / "none")


def test_what_safetensors_writes_is_read(tmp_path: Path):
    tensors = {"b": np.zeros((3, 5), np.uint8), "a": np.zeros((2, 0), np.float32), "c": np.zeros((), np.float64)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "np"})
    header = read_header(path)
    assert {n: (e.dtype, e.shape, e.nbytes) for n, e in header.items()} == {
        "a": ("F32", (2, 0), 0),
        "b": ("U8", (3, 5), 15),
        "c": ("F64", (), 8),
    }
    assert max(e.offset + e.nbytes for e in header.values()) == path.stat().st_size


def test_offsets_are_absolute(tmp_path: Path):
    payload = bytes(range(11))
    path = write(tmp_path / "x.safetensors", TWO, payload)
    for name, expected in (("a", payload[:8]), ("b", payload[8:])):
        e = read_header(path)[name]
        assert path.read_bytes()[e.offset : e.offset + e.nbytes] == expected


small = st.integers(-1, 12)
values = st.none() | small | st.text(max_size=3) | st.lists(small, max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "BF16", "F4", "x"]) | values,
        "shape": st.lists(st.integers(0, 4), max_size=3) | values,
        "data_offsets": st.lists(st.integers(0, 12), min_size=2, max_size=2) | values,
    }
)


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries | values, max_size=3).map(
        lambda h: json.dumps(h).encode()
    )
    | st.binary(max_size=32)
    | st.binary(max_size=32).map(lambda b: b"{" + b),
    st.integers(0, 12),
)
def test_any_header_is_tiled_exactly_or_a_typed_error(data, buffer_bytes):
    try:
        header = parse_header(data, buffer_bytes, 100, "x")
    except CheckpointError as e:
        assert e.exit_code in (15, 22, 23, 24)
        return
    position = 100
    for e in header.values():
        assert e.offset == position
        position += e.nbytes
    assert position == 100 + buffer_bytes


@given(data=st.data())
def test_any_flipped_byte_of_a_good_file(tmp_path_factory, data):
    raw = bytearray(write(tmp_path_factory.mktemp("flip") / "x", TWO, bytes(11)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 12))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "x.safetensors"
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except CheckpointError as e:
        assert e.exit_code in (15, 22, 23, 24)
    else:
        assert sum(e.nbytes for e in header.values()) == 11

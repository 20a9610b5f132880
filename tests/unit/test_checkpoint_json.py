"""The JSON reader: one meaning or an error, and never anything else."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.exporter.checkpoint.json_reader import parse_json_object, read_json_object
from gptoss_export.exporter.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DuplicateTensorError,
    ShardIndexError,
    UnsafeFileError,
)


def parse(data: bytes):
    return parse_json_object(data, "x.json", ConfigError)


REFUSED = {
    "empty": (b"", "not JSON"),
    "half": (b'{"a": 1', "not JSON"),
    "list": (b"[1]", "not a JSON object"),
    "number": (b"1", "not a JSON object"),
    "trailing": (b"{} {}", "not JSON"),
    "bom": (b"\xef\xbb\xbf{}", "not JSON"),
    "latin-1": (b'{"\xe9": 1}', "not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    "nan": (b'{"a": NaN}', "NaN"),
    "infinity": (b'{"a": -Infinity}', "Infinity"),
    "overflow": (b'{"a": 1e999}', "out of range"),
    "huge integer": (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
    "long integer": (b'{"a": -' + b"9" * 21 + b"}", "digits"),
    "twice": (b'{"a": 1, "a": 2}', "twice"),
    "twice inside": (b'{"b": {"a": 1, "a": 2}}', "twice"),
    "twice in a list": (b'{"b": [{"a": 1, "a": 2}], "c": {}}', "twice"),
    "deep lists": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deep"),
    "lone surrogate": (b'{"a": "\\ud800"}', "surrogate"),
    "surrogate key": (b'{"\\udfff": 1}', "surrogate"),
    "million values": (b'{"a": [' + b"0," * 1_000_001 + b"0]}", "values"),
}


@pytest.mark.parametrize(("data", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(data, named):
    with pytest.raises(ConfigError, match=named) as e:
        parse(data)
    assert len(e.value.what) < 300 and e.value.what.isprintable()


def test_outer_duplicates_have_their_own_error():
    with pytest.raises(DuplicateTensorError):
        parse_json_object(b'{"a": 1, "a": 2}', "x", ConfigError, duplicate=DuplicateTensorError)
    with pytest.raises(ConfigError):
        parse_json_object(b'{"b": {"a": 1, "a": 2}}', "x", ConfigError, duplicate=DuplicateTensorError)


def test_control_characters_of_keys_stay_out_of_messages():
    with pytest.raises(ConfigError) as e:
        parse(b'{"\\u001b[2J\\n": 1, "\\u001b[2J\\n": 2}')
    assert e.value.what.isprintable()


def test_good(tmp_path: Path):
    path = tmp_path / "config.json"
    value = {"a": [1, 2.5, None, True, "\U0001f600"], "b": {"c": -(10**19)}}
    path.write_text(json.dumps(value))
    assert read_json_object(path, 1000) == value


def test_size_cap(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text("{}" + " " * 99)
    assert read_json_object(path, 101) == {}
    with pytest.raises(ShardIndexError, match="101 bytes"):
        read_json_object(path, 100, ShardIndexError)


def test_only_regular_files(tmp_path: Path):
    with pytest.raises(CheckpointNotFoundError):
        read_json_object(tmp_path / "none.json", 100)
    with pytest.raises(UnsafeFileError, match="folder"):
        read_json_object(tmp_path, 100)
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    with pytest.raises(UnsafeFileError, match="FIFO"):
        read_json_object(fifo, 100)
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    with pytest.raises(UnsafeFileError, match="link"):
        read_json_object(loop, 100)


pieces = st.sampled_from(
    [b"{", b"}", b"[", b"]", b'"', b"a", b":", b",", b"1", b"e", b"-", b".", b"\\", b"u", b"d8", b" "]
)


@given(st.binary(max_size=64) | st.lists(pieces, max_size=24).map(b"".join))
def test_any_bytes_give_an_object_or_the_error(data):
    try:
        result = parse(data)
    except ConfigError:
        return
    assert json.loads(data) == result


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(st.dictionaries(st.text(), values), st.booleans())
def test_any_object_is_read_back(value, ascii_only):
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")) == value

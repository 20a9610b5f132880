"""The header of RTX engines, from bytes as engines of 1.7.1 have them."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss_export.engines.tensorrt.header import EngineHeader, read_header
from gptoss_export.exporter.errors import EngineMismatchError

# Of an engine of 133828 bytes that 1.7.1.116 built without being told a GPU.
STORED = bytes.fromhex(
    "76747274 00000000 02000000 00000000 c40a0200 00000000 01070174 76747274"
    "7e000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000"
)
NBYTES = 133828


def engine(folder: Path, header: bytes = STORED, nbytes: int = NBYTES) -> Path:
    path = folder / "engine.plan"
    path.write_bytes(header[:nbytes] + bytes(max(0, nbytes - len(header))))
    return path


def with_mask(mask: int) -> bytes:
    return STORED[:0x20] + struct.pack("<Q", mask) + STORED[0x28:]


def test_an_engine_for_any_gpu(tmp_path: Path) -> None:
    header = read_header(engine(tmp_path))
    assert header == EngineHeader(b"vtrt", (1, 7, 1, 116), 0x7E, NBYTES)
    assert header.compute_capabilities == ("8.0+",)


@pytest.mark.parametrize(
    ("mask", "names"),
    [(0x04, ("8.6",)), (0x14, ("8.6", "12.0")), (0x21, ("7.5", "12.1")), (0, ()), (0x40, ()), (1 << 40, ())],
)
def test_the_mask_names_gpus(tmp_path: Path, mask: int, names: tuple[str, ...]) -> None:
    assert read_header(engine(tmp_path, with_mask(mask))).compute_capabilities == names


@pytest.mark.parametrize(
    ("header", "nbytes", "says"),
    [
        (b"", 0, "has 0 bytes, less than an engine's header"),
        (STORED, 63, "has 63 bytes, less than an engine's header"),
        (STORED, 64, "has 64 bytes, its header says 133828"),
        (STORED, NBYTES - 1, "has 133827 bytes, its header says 133828"),
        (STORED[:0x10] + b"\xff" * 8 + STORED[0x18:], NBYTES, "its header says 18446744073709551615"),
        (b"ftrt" + STORED[4:], NBYTES, "is no engine of TensorRT for RTX: it begins with b'ftrt'"),
        (STORED[:0x1C] + b"ftrt" + STORED[0x20:], NBYTES, "is no engine of TensorRT for RTX"),
        (b"\x80\x04pickle" * 8, NBYTES, "is no engine of TensorRT for RTX"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, header: bytes, nbytes: int, says: str) -> None:
    with pytest.raises(EngineMismatchError) as caught:
        read_header(engine(tmp_path, header, nbytes))
    assert says in caught.value.what


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(data=st.binary(max_size=200))
@example(data=STORED[:0x10] + struct.pack("<Q", 64) + STORED[0x18:])
def test_no_bytes_are_trusted(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "engine.plan"
    path.write_bytes(data)
    try:
        header = read_header(path)
    except EngineMismatchError:
        return
    assert header.nbytes == len(data)

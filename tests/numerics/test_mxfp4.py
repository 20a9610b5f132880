"""MXFP4 decoding against the formula, transformers, and ml_dtypes: every byte with every scale."""

import ml_dtypes
import numpy as np
import pytest

from gptoss_export.exporter.checkpoint.mxfp4 import BYTE_TABLE, SCALE_TABLE, decode, decode_bf16

FINITE = 255  # scale 255 is NaN

# Every byte (16 groups of 16) under every scale: [255, 16, 16] and [255, 16].
BLOCKS = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (FINITE, 16, 16))
SCALES = np.repeat(np.arange(FINITE, dtype=np.uint8), 16).reshape(FINITE, 16)


def e2m1(code: int) -> float:
    """OCP MX v1.0, table 5: sign, two exponent bits with bias 1, one mantissa bit; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -magnitude if sign else magnitude


def expected() -> np.ndarray:
    """[255, 512] float64: value 2b is the low nibble of byte b, value 2b+1 the high one."""
    codes = np.array([[e2m1(b & 15), e2m1(b >> 4)] for b in range(256)]).reshape(-1)
    return codes * 2.0 ** (np.arange(FINITE)[:, None] - 127.0)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def test_every_byte_under_every_scale():
    with np.errstate(over="ignore"):
        assert same_bits(decode(BLOCKS, SCALES), expected().astype(np.float32))


def test_exact_up_to_scale_252():
    exact = decode(BLOCKS[:253], SCALES[:253]).astype(np.float64)
    assert np.isfinite(exact).all()
    assert (exact == expected()[:253]).all()
    assert np.isinf(decode(BLOCKS[253:], SCALES[253:])).any()


def test_bf16_is_as_exact():
    values = decode_bf16(BLOCKS, SCALES)
    assert values.dtype == ml_dtypes.bfloat16
    assert same_bits(values.astype(np.float32), decode(BLOCKS, SCALES))


def test_transformers_agrees():
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    blocks, scales = torch.from_numpy(BLOCKS.copy()), torch.from_numpy(SCALES.copy())
    for dtype in (torch.float32, torch.float64):
        # It transposes rows and columns of the experts; a single row has none to transpose.
        theirs = _convert_moe_packed_tensors(blocks[:, None], scales[:, None], dtype=dtype)[:, :, 0].numpy()
        ours = decode(BLOCKS, SCALES).astype(theirs.dtype)
        inside = np.isfinite(ours)
        assert (theirs == ours)[inside].all()
        assert (np.signbit(theirs) == np.signbit(ours)).all()


def test_ml_dtypes_agrees():
    codes = np.stack([BLOCKS & 15, BLOCKS >> 4], axis=-1).astype(np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64).reshape(FINITE, 16, 32)
    factors = SCALES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    with np.errstate(over="ignore"):
        theirs = (values * factors[..., None]).astype(np.float32)
    assert same_bits(decode(BLOCKS, SCALES), theirs.reshape(FINITE, 512))


def test_scale_255_is_nan():
    assert np.isnan(SCALE_TABLE[255]) and np.isfinite(SCALE_TABLE[:255]).all()
    blocks = BLOCKS[:1]
    assert np.isnan(decode(blocks, np.full((1, 16), 255, np.uint8))).all()
    assert np.isnan(decode_bf16(blocks, np.full((1, 16), 255, np.uint8)).astype(np.float32)).all()


def test_low_nibble_comes_first():
    assert BYTE_TABLE[0x2F].tolist() == [-6.0, 1.0]


@pytest.mark.parametrize("function", [decode, decode_bf16])
def test_shapes(function):
    blocks, scales = np.zeros((3, 5, 2, 16), np.uint8), np.zeros((3, 5, 2), np.uint8)
    assert function(blocks, scales).shape == (3, 5, 64)
    with pytest.raises(ValueError, match="do not belong"):
        function(blocks, scales[:, :, :1])

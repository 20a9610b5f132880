"""MXFP4: e2m1 codes in groups of 32 along a row that share an e8m0 scale (OCP Microscaling Formats v1.0).

Byte b of a group holds value 2b in its low nibble and 2b+1 in its high nibble. A value is
code * 2^(scale - 127); scale 255 is NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

FP4_VALUES: NDArray[np.float32] = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32
)
"""The value of each e2m1 code, [16]; bit 3 is the sign."""

BYTE_TABLE: NDArray[np.float32] = np.stack([FP4_VALUES[np.arange(256) & 15], FP4_VALUES[np.arange(256) >> 4]], axis=1)
"""The two values of each byte, low nibble first, [256, 2]."""

SCALE_TABLE: NDArray[np.float32] = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""The factor of each scale byte, [256]; 0 gives 2^-127, a subnormal."""


def decode(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[np.float32]:
    """blocks [..., G, 16], scales [..., G] -> [..., 32 G] float32.

    Exact up to scale byte 252; with 253 and 254 the largest codes lie beyond float32 and become infinite.
    """
    if blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {blocks.shape} do not belong to scales {scales.shape}")
    values: NDArray[np.float32] = BYTE_TABLE[blocks]
    with np.errstate(over="ignore"):
        values *= SCALE_TABLE[scales][..., None, None]
    return values.reshape(*scales.shape[:-1], -1)


def decode_bf16(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> NDArray[Any]:
    """blocks [..., G, 16], scales [..., G] -> [..., 32 G] ml_dtypes.bfloat16, as exact as `decode`.

    One lookup a byte, several times faster than decoding and casting.
    """
    if blocks.shape != (*scales.shape, 16):
        raise ValueError(f"blocks {blocks.shape} do not belong to scales {scales.shape}")
    index = scales.astype(np.uint16)[..., None] << 8 | blocks
    values: NDArray[Any] = _bf16_pairs()[index].view(ml_dtypes.bfloat16)
    return values.reshape(*scales.shape[:-1], -1)


@lru_cache(maxsize=1)
def _bf16_pairs() -> NDArray[np.uint32]:
    """Scale byte * 256 + code byte -> the two bfloat16 values, as they lie in memory.

    A code has two significant bits, so cutting the lower half off a float32 loses nothing.
    """
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(256, 16)
    codes = np.tile(np.arange(256, dtype=np.uint8), 256).reshape(256, 16, 16)
    upper = (decode(codes, scales).view(np.uint32) >> 16).astype(np.uint16)
    return upper.reshape(-1).view(np.uint32)

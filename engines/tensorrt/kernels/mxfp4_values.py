# mypy: ignore-errors
# The bodies below are Triton's language, which has Python's syntax and other types.
"""What the decode and the prefill kernels share: MXFP4 values, scales and the activation.

Blocks are read as little-endian int32 words, so that nibble j of word q of a group is element 8 q + j. An e2m1 code n
is exact in float16: the bits ((n & 7) << 9) | ((n & 8) << 12) are its value times 2^-14, the two values that are
float16's subnormals included. A word is taken apart two nibbles at a time, j into the lower and j + 4 into the upper
half (OCP Microscaling Formats v1.0, and exporter/checkpoint/mxfp4.py).
"""

import triton
import triton.language as tl

_MAGNITUDES = tl.constexpr(0x0E000E00)
_SIGNS = tl.constexpr(-0x7FFF8000)  # 0x80008000
TWO_14 = tl.constexpr(16384.0)


@triton.jit
def scale_factor(scales):
    """e8m0 bytes (uint8) -> 2^(byte - 127) float32, exactly; byte 0 is the subnormal 2^-127."""
    # As integers, the bits of 2^-127 lie below those of every normal power of two and above zero.
    return tl.maximum(scales.to(tl.int32) << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def _lower(pair):
    return pair.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _upper(pair):
    return (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def unpack(words):
    """int32 words -> the eight values of each as float16 times 2^-14, in the order of elements."""
    p0 = ((words << 9) & _MAGNITUDES) | ((words << 12) & _SIGNS)
    p1 = ((words << 5) & _MAGNITUDES) | ((words << 8) & _SIGNS)
    p2 = ((words << 1) & _MAGNITUDES) | ((words << 4) & _SIGNS)
    p3 = ((words >> 3) & _MAGNITUDES) | (words & _SIGNS)
    return _lower(p0), _lower(p1), _lower(p2), _lower(p3), _upper(p0), _upper(p1), _upper(p2), _upper(p3)


@triton.jit
def swiglu(h, ALPHA: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """h [ROWS, 2 PAIRS] float32, gate and up interleaved -> [ROWS, PAIRS]; a NaN stays one."""
    gate, up = tl.split(h.reshape(ROWS, PAIRS, 2))
    gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)

# mypy: ignore-errors
# The bodies below are Triton's language, which has Python's syntax and other types.
"""A few tokens: every chosen expert is read once for each token that chose it, as fast as memory gives it.

Sizes: T tokens, K experts each, H hidden, I intermediate, E experts. `x` and `a` have the target's type, everything is
computed in float32. A program holds a few rows of weights and walks along them in words of eight values. Sums are kept
times 2^-14, as the codes are unpacked: a scaled weight is exact in float32 for every scale byte, and no sum overflows
before the true one does. No atomics: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from gptoss_export.engines.tensorrt.kernels.mxfp4_values import TWO_14, scale_factor, swiglu, unpack


@triton.jit
def _columns(x, WORDS: tl.constexpr):
    """x [WORDS, 8] -> eight [1, WORDS] float32, one for each place in a word."""
    even, odd = tl.split(x.to(tl.float32).reshape(WORDS, 2, 2, 2))
    e0, e1 = tl.split(even)
    o0, o1 = tl.split(odd)
    x0, x4 = tl.split(e0)
    x2, x6 = tl.split(e1)
    x1, x5 = tl.split(o0)
    x3, x7 = tl.split(o1)
    return x0[None, :], x1[None, :], x2[None, :], x3[None, :], x4[None, :], x5[None, :], x6[None, :], x7[None, :]


@triton.jit
def _rows_times_vector(x, blocks, scales, rows, K: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """x [K] and the MXFP4 rows `rows` [ROWS] of one expert -> [ROWS] float32."""
    ALL: tl.constexpr = K // 8
    # A code's products with float16 cannot leave float32's range; other types take the scale on each weight.
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    sums = tl.zeros((ROWS, WORDS), tl.float32)
    for start in tl.static_range(0, ALL, WORDS):
        column = start + tl.arange(0, WORDS)
        inside = column < ALL
        values = tl.load(x + (column[:, None] * 8 + tl.arange(0, 8)[None, :]), mask=inside[:, None], other=0.0)
        words = tl.load(blocks + (rows[:, None] * ALL + column[None, :]), mask=inside[None, :], other=0)
        bytes_ = tl.load(scales + (rows[:, None] * (ALL // 4) + column[None, :] // 4), mask=inside[None, :], other=0)
        factor = scale_factor(bytes_)
        x0, x1, x2, x3, x4, x5, x6, x7 = _columns(values, WORDS)
        w0, w1, w2, w3, w4, w5, w6, w7 = unpack(words)
        each = 1.0 if HALF else factor
        dot = (w0.to(tl.float32) * each) * x0
        dot += (w1.to(tl.float32) * each) * x1
        dot += (w2.to(tl.float32) * each) * x2
        dot += (w3.to(tl.float32) * each) * x3
        dot += (w4.to(tl.float32) * each) * x4
        dot += (w5.to(tl.float32) * each) * x5
        dot += (w6.to(tl.float32) * each) * x6
        dot += (w7.to(tl.float32) * each) * x7
        sums += dot * factor if HALF else dot
    return tl.sum(sums, axis=1) * TWO_14


@triton.jit
def decode_gate_up(
    x,
    experts,
    blocks,
    scales,
    bias,
    a,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """a [T K, I] = swiglu(W1 x + b1), rounded to the target's type. Grid (T K, 2 I / ROWS).

    x [T, H], experts [T, K] int32, blocks [E, 2 I, H / 8] int32, scales [E, 2 I, H / 32] uint8, bias [E, 2 I] bfloat16.
    """
    assignment = tl.program_id(0)
    expert = tl.load(experts + assignment).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    h = _rows_times_vector(
        x + (assignment // K) * H,
        blocks + expert * (2 * I * (H // 8)),
        scales + expert * (2 * I * (H // 32)),
        rows,
        H,
        ROWS,
        WORDS,
    )
    h += tl.load(bias + expert * (2 * I) + rows).to(tl.float32)
    pairs = tl.arange(0, ROWS // 2)
    out = swiglu(h[None, :], ALPHA, LIMIT, 1, ROWS // 2)
    place = assignment * I + tl.program_id(1) * (ROWS // 2) + pairs
    tl.store(a + place[None, :], out.to(a.dtype.element_ty))


@triton.jit
def decode_down(
    a,
    weights,
    experts,
    blocks,
    scales,
    bias,
    y,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """y [T, H] float32 = sum over ascending k of weights[:, k] * (W2 a + b2). Grid (T, H / ROWS).

    a [T K, I], weights [T, K] float32, experts [T, K] int32, blocks [E, H, I / 8] int32, scales [E, H, I / 32] uint8,
    bias [E, H] bfloat16.
    """
    token = tl.program_id(0)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    for k in range(K):
        assignment = token * K + k
        expert = tl.load(experts + assignment).to(tl.int64)
        out = _rows_times_vector(
            a + assignment * I,
            blocks + expert * (H * (I // 8)),
            scales + expert * (H * (I // 32)),
            rows,
            I,
            ROWS,
            WORDS,
        )
        out += tl.load(bias + expert * H + rows).to(tl.float32)
        total += tl.load(weights + assignment) * out
    tl.store(y + token * H + rows, total)

# mypy: ignore-errors
# The bodies below are Triton's language, which has Python's syntax and other types.
"""Many tokens: (token, place) pairs are grouped by expert, and an expert's weights multiply tiles of its tokens.

Sizes: T tokens, K experts each, H hidden, I intermediate, E experts. An assignment is token * K + place. How many
tiles there are depends on the routing, the grid only on T: programs beyond the last tile end at once. Sums are float32
on tensor cores (float32 itself without them), and no float is added atomically: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from gptoss_export.engines.tensorrt.kernels.mxfp4_values import TWO_14, scale_factor, swiglu, unpack


@triton.jit
def group_by_expert(experts, counts, lists, tokens, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """counts [E] int32 and lists [E, T] int32: each expert's assignments in ascending order. Grid (E).

    experts [T, K] int32; a token names an expert at most once, so T places are enough.
    """
    expert = tl.program_id(0)
    found = 0
    for start in range(0, tokens * K, BLOCK):
        assignment = start + tl.arange(0, BLOCK)
        inside = assignment < tokens * K
        mine = (tl.load(experts + assignment, mask=inside, other=-1) == expert).to(tl.int32)
        place = found + tl.cumsum(mine, axis=0) - 1
        tl.store(lists + expert.to(tl.int64) * tokens + place, assignment, mask=(mine != 0) & (place < tokens))
        found += tl.sum(mine, axis=0)
    tl.store(counts + expert, tl.minimum(found, tokens))


@triton.jit
def _tile(counts, tile, E: tl.constexpr, E_POWER: tl.constexpr, TILE: tl.constexpr):
    """The tile-th tile of all experts' lists -> its expert (E: there is none), first place and the list's length."""
    e = tl.arange(0, E_POWER)
    count = tl.load(counts + e, mask=e < E, other=0)
    tiles = (count + TILE - 1) // TILE
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = tl.sum(tl.where(e < expert, tiles, 0), axis=0)
    length = tl.sum(tl.where(e == expert, count, 0), axis=0)
    return tl.minimum(expert, E), (tile - before) * TILE, length


@triton.jit
def _weights(words, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """words [ROWS, WIDTH / 8] int32 -> [ROWS, WIDTH] float16 times 2^-14."""
    w0, w1, w2, w3, w4, w5, w6, w7 = unpack(words)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    return tl.join(even, odd).reshape(ROWS, WIDTH)


@triton.jit
def _tokens_times_rows(
    x,  # [TILE, 1] pointers to rows of K values of the target's type
    blocks,
    scales,
    valid,
    rows,
    inside,
    K: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """TILE vectors of K values and the MXFP4 rows `rows` [ROWS] of one expert -> [TILE, ROWS] float32.

    float16 cannot hold every scaled weight: each group of 32 is multiplied unscaled, exactly, and its sum scaled in
    float32. bfloat16 and float32 hold every scaled weight that float32 holds.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    HALF: tl.constexpr = x.dtype.element_ty == tl.float16
    sums = tl.zeros((TILE, ROWS), tl.float32)
    for start in range(0, K, WIDTH):
        column = start + tl.arange(0, WIDTH)
        values = tl.load(x + column[None, :], mask=valid[:, None], other=0.0)
        word = start // 8 + tl.arange(0, WIDTH // 8)
        words = tl.load(blocks + (rows[:, None] * (K // 8) + word[None, :]), mask=inside[:, None], other=0)
        if HALF:
            tl.static_assert(WIDTH == 32)
            factor = scale_factor(tl.load(scales + rows * (K // 32) + start // 32, mask=inside, other=0))
            weights = _weights(words, ROWS, WIDTH) * TWO_14
            sums += tl.dot(values, weights.T) * factor[None, :]
        else:
            group = start // 32 + tl.arange(0, WIDTH // 32)
            bytes_ = tl.load(scales + (rows[:, None] * (K // 32) + group[None, :]), mask=inside[:, None], other=0)
            factor = scale_factor(bytes_)[:, :, None].broadcast_to(ROWS, WIDTH // 32, 32).reshape(ROWS, WIDTH)
            weights = (_weights(words, ROWS, WIDTH).to(tl.float32) * TWO_14) * factor
            sums = tl.dot(values, weights.to(DTYPE).T, sums, input_precision="ieee")
    return sums


@triton.jit
def prefill_gate_up(
    x,
    counts,
    lists,
    blocks,
    scales,
    bias,
    a,
    tokens,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    K: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    E_POWER: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """a [T K, I] = swiglu(W1 x + b1), rounded to the target's type. Grid (2 I / ROWS, tiles).

    x [T, H], counts [E], lists [E, T], blocks [E, 2 I, H / 8] int32, scales [E, 2 I, H / 32] uint8,
    bias [E, 2 I] bfloat16.
    """
    expert, first, length = _tile(counts, tl.program_id(1), E, E_POWER, TILE)
    if expert < E:
        chosen = expert.to(tl.int64)
        slot = first + tl.arange(0, TILE)
        valid = slot < length
        assignment = tl.load(lists + chosen * tokens + slot, mask=valid, other=0).to(tl.int64)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = rows < 2 * I
        h = _tokens_times_rows(
            x + ((assignment // K) * H)[:, None],
            blocks + chosen * (2 * I * (H // 8)),
            scales + chosen * (2 * I * (H // 32)),
            valid,
            rows,
            inside,
            H,
            TILE,
            ROWS,
            WIDTH,
        )
        h += tl.load(bias + chosen * (2 * I) + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        out = swiglu(h, ALPHA, LIMIT, TILE, ROWS // 2)
        column = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
        place = (assignment * I)[:, None] + column[None, :]
        tl.store(a + place, out.to(a.dtype.element_ty), mask=valid[:, None] & (column < I)[None, :])


@triton.jit
def prefill_down(
    a,
    weights,
    counts,
    lists,
    blocks,
    scales,
    bias,
    parts,
    tokens,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    E_POWER: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """parts [T K, H] float32 = weights * (W2 a + b2) of each assignment. Grid (H / ROWS, tiles).

    a [T K, I], weights [T, K] float32, counts [E], lists [E, T], blocks [E, H, I / 8] int32,
    scales [E, H, I / 32] uint8, bias [E, H] bfloat16.
    """
    expert, first, length = _tile(counts, tl.program_id(1), E, E_POWER, TILE)
    if expert < E:
        chosen = expert.to(tl.int64)
        slot = first + tl.arange(0, TILE)
        valid = slot < length
        assignment = tl.load(lists + chosen * tokens + slot, mask=valid, other=0).to(tl.int64)
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = rows < H
        out = _tokens_times_rows(
            a + (assignment * I)[:, None],
            blocks + chosen * (H * (I // 8)),
            scales + chosen * (H * (I // 32)),
            valid,
            rows,
            inside,
            I,
            TILE,
            ROWS,
            WIDTH,
        )
        out += tl.load(bias + chosen * H + rows, mask=inside, other=0.0).to(tl.float32)[None, :]
        out *= tl.load(weights + assignment, mask=valid, other=0.0)[:, None]
        place = (assignment * H)[:, None] + rows[None, :]
        tl.store(parts + place, out, mask=valid[:, None] & inside[None, :])


@triton.jit
def sum_places(parts, y, H: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """y [T, H] = sum over ascending k of parts [T, K, H], float32. Grid (T, H / BLOCK)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < H
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts + (token * K + k) * H + column, mask=inside, other=0.0)
    tl.store(y + token * H + column, total, mask=inside)

"""SinkAttention: grouped-query attention with a sink logit a head and an optional window, over a growing cache.

    p_j = exp(s_j) / (sum_k exp(s_k) + exp(sink_h)),   s_j = scale * q . k_j

over the keys j that the query may see. The sink takes part in the denominator only (openai/gpt-oss,
`gpt_oss/torch/model.py`, sdpa). Who sees whom is decided on *positions*, not on places in the cache: a key of position
-1 is padding, wherever it lies, and a window of w lets a query see exactly w keys, itself included. So batches may be
padded on the left, on the right or in between, and a cache may be continued after any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_export.exporter.ops.dialect import FLOAT, INT, Op, make_schema

MASKED = float(torch.finfo(torch.float32).min)
"""Added to a masked score. Finite, so that a query that sees nothing gives zeros and not NaN."""


def position_bias(query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """[B, S] and [B, T] int64 -> [B, 1, S, T] float32: 0 where a query sees a key, MASKED elsewhere."""
    q, k = query_positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window:
        seen = seen & (q - k < window)
    return torch.where(seen, 0.0, MASKED)


@torch.library.custom_op("gptoss::sink_attention", mutates_args=())
def sink_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    sinks: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of S new positions to P past ones and to themselves; T = P + S.

    q [B, S, num_heads*D], k, v [B, S, kv_heads*D], past_key, past_value [B, kv_heads, P, D] float32 (q, k and the past
    are rotated); sinks [num_heads] bfloat16; query_positions [B, S], key_positions [B, T] int64.
    -> attention [B, S, num_heads*D], present_key, present_value [B, kv_heads, T, D] float32.
    """
    B, S, _ = q.shape
    Q = q.reshape(B, S, kv_heads, num_heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
    K = torch.cat([past_key, k.reshape(B, S, kv_heads, -1).transpose(1, 2)], dim=2)
    V = torch.cat([past_value, v.reshape(B, S, kv_heads, -1).transpose(1, 2)], dim=2)
    scores = scale * (Q @ K[:, :, None].transpose(-1, -2))
    scores = scores + position_bias(query_positions, key_positions, window)[:, None]
    sink = sinks.float().reshape(1, kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
    probabilities = torch.softmax(torch.cat([scores, sink], dim=-1), dim=-1)[..., :-1]
    attention = (probabilities @ V[:, :, None]).permute(0, 3, 1, 2, 4).reshape(B, S, -1)
    return attention, K, V


@sink_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    sinks: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    num_heads: int,
    kv_heads: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, D = past_key.shape
    present = (B, kv_heads, key_positions.shape[1], D)
    return torch.empty_like(q), past_key.new_empty(present), past_value.new_empty(present)


POSITION_BIAS = Op(
    name="PositionBias",
    torch_op=None,
    schema=make_schema(
        "PositionBias",
        "What is added to attention scores so that a query sees the keys of positions 0 to its own, the last `window` "
        "of them if window > 0. query_positions [B, S], key_positions [B, T] -> bias [B, 1, S, T], 0 or lowest float.",
        {"query_positions": "tensor(int64)", "key_positions": "tensor(int64)"},
        {"bias": "tensor(float)"},
        {"window": INT},
    ),
    body="""<window> (query_positions, key_positions) => (bias) {
        query_axes = Constant <value_ints = [1, 3]> ()
        key_axes = Constant <value_ints = [1, 2]> ()
        q = Unsqueeze (query_positions, query_axes)
        k = Unsqueeze (key_positions, key_axes)
        zero = Constant <value_int = 0> ()
        real = GreaterOrEqual (k, zero)
        causal = LessOrEqual (k, q)
        reach = Constant <value_int: int = @window> ()
        boundless = Equal (reach, zero)
        distance = Sub (q, k)
        near = Less (distance, reach)
        in_window = Or (near, boundless)
        past_or_self = And (real, causal)
        seen = And (past_or_self, in_window)
        visible = Constant <value_float = 0.0> ()
        masked = Constant <value_float = -3.4028234663852886e38> ()
        bias = Where (seen, visible, masked)
    }""",
)

ATTEND_WITH_SINKS = Op(
    name="AttendWithSinks",
    torch_op=None,
    schema=make_schema(
        "AttendWithSinks",
        "The attention of SinkAttention over keys and values that are given whole. q [B, S, num_heads*D], "
        "keys and values [B, kv_heads, N, D], sinks [num_heads], query_positions [B, S], key_positions [B, N] -> "
        "attention [B, S, num_heads*D].",
        {
            "q": "tensor(float)",
            "keys": "tensor(float)",
            "values": "tensor(float)",
            "sinks": "tensor(bfloat16)",
            "query_positions": "tensor(int64)",
            "key_positions": "tensor(int64)",
        },
        {"attention": "tensor(float)"},
        {"num_heads": INT, "kv_heads": INT, "scale": FLOAT, "window": INT},
    ),
    # Shapes: Q [B, kv, g, S, D] with g query heads a key head, K and V [B, kv, 1, N, D], scores [B, kv, g, S, N].
    body="""<num_heads, kv_heads, scale, window>
    (q, keys, values, sinks, query_positions, key_positions) => (attention) {
        zero = Constant <value_ints = [0]> ()
        one = Constant <value_ints = [1]> ()
        two = Constant <value_ints = [2]> ()
        minus_one = Constant <value_ints = [-1]> ()
        kv_scalar = Constant <value_int: int = @kv_heads> ()
        kv = Reshape (kv_scalar, one)
        B_S = Shape <start = 0, end = 2> (q)
        D = Shape <start = 3, end = 4> (keys)
        q_shape = Concat <axis = 0> (B_S, kv, minus_one, D)
        q_5d = Reshape (q, q_shape)
        Q = Transpose <perm = [0, 2, 3, 1, 4]> (q_5d)
        K = Unsqueeze (keys, two)
        V = Unsqueeze (values, two)
        K_t = Transpose <perm = [0, 1, 2, 4, 3]> (K)
        products = MatMul (Q, K_t)
        factor = Constant <value_float: float = @scale> ()
        scores = Mul (products, factor)
        bias_4d = com.gptoss.PositionBias <window: int = @window> (query_positions, key_positions)
        bias = Unsqueeze (bias_4d, one)
        logits = Add (scores, bias)

        sinks_float = Cast <to = 1> (sinks)
        sink_kv_shape = Concat <axis = 0> (one, kv, minus_one, one, one)
        sink_5d = Reshape (sinks_float, sink_kv_shape)
        rows = Shape <start = 0, end = 4> (logits)
        column_shape = Concat <axis = 0> (rows, one)
        sink_column = Expand (sink_5d, column_shape)
        with_sink = Concat <axis = -1> (logits, sink_column)
        with_sink_p = Softmax <axis = -1> (with_sink)
        last_axis = Constant <value_ints = [-1]> ()
        p = Slice (with_sink_p, zero, minus_one, last_axis)
        heads = MatMul (p, V)
        heads_last = Transpose <perm = [0, 3, 1, 2, 4]> (heads)
        out_shape = Concat <axis = 0> (B_S, minus_one)
        attention = Reshape (heads_last, out_shape)
    }""",
    calls=("PositionBias",),
)

SINK_ATTENTION = Op(
    name="SinkAttention",
    torch_op=torch.ops.gptoss.sink_attention.default,
    schema=make_schema(
        "SinkAttention",
        "Grouped-query attention with one sink logit a head in the softmax's denominator, on a growing cache. "
        "q [B, S, num_heads*D], k and v [B, S, kv_heads*D], past [B, kv_heads, P, D], sinks [num_heads], "
        "query_positions [B, S], key_positions [B, P+S] -> attention [B, S, num_heads*D], "
        "present [B, kv_heads, P+S, D]. A query sees the keys of positions 0 to its own, the last `window` of them if "
        "window > 0; position -1 is padding.",
        {
            "q": "tensor(float)",
            "k": "tensor(float)",
            "v": "tensor(float)",
            "past_key": "tensor(float)",
            "past_value": "tensor(float)",
            "sinks": "tensor(bfloat16)",
            "query_positions": "tensor(int64)",
            "key_positions": "tensor(int64)",
        },
        {"attention": "tensor(float)", "present_key": "tensor(float)", "present_value": "tensor(float)"},
        {"num_heads": INT, "kv_heads": INT, "scale": FLOAT, "window": INT},
    ),
    body="""<num_heads, kv_heads, scale, window>
    (q, k, v, past_key, past_value, sinks, query_positions, key_positions)
        => (attention, present_key, present_value) {
        one = Constant <value_ints = [1]> ()
        minus_one = Constant <value_ints = [-1]> ()
        kv_scalar = Constant <value_int: int = @kv_heads> ()
        kv = Reshape (kv_scalar, one)
        B_S = Shape <start = 0, end = 2> (q)
        kv_shape = Concat <axis = 0> (B_S, kv, minus_one)
        k_4d = Reshape (k, kv_shape)
        new_key = Transpose <perm = [0, 2, 1, 3]> (k_4d)
        present_key = Concat <axis = 2> (past_key, new_key)
        v_4d = Reshape (v, kv_shape)
        new_value = Transpose <perm = [0, 2, 1, 3]> (v_4d)
        present_value = Concat <axis = 2> (past_value, new_value)
        attention = com.gptoss.AttendWithSinks <
            num_heads: int = @num_heads, kv_heads: int = @kv_heads, scale: float = @scale, window: int = @window
        > (q, present_key, present_value, sinks, query_positions, key_positions)
    }""",
    calls=("AttendWithSinks",),
)

"""SharedSinkAttention: SinkAttention over a cache of fixed capacity, which a kernel updates in place.

Text index j, counted over all T = P + S positions of a batch's rows, padding included, lies in slot j mod C. A cache of
a slot for every index never wraps; a layer with a window needs only window + S - 1 slots, however long the text. What
lies in a slot follows from T and C alone, so the op has no more inputs than SinkAttention.

The caller sees to it that no key is overwritten that a query still sees: C >= T, or C >= S + window - 1 where no
padding lies between real tokens.
"""

from __future__ import annotations

from gptoss_export.exporter.ops.dialect import Op, make_schema
from gptoss_export.exporter.ops.sink_attention import SINK_ATTENTION

SHARED_SINK_ATTENTION = Op(
    name="SharedSinkAttention",
    torch_op=None,
    schema=make_schema(
        "SharedSinkAttention",
        "SinkAttention on a cache of C slots, text index j in slot j mod C. q [B, S, num_heads*D], "
        "k and v [B, S, kv_heads*D], cache [B, kv_heads, C, D], sinks [num_heads], query_positions [B, S], "
        "key_positions [B, T] -> attention [B, S, num_heads*D], the cache with the S new positions in their slots.",
        {
            "q": "tensor(float)",
            "k": "tensor(float)",
            "v": "tensor(float)",
            "cache_key": "tensor(float)",
            "cache_value": "tensor(float)",
            "sinks": "tensor(bfloat16)",
            "query_positions": "tensor(int64)",
            "key_positions": "tensor(int64)",
        },
        {"attention": "tensor(float)", "new_cache_key": "tensor(float)", "new_cache_value": "tensor(float)"},
        {name: attribute.type for name, attribute in SINK_ATTENTION.schema.attributes.items()},
    ),
    # The index in slot c is the largest one below T that is c modulo C. If it is new, its key comes from k, which in
    # the concatenation of cache and new keys lies behind the C slots.
    body="""<num_heads, kv_heads, scale, window>
    (q, k, v, cache_key, cache_value, sinks, query_positions, key_positions)
        => (attention, new_cache_key, new_cache_value) {
        zero = Constant <value_int = 0> ()
        one = Constant <value_int = 1> ()
        vector = Constant <value_ints = [1]> ()
        minus_one = Constant <value_ints = [-1]> ()
        kv_scalar = Constant <value_int: int = @kv_heads> ()
        kv = Reshape (kv_scalar, vector)
        B_S = Shape <start = 0, end = 2> (q)
        kv_shape = Concat <axis = 0> (B_S, kv, minus_one)
        k_4d = Reshape (k, kv_shape)
        new_key = Transpose <perm = [0, 2, 1, 3]> (k_4d)
        v_4d = Reshape (v, kv_shape)
        new_value = Transpose <perm = [0, 2, 1, 3]> (v_4d)

        S_vector = Shape <start = 1, end = 2> (q)
        S = Squeeze (S_vector)
        T_vector = Shape <start = 1, end = 2> (key_positions)
        T = Squeeze (T_vector)
        C_vector = Shape <start = 2, end = 3> (cache_key)
        C = Squeeze (C_vector)
        slots = Range (zero, C, one)
        last = Sub (T, one)
        behind = Sub (last, slots)
        back = Mod <fmod = 0> (behind, C)
        index = Sub (last, back)
        P = Sub (T, S)
        nth_new = Sub (index, P)
        in_new = Add (C, nth_new)
        is_new = GreaterOrEqual (nth_new, zero)
        source = Where (is_new, in_new, slots)
        both_keys = Concat <axis = 2> (cache_key, new_key)
        new_cache_key = Gather <axis = 2> (both_keys, source)
        both_values = Concat <axis = 2> (cache_value, new_value)
        new_cache_value = Gather <axis = 2> (both_values, source)

        filled = GreaterOrEqual (index, zero)
        some_index = Max (index, zero)
        positions = Gather <axis = 1> (key_positions, some_index)
        slot_positions = Where (filled, positions, minus_one)
        attention = com.gptoss.AttendWithSinks <
            num_heads: int = @num_heads, kv_heads: int = @kv_heads, scale: float = @scale, window: int = @window
        > (q, new_cache_key, new_cache_value, sinks, query_positions, slot_positions)
    }""",
    calls=("AttendWithSinks",),
)

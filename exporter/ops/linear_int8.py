"""LinearInt8 and LinearInt8NoBias: y = x W^T (+ b), where W is int8 with a scale for every 32 weights of a row.

W[n, k] = weight[n, k] * scales[n, k // 32]. A block of zeros may have the scale 0.
"""

from __future__ import annotations

from gptoss_export.exporter.ops.dialect import Op, make_schema

BLOCK = 32
"""Weights with one scale, as in MXFP4."""

_WEIGHT = """s = Cast <to = 1> (scales)
        w = DequantizeLinear <axis = 1, block_size = 32> (weight, s)
        w_t = Transpose <perm = [1, 0]> (w)"""

LINEAR_INT8 = Op(
    name="LinearInt8",
    torch_op=None,
    schema=make_schema(
        "LinearInt8",
        "y = x W^T + b. x [..., K], weight [N, K], scales [N, K/32], bias [N] -> y [..., N].",
        {"x": "tensor(float)", "weight": "tensor(int8)", "scales": "tensor(bfloat16)", "bias": "tensor(bfloat16)"},
        {"y": "tensor(float)"},
    ),
    body=f"""(x, weight, scales, bias) => (y) {{
        {_WEIGHT}
        product = MatMul (x, w_t)
        b = Cast <to = 1> (bias)
        y = Add (product, b)
    }}""",
)

LINEAR_INT8_NO_BIAS = Op(
    name="LinearInt8NoBias",
    torch_op=None,
    schema=make_schema(
        "LinearInt8NoBias",
        "y = x W^T. x [..., K], weight [N, K], scales [N, K/32] -> y [..., N].",
        {"x": "tensor(float)", "weight": "tensor(int8)", "scales": "tensor(bfloat16)"},
        {"y": "tensor(float)"},
    ),
    body=f"""(x, weight, scales) => (y) {{
        {_WEIGHT}
        y = MatMul (x, w_t)
    }}""",
)

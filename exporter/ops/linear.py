"""Linear, LinearNoBias and LinearQKV: y = x W^T (+ b), in float32 from weights as the checkpoint stores them.

The stored type stays inside the op, so that no cast of a weight ever stands in the graph, where a constant folder
would turn it into a float32 copy of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoss_export.exporter.ops.dialect import Op, make_schema


@torch.library.custom_op("gptoss::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [..., K] float32, weight [N, K] and bias [N] bfloat16 -> [..., N] float32."""
    return F.linear(x, weight.float(), bias.float())


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("gptoss::linear_no_bias", mutates_args=())
def linear_no_bias(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] float32, weight [N, K] bfloat16 -> [..., N] float32."""
    return F.linear(x, weight.float())


@linear_no_bias.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR = Op(
    name="Linear",
    torch_op=torch.ops.gptoss.linear.default,
    schema=make_schema(
        "Linear",
        "y = x W^T + b. x [..., K], weight [N, K], bias [N] -> y [..., N].",
        {"x": "tensor(float)", "weight": "tensor(bfloat16)", "bias": "tensor(bfloat16)"},
        {"y": "tensor(float)"},
    ),
    body="""(x, weight, bias) => (y) {
        w = Cast <to = 1> (weight)
        w_t = Transpose <perm = [1, 0]> (w)
        product = MatMul (x, w_t)
        b = Cast <to = 1> (bias)
        y = Add (product, b)
    }""",
)

LINEAR_NO_BIAS = Op(
    name="LinearNoBias",
    torch_op=torch.ops.gptoss.linear_no_bias.default,
    schema=make_schema(
        "LinearNoBias",
        "y = x W^T. x [..., K], weight [N, K] -> y [..., N].",
        {"x": "tensor(float)", "weight": "tensor(bfloat16)"},
        {"y": "tensor(float)"},
    ),
    body="""(x, weight) => (y) {
        w = Cast <to = 1> (weight)
        w_t = Transpose <perm = [1, 0]> (w)
        y = MatMul (x, w_t)
    }""",
)

_PARTS = ("q", "k", "v")

LINEAR_QKV = Op(
    name="LinearQKV",
    torch_op=None,
    schema=make_schema(
        "LinearQKV",
        "Three Linear of one x: y = x W^T + b. x [..., K]; weight [N, K], bias [N] -> y [..., N], for q, k and v.",
        {"x": "tensor(float)"}
        | {f"{part}_{kind}": "tensor(bfloat16)" for part in _PARTS for kind in ("weight", "bias")},
        dict.fromkeys(_PARTS, "tensor(float)"),
    ),
    body="""(x, q_weight, q_bias, k_weight, k_bias, v_weight, v_bias) => (q, k, v) {
        q = com.gptoss.Linear (x, q_weight, q_bias)
        k = com.gptoss.Linear (x, k_weight, k_bias)
        v = com.gptoss.Linear (x, v_weight, v_bias)
    }""",
    calls=("Linear",),
)

"""MoERouter: which experts a token visits, and with what weights.

top-k of the raw logits, then a softmax over those k only (openai/gpt-oss, `gpt_oss/torch/model.py`, MLPBlock). Always
in float32: in bfloat16 the k-th and the next logit tie for a few percent of tokens, and every tie is a coin toss.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoss_export.exporter.ops.dialect import INT, Op, make_schema


@torch.library.custom_op("gptoss::moe_router", mutates_args=())
def moe_router(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """x [..., H] float32, weight [E, H] and bias [E] bfloat16 -> weights [..., K] float32, experts [..., K] int64."""
    logits = F.linear(x, weight.float(), bias.float())
    values, experts = torch.topk(logits, top_k, dim=-1)
    return torch.softmax(values, dim=-1), experts


@moe_router.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], top_k)
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


MOE_ROUTER = Op(
    name="MoERouter",
    torch_op=torch.ops.gptoss.moe_router.default,
    schema=make_schema(
        "MoERouter",
        "The top_k largest of the logits x W^T + b and the softmax over them alone. "
        "x [..., H], weight [E, H], bias [E] -> weights [..., K], experts [..., K]; ties go to the lower expert.",
        {"x": "tensor(float)", "weight": "tensor(bfloat16)", "bias": "tensor(bfloat16)"},
        {"weights": "tensor(float)", "experts": "tensor(int64)"},
        {"top_k": INT},
    ),
    body="""<top_k> (x, weight, bias) => (weights, experts) {
        w = Cast <to = 1> (weight)
        w_t = Transpose <perm = [1, 0]> (w)
        product = MatMul (x, w_t)
        b = Cast <to = 1> (bias)
        logits = Add (product, b)
        k_scalar = Constant <value_int: int = @top_k> ()
        one = Constant <value_ints = [1]> ()
        k = Reshape (k_scalar, one)
        values, experts = TopK <axis = -1, largest = 1, sorted = 1> (logits, k)
        weights = Softmax <axis = -1> (values)
    }""",
)

"""MoEExperts and MoEExpertsDense: the experts that the router chose, and only those, one after the other.

    h = W1 x + b1;  gate = min(h[0::2], limit);  up = clamp(h[1::2], -limit, limit)
    y = sum over a token's experts of  weight * (W2 (gate * sigmoid(alpha * gate) * (up + 1)) + b2)

(openai/gpt-oss, `gpt_oss/torch/model.py`, swiglu and MLPBlock). MoEExperts reads MXFP4 as stored: blocks
[E, rows, K/32, 16] and scales [E, rows, K/32], rows being output features (OCP Microscaling Formats v1.0).
MoEExpertsDense reads the bfloat16 of fine-tunes, which is input-major: [E, K, rows].

An expert that no token visits is never read, and at most one expert is held in float32 at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gptoss_export.exporter.checkpoint.mxfp4 import BYTE_TABLE, SCALE_TABLE
from gptoss_export.exporter.ops.dialect import FLOAT, Op, make_schema


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """blocks [..., G, 16] and scales [..., G] uint8 -> [..., 32 G] float32, exactly."""
    values = torch.from_numpy(BYTE_TABLE)[blocks.int()] * torch.from_numpy(SCALE_TABLE)[scales.int()][..., None, None]
    return values.flatten(-3)


def swiglu(h: Tensor, alpha: float, limit: float) -> Tensor:
    """h [..., 2 I] with gate and up interleaved -> [..., I]."""
    gate, up = h[..., 0::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def sum_of_experts(x: Tensor, weights: Tensor, experts: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Adds weight * expert(e, its tokens) for every expert e that is chosen, in ascending order of e."""
    tokens, top_k = x.reshape(-1, x.shape[-1]), experts.shape[-1]
    chosen, weight_of = experts.reshape(-1, top_k), weights.reshape(-1, top_k)
    y = torch.zeros_like(tokens)
    for e in torch.unique(chosen).tolist():
        rows, places = torch.where(chosen == e)
        y.index_add_(0, rows, weight_of[rows, places, None] * expert(e, tokens[rows]))
    return y.reshape(x.shape)


@torch.library.custom_op("gptoss::moe_experts", mutates_args=())
def moe_experts(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    swiglu_alpha: float,
    swiglu_limit: float,
) -> Tensor:
    """x [..., H] and weights [..., K] float32, experts [..., K] int64 -> y [..., H] float32.

    gate_up: blocks [E, 2I, H/32, 16], scales [E, 2I, H/32] uint8, bias [E, 2I] bfloat16; down: [E, H, I/32, 16],
    [E, H, I/32], [E, H].
    """

    def expert(e: int, t: Tensor) -> Tensor:
        h = F.linear(t, decode_mxfp4(gate_up_blocks[e], gate_up_scales[e]), gate_up_bias[e].float())
        a = swiglu(h, swiglu_alpha, swiglu_limit)
        return F.linear(a, decode_mxfp4(down_blocks[e], down_scales[e]), down_bias[e].float())

    return sum_of_experts(x, weights, experts, expert)


@moe_experts.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up_blocks: Tensor,
    gate_up_scales: Tensor,
    gate_up_bias: Tensor,
    down_blocks: Tensor,
    down_scales: Tensor,
    down_bias: Tensor,
    swiglu_alpha: float,
    swiglu_limit: float,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gptoss::moe_experts_dense", mutates_args=())
def moe_experts_dense(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    swiglu_alpha: float,
    swiglu_limit: float,
) -> Tensor:
    """The same from gate_up [E, H, 2I] and down [E, I, H] bfloat16."""

    def expert(e: int, t: Tensor) -> Tensor:
        a = swiglu(t @ gate_up[e].float() + gate_up_bias[e].float(), swiglu_alpha, swiglu_limit)
        return a @ down[e].float() + down_bias[e].float()

    return sum_of_experts(x, weights, experts, expert)


@moe_experts_dense.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    swiglu_alpha: float,
    swiglu_limit: float,
) -> Tensor:
    return torch.empty_like(x)


def visiting_body(parameters: str, gate_up: str, down: str) -> str:
    """A function body that asks an expert about the tokens that chose it, one expert after the other.

    gate_up: the nodes that give h [t, 2I] float32 from `mine` [t, H], the rows of x, and the expert's index e.
    down: those that give out [t, H] float32 from a [t, I] float32.
    """
    return f"""<swiglu_alpha, swiglu_limit> (x, weights, experts, {parameters}) => (y) {{
        minus_one = Constant <value_ints = [-1]> ()
        one = Constant <value_ints = [1]> ()
        zero = Constant <value_int = 0> ()
        yes = Constant <value = bool {{1}}> ()
        H = Shape <start = -1> (x)
        K = Shape <start = -1> (experts)
        token_shape = Concat <axis = 0> (minus_one, H)
        tokens = Reshape (x, token_shape)
        choice_shape = Concat <axis = 0> (minus_one, K)
        choices = Reshape (experts, choice_shape)
        chosen = Cast <to = 7> (choices)
        weight_of = Reshape (weights, choice_shape)
        E = Shape <start = 0, end = 1> (gate_up_bias)
        experts_scalar = Squeeze (E)
        tokens_dims = Shape (tokens)
        nothing = ConstantOfShape <value = float[1] {{0}}> (tokens_dims)
        alpha = Constant <value_float: float = @swiglu_alpha> ()
        limit = Constant <value_float: float = @swiglu_limit> ()
        low = Neg (limit)
        one_float = Constant <value_float = 1.0> ()
        sum = Loop (experts_scalar, yes, nothing) <body = visit (int64 e, bool on, float[T, H] so_far)
                => (bool on_out, float[T, H] so_far_out) {{
            on_out = Identity (on)
            here = Equal (chosen, e)
            here_float = Cast <to = 1> (here)
            any_place = ReduceMax <keepdims = 0> (here_float, one)
            rows_2d = NonZero (any_place)
            rows = Reshape (rows_2d, minus_one)
            count = Size (rows)
            visited = Greater (count, zero)
            so_far_out = If (visited) <then_branch = add_expert () => (float[T, H] added) {{
                mine = Gather <axis = 0> (tokens, rows)
                {gate_up}
                pair_shape = Constant <value_ints = [0, -1, 2]> ()
                pairs = Reshape (h, pair_shape)
                first = Constant <value_int = 0> ()
                second = Constant <value_int = 1> ()
                gate_raw = Gather <axis = 2> (pairs, first)
                up_raw = Gather <axis = 2> (pairs, second)
                gate = Min (gate_raw, limit)
                up = Clip (up_raw, low, limit)
                steep = Mul (gate, alpha)
                sigmoid = Sigmoid (steep)
                glu = Mul (gate, sigmoid)
                up_one = Add (up, one_float)
                a = Mul (glu, up_one)
                {down}
                masked_weights = Mul (weight_of, here_float)
                weight = ReduceSum <keepdims = 1> (masked_weights, one)
                my_weight = Gather <axis = 0> (weight, rows)
                weighted = Mul (out, my_weight)
                before = Gather <axis = 0> (so_far, rows)
                after = Add (before, weighted)
                row_indices = Unsqueeze (rows, one)
                added = ScatterND (so_far, row_indices, after)
            }}, else_branch = skip_expert () => (float[T, H] unchanged) {{
                unchanged = Identity (so_far)
            }}>
        }}>
        x_shape = Shape (x)
        y = Reshape (sum, x_shape)
    }}"""


def decode_nodes(name: str, as_bytes: str = "") -> str:
    """Nodes that decode one expert's matrix, [rows, K] float32, and take its bias.

    as_bytes: the operator that makes bytes of int32 values that were read with a sign, `{}` being these.
    """

    def codes(new: str, old: str) -> str:
        if not as_bytes:
            return f"{new} = Cast <to = 6> ({old})"
        return f"{new}_signed = Cast <to = 6> ({old})\n{new} = {as_bytes.format(f'{new}_signed')}"

    return f"""
                {name}_bytes = Gather <axis = 0> ({name}_blocks, e)
                {codes(f"{name}_codes", f"{name}_bytes")}
                {name}_values = Gather <axis = 0> (byte_table, {name}_codes)
                {name}_exponents = Gather <axis = 0> ({name}_scales, e)
                {codes(f"{name}_exponent_codes", f"{name}_exponents")}
                {name}_factors = Gather <axis = 0> (scale_table, {name}_exponent_codes)
                {name}_axes = Constant <value_ints = [2, 3]> ()
                {name}_factors_4d = Unsqueeze ({name}_factors, {name}_axes)
                {name}_scaled = Mul ({name}_values, {name}_factors_4d)
                {name}_shape = Constant <value_ints = [0, -1]> ()
                {name}_w = Reshape ({name}_scaled, {name}_shape)
                {name}_b_stored = Gather <axis = 0> ({name}_bias, e)
                {name}_b = Cast <to = 1> ({name}_b_stored)"""


def _dense(name: str) -> str:
    """Nodes that take one expert's matrix, [K, rows] float32, and its bias."""
    return f"""
                {name}_stored = Gather <axis = 0> ({name}, e)
                {name}_w = Cast <to = 1> ({name}_stored)
                {name}_b_stored = Gather <axis = 0> ({name}_bias, e)
                {name}_b = Cast <to = 1> ({name}_b_stored)"""


_TOKENS = {"x": "tensor(float)", "weights": "tensor(float)", "experts": "tensor(int64)"}
_ATTRIBUTES = {"swiglu_alpha": FLOAT, "swiglu_limit": FLOAT}

MOE_EXPERTS = Op(
    name="MoEExperts",
    torch_op=torch.ops.gptoss.moe_experts.default,
    schema=make_schema(
        "MoEExperts",
        "The weighted sum of the chosen experts, from MXFP4 weights as stored. x [..., H], weights, experts [..., K], "
        "gate_up blocks [E, 2I, H/32, 16], scales [E, 2I, H/32], bias [E, 2I] (gate and up interleaved), "
        "down blocks [E, H, I/32, 16], scales [E, H, I/32], bias [E, H] -> y [..., H].",
        {
            **_TOKENS,
            "gate_up_blocks": "tensor(uint8)",
            "gate_up_scales": "tensor(uint8)",
            "gate_up_bias": "tensor(bfloat16)",
            "down_blocks": "tensor(uint8)",
            "down_scales": "tensor(uint8)",
            "down_bias": "tensor(bfloat16)",
        },
        {"y": "tensor(float)"},
        _ATTRIBUTES,
    ),
    body=visiting_body(
        "gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias",
        f"{decode_nodes('gate_up')}\nh = Gemm <transB = 1> (mine, gate_up_w, gate_up_b)",
        f"{decode_nodes('down')}\nout = Gemm <transB = 1> (a, down_w, down_b)",
    ),
    constants={"byte_table": BYTE_TABLE, "scale_table": SCALE_TABLE},
)

MOE_EXPERTS_DENSE = Op(
    name="MoEExpertsDense",
    torch_op=torch.ops.gptoss.moe_experts_dense.default,
    schema=make_schema(
        "MoEExpertsDense",
        "The weighted sum of the chosen experts, from bfloat16 weights. x [..., H], weights and experts [..., K], "
        "gate_up [E, H, 2I], bias [E, 2I] (gate and up interleaved), down [E, I, H], bias [E, H] -> y [..., H].",
        {
            **_TOKENS,
            "gate_up": "tensor(bfloat16)",
            "gate_up_bias": "tensor(bfloat16)",
            "down": "tensor(bfloat16)",
            "down_bias": "tensor(bfloat16)",
        },
        {"y": "tensor(float)"},
        _ATTRIBUTES,
    ),
    body=visiting_body(
        "gate_up, gate_up_bias, down, down_bias",
        f"{_dense('gate_up')}\nh = Gemm (mine, gate_up_w, gate_up_b)",
        f"{_dense('down')}\nout = Gemm (a, down_w, down_b)",
    ),
)

"""MoEExpertsMXFP4: MoEExperts as TensorRT takes it, as a plugin or by a body that its parser knows.

What differs from MoEExperts: TensorRT has no 8-bit unsigned type, so blocks and scales are the checkpoint's bytes read
as int8; x has the target's type, and what goes into the second matrix is rounded to it; tokens are rows. The body asks
every expert about every token, since TensorRT's parser can neither count nor index by what it counted (NonZero), and
all of them at once, since its builder dies on three loops in a float32 network: a definition to test against, not to
ship.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from gptoss_export.exporter.checkpoint.mxfp4 import BYTE_TABLE, SCALE_TABLE
from gptoss_export.exporter.ops.dialect import DOMAIN, FLOAT, VERSION, Op
from gptoss_export.exporter.ops.moe_experts import decode_nodes, visiting_body

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""What a node says so that TensorRT's parser looks for the plugin before it takes the body."""


def _bytes(name: str, stored: str) -> str:
    """Nodes that read `stored`, int8, as the bytes 0 to 255 that it was bit-cast from, int32."""
    return f"""
        {name}_signed = Cast <to = 6> ({stored})
        {name}_shifted = Add ({name}_signed, byte_values)
        {name}_codes = Mod <fmod = 0> ({name}_shifted, byte_values)"""


def _matrices(name: str) -> str:
    """Nodes that decode the matrices of all experts, transposed, [E, K, rows] float32; biases [E, 1, rows]."""
    return f"""{_bytes(f"{name}_blocks", f"{name}_blocks")}
        {name}_values = Gather <axis = 0> (byte_table, {name}_blocks_codes)
        {_bytes(f"{name}_scales", f"{name}_scales")}
        {name}_factors = Gather <axis = 0> (scale_table, {name}_scales_codes)
        {name}_factors_5d = Unsqueeze ({name}_factors, value_axes)
        {name}_scaled = Mul ({name}_values, {name}_factors_5d)
        {name}_w = Reshape ({name}_scaled, matrix_shape)
        {name}_w_t = Transpose <perm = [0, 2, 1]> ({name}_w)
        {name}_b_float = Cast <to = 1> ({name}_bias)
        {name}_b = Unsqueeze ({name}_b_float, row_axis)"""


_BODY = f"""<swiglu_alpha, swiglu_limit>
    (x, weights, experts, gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias) => (y) {{
        value_axes = Constant <value_ints = [3, 4]> ()
        row_axis = Constant <value_ints = [1]> ()
        matrix_shape = Constant <value_ints = [0, 0, -1]> ()
        pair_shape = Constant <value_ints = [0, 0, -1, 2]> ()
        first_axis = Constant <value_ints = [0]> ()
        last_axis = Constant <value_ints = [-1]> ()
        other_axes = Constant <value_ints = [1, 2]> ()
        first = Constant <value_int = 0> ()
        second = Constant <value_int = 1> ()
        zero = Constant <value_float = 0.0> ()
        one = Constant <value_float = 1.0> ()
        alpha = Constant <value_float: float = @swiglu_alpha> ()
        limit = Constant <value_float: float = @swiglu_limit> ()
        low = Neg (limit)

        E_vector = Shape <start = 0, end = 1> (gate_up_bias)
        E = Squeeze (E_vector)
        ids = Range (first, E, second)
        ids_int = Cast <to = 6> (ids)
        ids_3d = Unsqueeze (ids_int, other_axes)
        here = Equal (experts, ids_3d)
        weights_here = Where (here, weights, zero)
        weight = ReduceSum <keepdims = 1> (weights_here, last_axis)

        tokens = Cast <to = 1> (x)
        {_matrices("gate_up")}
        products = MatMul (tokens, gate_up_w_t)
        h = Add (products, gate_up_b)
        pairs = Reshape (h, pair_shape)
        gate_raw = Gather <axis = 3> (pairs, first)
        up_raw = Gather <axis = 3> (pairs, second)
        gate = Min (gate_raw, limit)
        up_low = Max (up_raw, low)
        up = Min (up_low, limit)
        steep = Mul (gate, alpha)
        sigmoid = Sigmoid (steep)
        glu = Mul (gate, sigmoid)
        up_one = Add (up, one)
        a_float = Mul (glu, up_one)
        a_stored = CastLike (a_float, x)
        a = Cast <to = 1> (a_stored)
        {_matrices("down")}
        down_products = MatMul (a, down_w_t)
        out = Add (down_products, down_b)
        of_all = Mul (out, weight)
        idle = Equal (weight, zero)
        weighted = Where (idle, zero, of_all)
        y = ReduceSum <keepdims = 0> (weighted, first_axis)
    }}"""

_T = "T"
_PARAMETERS = {
    "x": _T,
    "weights": "tensor(float)",
    "experts": "tensor(int32)",
    "gate_up_blocks": "tensor(int8)",
    "gate_up_scales": "tensor(int8)",
    "gate_up_bias": "tensor(bfloat16)",
    "down_blocks": "tensor(int8)",
    "down_scales": "tensor(int8)",
    "down_bias": "tensor(bfloat16)",
}

MOE_EXPERTS_MXFP4 = Op(
    name="MoEExpertsMXFP4",
    torch_op=None,
    schema=onnx.defs.OpSchema(
        "MoEExpertsMXFP4",
        DOMAIN,
        VERSION,
        doc="The weighted sum of the chosen experts, from MXFP4 bytes read as int8. x [T, H], weights, experts [T, K], "
        "gate_up blocks [E, 2I, H/32, 16], scales [E, 2I, H/32], bias [E, 2I] (gate and up interleaved), down blocks "
        "[E, H, I/32, 16], scales [E, H, I/32], bias [E, H] -> y [T, H]. What the second matrix is multiplied with is "
        "rounded to x's type; sums are float32.",
        inputs=[onnx.defs.OpSchema.FormalParameter(name, kind) for name, kind in _PARAMETERS.items()],
        outputs=[onnx.defs.OpSchema.FormalParameter("y", "tensor(float)")],
        type_constraints=[(_T, ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"], "the target's type")],
        attributes=[
            *(onnx.defs.OpSchema.Attribute(name, FLOAT, required=True) for name in ("swiglu_alpha", "swiglu_limit")),
            *(
                onnx.defs.OpSchema.Attribute(name, onnx.defs.OpSchema.AttrType.STRING, required=False)
                for name in PLUGIN_ATTRIBUTES
            ),
        ],
    ),
    body=_BODY,
    constants={
        "byte_table": BYTE_TABLE,
        "scale_table": SCALE_TABLE,
        "byte_values": np.array(256, np.int32),
    },
)

_AS_BYTES = "Mod <fmod = 0> ({}, byte_values)"

VISITED_ONLY = replace(
    MOE_EXPERTS_MXFP4,
    body=visiting_body(
        ", ".join(name for name in _PARAMETERS if "_" in name),
        f"""{decode_nodes("gate_up", _AS_BYTES)}
                mine_float = Cast <to = 1> (mine)
                h = Gemm <transB = 1> (mine_float, gate_up_w, gate_up_b)""",
        f"""{decode_nodes("down", _AS_BYTES)}
                a_stored = CastLike (a, x)
                a_float = Cast <to = 1> (a_stored)
                out = Gemm <transB = 1> (a_float, down_w, down_b)""",
    ),
)
"""The same for runtimes that can count: one expert after the other, and only those that a token chose."""

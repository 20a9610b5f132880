"""MoEExpertsMXFP4: MoEExperts as TensorRT takes it, as a plugin or by a body that its parser knows.

What differs from MoEExperts: TensorRT has no 8-bit unsigned type, so blocks and scales are the checkpoint's bytes read
as int8; x has the target's type, and what goes into the second matrix is rounded to it; tokens are rows. The body asks
every expert about every token, since TensorRT can neither count nor index by what it counted (NonZero): it is the
definition, and slow.
"""

from __future__ import annotations

import numpy as np
import onnx

from gptoss_export.exporter.checkpoint.mxfp4 import BYTE_TABLE, SCALE_TABLE
from gptoss_export.exporter.ops.dialect import DOMAIN, FLOAT, VERSION, Op

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}
"""What a node says so that TensorRT's parser looks for the plugin before it takes the body."""


def _matrix(name: str) -> str:
    """Nodes that decode matrix e, [rows, K] float32, and take its bias [rows]."""
    return f"""
            {name}_bytes = Gather <axis = 0> ({name}_blocks, e)
            {name}_signed = Cast <to = 6> ({name}_bytes)
            {name}_shifted = Add ({name}_signed, byte_values)
            {name}_codes = Mod <fmod = 0> ({name}_shifted, byte_values)
            {name}_values = Gather <axis = 0> (byte_table, {name}_codes)
            {name}_exponents = Gather <axis = 0> ({name}_scales, e)
            {name}_signed_exponents = Cast <to = 6> ({name}_exponents)
            {name}_shifted_exponents = Add ({name}_signed_exponents, byte_values)
            {name}_exponent_codes = Mod <fmod = 0> ({name}_shifted_exponents, byte_values)
            {name}_factors = Gather <axis = 0> (scale_table, {name}_exponent_codes)
            {name}_factors_4d = Unsqueeze ({name}_factors, last_axes)
            {name}_scaled = Mul ({name}_values, {name}_factors_4d)
            {name}_w = Reshape ({name}_scaled, matrix_shape)
            {name}_b_stored = Gather <axis = 0> ({name}_bias, e)
            {name}_b = Cast <to = 1> ({name}_b_stored)"""


_BODY = f"""<swiglu_alpha, swiglu_limit>
    (x, weights, experts, gate_up_blocks, gate_up_scales, gate_up_bias, down_blocks, down_scales, down_bias) => (y) {{
        one = Constant <value_ints = [1]> ()
        yes = Constant <value = bool {{1}}> ()
        tokens = Cast <to = 1> (x)
        E_vector = Shape <start = 0, end = 1> (gate_up_bias)
        E = Squeeze (E_vector)
        dims = Shape (tokens)
        nothing = ConstantOfShape <value = float[1] {{0}}> (dims)
        zero = Constant <value_float = 0.0> ()
        alpha = Constant <value_float: float = @swiglu_alpha> ()
        limit = Constant <value_float: float = @swiglu_limit> ()
        low = Neg (limit)
        one_float = Constant <value_float = 1.0> ()
        last_axes = Constant <value_ints = [2, 3]> ()
        matrix_shape = Constant <value_ints = [0, -1]> ()
        pair_shape = Constant <value_ints = [0, -1, 2]> ()
        first = Constant <value_int = 0> ()
        second = Constant <value_int = 1> ()
        y = Loop (E, yes, nothing) <body = visit (int64 e, bool on, float[T, H] so_far)
                => (bool on_out, float[T, H] so_far_out) {{
            on_out = Identity (on)
            e_int = Cast <to = 6> (e)
            here = Equal (experts, e_int)
            weights_here = Where (here, weights, zero)
            weight = ReduceSum <keepdims = 1> (weights_here, one)
            {_matrix("gate_up")}
            h = Gemm <transB = 1> (tokens, gate_up_w, gate_up_b)
            pairs = Reshape (h, pair_shape)
            gate_raw = Gather <axis = 2> (pairs, first)
            up_raw = Gather <axis = 2> (pairs, second)
            gate = Min (gate_raw, limit)
            up_low = Max (up_raw, low)
            up = Min (up_low, limit)
            steep = Mul (gate, alpha)
            sigmoid = Sigmoid (steep)
            glu = Mul (gate, sigmoid)
            up_one = Add (up, one_float)
            a_float = Mul (glu, up_one)
            a_stored = CastLike (a_float, x)
            a = Cast <to = 1> (a_stored)
            {_matrix("down")}
            out = Gemm <transB = 1> (a, down_w, down_b)
            weighted = Mul (out, weight)
            so_far_out = Add (so_far, weighted)
        }}>
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

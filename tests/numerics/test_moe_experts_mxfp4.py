"""The experts as TensorRT takes them: both bodies in ONNX Runtime against the definition in float64, and torch's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from gptoss_export.exporter.checkpoint.mxfp4 import decode
from gptoss_export.exporter.ops import DOMAIN, OPSET, VERSION, Op
from gptoss_export.exporter.ops.moe_experts import moe_experts
from gptoss_export.exporter.ops.moe_experts_mxfp4 import MOE_EXPERTS_MXFP4, VISITED_ONLY

BODIES = {"parsed by TensorRT": MOE_EXPERTS_MXFP4, "visited only": VISITED_ONLY}
TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
ATTRIBUTES = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
EXPERTS, HIDDEN, INTERMEDIATE = 7, 64, 96


@dataclass(frozen=True)
class Case:
    """Operands by the names of the schema; blocks and scales as they lie in a checkpoint, uint8."""

    x: np.ndarray
    weights: np.ndarray
    experts: np.ndarray
    gate_up_blocks: np.ndarray
    gate_up_scales: np.ndarray
    gate_up_bias: np.ndarray
    down_blocks: np.ndarray
    down_scales: np.ndarray
    down_bias: np.ndarray


def case(
    seed: int = 0, tokens: int = 5, top_k: int = 4, experts: int = EXPERTS, kind: str = "fp32", wide: bool = False
) -> Case:
    """Random bytes, every one of the 256 in each expert. wide: h reaches the clamps on both sides."""
    rng = np.random.default_rng(seed)

    def blocks(rows: int, columns: int) -> np.ndarray:
        size = rows * columns // 2
        found = [rng.permutation(np.resize(np.arange(256, dtype=np.uint8), size)) for _ in range(experts)]
        return np.stack(found).reshape(experts, rows, columns // 32, 16)

    def scales(rows: int, columns: int, low: int, high: int) -> np.ndarray:
        return rng.integers(low, high, (experts, rows, columns // 32), dtype=np.uint8)

    def bias(rows: int) -> np.ndarray:
        return rng.standard_normal((experts, rows)).astype(ml_dtypes.bfloat16)

    logits = rng.standard_normal((tokens, top_k))
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    return Case(
        x=rng.standard_normal((tokens, HIDDEN), np.float32).astype(TYPES[kind]),
        weights=weights.astype(np.float32),
        experts=chosen.astype(np.int32),
        gate_up_blocks=blocks(2 * INTERMEDIATE, HIDDEN),
        gate_up_scales=scales(2 * INTERMEDIATE, HIDDEN, *((123, 128) if wide else (120, 124))),
        gate_up_bias=bias(2 * INTERMEDIATE),
        down_blocks=blocks(HIDDEN, INTERMEDIATE),
        down_scales=scales(HIDDEN, INTERMEDIATE, 119, 126),
        down_bias=bias(HIDDEN),
    )


def run(op: Op, operands: Case) -> np.ndarray:
    """[T, H] float32, from a model that is one node. bfloat16 goes in as initializers: numpy feeds cannot carry it."""
    values: Mapping[str, np.ndarray] = {
        name: value.view(np.int8) if value.dtype == np.uint8 else value for name, value in vars(operands).items()
    }
    fed = {name: value for name, value in values.items() if value.dtype != ml_dtypes.bfloat16}
    graph = helper.make_graph(
        [helper.make_node(op.name, list(values), ["y"], domain=DOMAIN, **ATTRIBUTES)],
        "experts",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in fed.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, None])],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name not in fed],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=[op.function], opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    y: np.ndarray = session.run(None, fed)[0]
    assert (y.dtype, y.shape) == (np.float32, (len(operands.x), HIDDEN))
    return y


def definition(operands: Case, rounded: bool = True) -> np.ndarray:
    """[T, H] float64. rounded: what goes into the second matrix is rounded to the type of x."""
    c, kind = operands, operands.x.dtype
    y = np.zeros((len(c.x), HIDDEN))
    for t, k in np.ndindex(c.experts.shape):
        e = c.experts[t, k]
        w1 = decode(c.gate_up_blocks[e], c.gate_up_scales[e]).astype(np.float64)
        w2 = decode(c.down_blocks[e], c.down_scales[e]).astype(np.float64)
        h = w1 @ c.x[t].astype(np.float64) + c.gate_up_bias[e].astype(np.float64)
        limit = ATTRIBUTES["swiglu_limit"]
        gate, up = np.minimum(h[0::2], limit), np.clip(h[1::2], -limit, limit)
        with np.errstate(over="ignore"):
            a = gate / (1 + np.exp(-ATTRIBUTES["swiglu_alpha"] * gate)) * (up + 1)
        if rounded:
            a = a.astype(np.float32).astype(kind).astype(np.float64)
        y[t] += c.weights[t, k].astype(np.float64) * (w2 @ a + c.down_bias[e].astype(np.float64))
    return y


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, in units of the largest number that was expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(params=list(BODIES))
def op(request: pytest.FixtureRequest) -> Op:
    return BODIES[request.param]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("kind", list(TYPES))
def test_against_the_definition(kind: str, wide: bool, op: Op) -> None:
    operands = case(kind=kind, wide=wide)
    # A sum in float32 now and then ends on the other side of a half, where the next number of 16 bits is taken.
    limit = {"fp16": 2e-4, "bf16": 2e-3, "fp32": 2e-6}[kind]
    assert worst(run(op, operands), definition(operands)) < limit


def test_the_wide_case_reaches_every_clamp() -> None:
    operands = case(wide=True)
    w1 = decode(operands.gate_up_blocks, operands.gate_up_scales)
    h = np.einsum("erk,tk->ter", w1, operands.x) + operands.gate_up_bias.astype(np.float32)[None]
    gate, up = h[..., 0::2], h[..., 1::2]
    for clamped in (gate > 7, gate < -7, up > 7, up < -7):
        assert 0.02 < clamped.mean() < 0.6


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_number_of_tokens_and_places(tokens: int, top_k: int, op: Op) -> None:
    operands = case(10 * tokens + top_k, tokens, top_k)
    assert worst(run(op, operands), definition(operands)) < 2e-6


@pytest.mark.parametrize("experts", [1, 3, 5, 6, 32])
def test_any_number_of_experts(experts: int, op: Op) -> None:
    operands = case(experts, 3, min(experts, 4), experts)
    assert worst(run(op, operands), definition(operands)) < 2e-6


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_what_enters_the_second_matrix_is_rounded_to_the_type_of_x(kind: str, op: Op) -> None:
    operands = case(kind=kind)
    y = run(op, operands)
    near = np.abs(y - definition(operands)).mean()
    assert near < np.abs(y - definition(operands, rounded=False)).mean() / 5


@pytest.mark.parametrize("seed", range(3))
def test_in_float32_it_is_the_experts_of_the_canonical_graph(seed: int, op: Op) -> None:
    operands = case(seed)
    tensors = {
        name: torch.from_numpy(value.astype(np.float32)).bfloat16()
        if value.dtype == ml_dtypes.bfloat16
        else torch.from_numpy(value)
        for name, value in vars(operands).items()
    }
    expected = moe_experts(**{**tensors, "experts": tensors["experts"].long()}, **ATTRIBUTES).numpy()
    assert worst(run(op, operands), expected) < 1e-6


@pytest.mark.parametrize("scale", [0, 1, 2, 27, 126, 127, 128, 200, 252, 253, 254])
def test_scales_of_any_size(scale: int, op: Op) -> None:
    """x makes up for them, so that h is what it is at 127; 6 and 4 times 2^127 are beyond float32 and left out."""
    operands = case(tokens=2)
    x = np.zeros_like(operands.x)
    x[0, 5], x[1, 32] = 1, -0.5
    blocks = operands.gate_up_blocks & 0x33 if scale > 252 else operands.gate_up_blocks
    scaled = replace(
        operands,
        x=np.ldexp(x, 127 - scale).astype(np.float32),
        gate_up_blocks=blocks,
        gate_up_scales=np.full_like(operands.gate_up_scales, scale),
    )
    expected = definition(scaled)
    usual = replace(scaled, x=x, gate_up_scales=np.full_like(operands.gate_up_scales, 127))
    assert np.array_equal(expected, definition(usual))
    assert worst(run(op, scaled), expected) < 2e-6


@pytest.mark.parametrize("first", range(0, 256, 16))
def test_every_byte_is_two_numbers_the_low_nibble_first(first: int, op: Op) -> None:
    """Through the smallest network that shows them: an expert whose gates are one byte a row, and the identity."""
    rows = np.arange(first, first + 16, dtype=np.uint8)
    operands = case(tokens=2, top_k=1, experts=1)
    blocks = np.zeros_like(operands.gate_up_blocks)
    blocks[0, 0:32:2] = rows[:, None, None]
    blocks[0, 1:32:2] = 0
    down = np.zeros_like(operands.down_blocks)
    # Row j of the second matrix is 1 at column j.
    for j in range(16):
        down[0, j, j // 32, j % 32 // 2] = 2 << 4 * (j % 2)
    x = np.zeros_like(operands.x)
    x[0, 6] = x[1, 7] = 1
    operands = replace(
        operands,
        x=x,
        weights=np.ones((2, 1), np.float32),
        experts=np.zeros((2, 1), np.int32),
        gate_up_blocks=blocks,
        gate_up_scales=np.full_like(operands.gate_up_scales, 127),
        gate_up_bias=np.zeros_like(operands.gate_up_bias),
        down_blocks=down,
        down_scales=np.full_like(operands.down_scales, 127),
        down_bias=np.zeros_like(operands.down_bias),
    )
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    gate = np.stack([values[rows & 15], values[rows >> 4]])
    expected = gate / (1 + np.exp(-1.702 * gate))
    np.testing.assert_allclose(run(op, operands)[:, :16], expected, rtol=1e-6, atol=1e-6)


def unvisited(operands: Case) -> np.ndarray:
    return np.setdiff1d(np.arange(len(operands.down_bias)), operands.experts)


@pytest.mark.parametrize("scale", [140, 190, 240, 253, 254])
@pytest.mark.parametrize("part", ["gate_up", "down"])
def test_experts_that_nobody_chose_do_not_matter(part: str, scale: int, op: Op) -> None:
    """However large their numbers are: beyond float32, too, where the body for TensorRT multiplies them by nothing."""
    operands = case(tokens=2, top_k=2)
    idle = unvisited(operands)
    assert len(idle) >= 3
    scales = getattr(operands, f"{part}_scales").copy()
    scales[idle] = scale
    loud = replace(operands, **{f"{part}_scales": scales})
    y = run(op, loud)
    assert np.isfinite(y).all()
    assert np.array_equal(y, run(op, operands))


def test_what_is_no_number_stays_none(op: Op) -> None:
    """A router that went wrong is not hidden by what keeps other experts out."""
    operands = case(tokens=2, top_k=2)
    weights = operands.weights.copy()
    weights[1, 0] = np.nan
    y = run(op, replace(operands, weights=weights))
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_the_same_bits_again_and_in_another_batch(op: Op) -> None:
    operands = case()
    y = run(op, operands)
    assert np.array_equal(run(op, operands), y)
    alone = replace(operands, x=operands.x[2:3], weights=operands.weights[2:3], experts=operands.experts[2:3])
    assert worst(run(op, alone), y[2:3]) < 1e-6

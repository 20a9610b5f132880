"""Every op three times: its function body in ONNX Runtime and in onnx's evaluator, its torch op, and the definition
written out in float64."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from gptoss_export.engines.ort.library import kernel_library
from gptoss_export.exporter.checkpoint.mxfp4 import decode
from gptoss_export.exporter.ops import DOMAIN, OPS, OPSET, VERSION, Op, with_calls
from gptoss_export.exporter.ops.sink_attention import MASKED

BY_NAME = {op.name: op for op in OPS}
TYPES = {
    "tensor(float)": TensorProto.FLOAT,
    "tensor(bfloat16)": TensorProto.BFLOAT16,
    "tensor(uint8)": TensorProto.UINT8,
    "tensor(int64)": TensorProto.INT64,
}


def model_of(op: Op, inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A model that is one node of `op`. bfloat16 operands are initializers: numpy feeds cannot carry them."""
    values = list(inputs.items())
    ranks = {"SinkAttention": (3, 4, 4), "SharedSinkAttention": (3, 4, 4), "PositionBias": (4,)}.get(
        op.name, (values[0][1].ndim,) * len(op.schema.outputs)
    )
    node = helper.make_node(op.name, list(inputs), [o.name for o in op.schema.outputs], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        op.name,
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in values
            if a.dtype != ml_dtypes.bfloat16
        ],
        [
            helper.make_tensor_value_info(o.name, TYPES[o.type_str], [None] * rank)
            for o, rank in zip(op.schema.outputs, ranks, strict=True)
        ],
        [numpy_helper.from_array(a, name) for name, a in values if a.dtype == ml_dtypes.bfloat16],
    )
    return helper.make_model(
        graph,
        functions=[needed.function for needed in with_calls([op.name], OPS)],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=11,
    )


def run_everywhere(name: str, inputs: dict[str, np.ndarray], attributes: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    """The outputs by who computed them."""
    op = BY_NAME[name]
    model = model_of(op, inputs, attributes)
    onnx.checker.check_model(model, full_check=True)
    feeds = {k: v for k, v in inputs.items() if v.dtype != ml_dtypes.bfloat16}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = {"onnxruntime": session.run(None, feeds), "onnx": ReferenceEvaluator(model).run(None, feeds)}
    if op.torch_op is not None:
        operands = [
            torch.from_numpy(a.astype(np.float32)).bfloat16() if a.dtype == ml_dtypes.bfloat16 else torch.from_numpy(a)
            for a in inputs.values()
        ]
        out = op.torch_op(*operands, **attributes)
        results["torch"] = [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]
    return results


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return normal(rng, *shape).astype(ml_dtypes.bfloat16)


def assert_close(results: dict[str, list[np.ndarray]], expected: list[np.ndarray], tolerance: float = 2e-6) -> None:
    assert results.keys() >= {"onnxruntime", "onnx"}
    for who, outputs in results.items():
        assert len(outputs) == len(expected)
        for actual, wanted in zip(outputs, expected, strict=True):
            assert actual.shape == wanted.shape, who
            scale = max(1.0, float(np.abs(wanted).max(initial=0)))
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * scale, err_msg=who)


@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 96)])
def test_linear(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    x, weight, bias = normal(rng, *shape), bf16(rng, 40, 96), bf16(rng, 40)
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    assert_close(run_everywhere("LinearNoBias", {"x": x, "weight": weight}, {}), [product])
    with_bias = run_everywhere("Linear", {"x": x, "weight": weight, "bias": bias}, {})
    assert_close(with_bias, [product + bias.astype(np.float64)])


def int8_operands(rng: np.random.Generator, N: int, K: int) -> dict[str, np.ndarray]:
    """Every int8, scales of seven powers of two and blocks of zeros, with the scale 0 and with another one."""
    weight = rng.integers(-128, 128, (N, K), dtype=np.int8)
    scales = (np.ldexp(normal(rng, N, K // 32), rng.integers(-10, -3, (N, K // 32)))).astype(ml_dtypes.bfloat16)
    weight[0, :32] = weight[-1, -32:] = 0
    scales[0, 0] = 0
    return {"weight": weight, "scales": scales, "bias": bf16(rng, N)}


def int8_float64(x: np.ndarray, o: dict[str, np.ndarray]) -> np.ndarray:
    return x.astype(np.float64) @ (o["weight"] * np.repeat(o["scales"].astype(np.float64), 32, axis=1)).T


@pytest.mark.parametrize(("tokens", "N", "K"), [((1,), 40, 96), ((5,), 7, 32), ((2, 3), 33, 160), ((0,), 3, 32)])
def test_linear_int8(tokens: tuple[int, ...], N: int, K: int) -> None:
    rng = np.random.default_rng(4)
    x, operands = normal(rng, *tokens, K), int8_operands(rng, N, K)
    expected = int8_float64(x, operands) + operands["bias"].astype(np.float64)
    assert_close(run_everywhere("LinearInt8", {"x": x, **operands}, {}), [expected])
    del operands["bias"]
    assert_close(run_everywhere("LinearInt8NoBias", {"x": x, **operands}, {}), [int8_float64(x, operands)])


@pytest.mark.parametrize("exponent", [-133, -126, 0, 120])
def test_linear_int8_at_extreme_scales(exponent: int) -> None:
    """One-hot inputs read the weights out of the body, subnormal ones included: they are exact."""
    weight = np.arange(-128, 128, dtype=np.int64).reshape(4, 64).astype(np.int8)
    scales = np.full((4, 2), 2.0**exponent, ml_dtypes.bfloat16)
    operands = {"x": np.eye(64, dtype=np.float32), "weight": weight, "scales": scales}
    for who, (y,) in run_everywhere("LinearInt8NoBias", operands, {}).items():
        assert np.array_equal(y, weight.T * np.float64(2.0**exponent)), who


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_onnxruntime_keeps_float32_when_it_fuses_the_body_of_linear_int8(level: str) -> None:
    """With constant weights it could take the body for its own int8 products, which round the activations."""
    rng = np.random.default_rng(6)
    x, operands = normal(rng, 3, 256), int8_operands(rng, 64, 256)
    del operands["bias"]
    model = model_of(BY_NAME["LinearInt8NoBias"], {"x": x, **operands}, {})
    del model.graph.input[1]
    model.graph.initializer.append(numpy_helper.from_array(operands["weight"], "weight"))
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = int8_float64(x, operands)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("experts", "top_k"), [(16, 4), (5, 1), (3, 3)])
def test_router(experts: int, top_k: int) -> None:
    rng = np.random.default_rng(2)
    x, weight, bias = normal(rng, 2, 7, 64), bf16(rng, experts, 64), bf16(rng, experts)
    logits = x.astype(np.float64) @ weight.astype(np.float64).T + bias.astype(np.float64)
    order = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    values = np.exp(np.take_along_axis(logits, order, -1) - logits.max(-1, keepdims=True))
    results = run_everywhere("MoERouter", {"x": x, "weight": weight, "bias": bias}, {"top_k": top_k})
    assert_close(results, [values / values.sum(-1, keepdims=True), order])


def test_router_gives_ties_to_the_lower_expert() -> None:
    x, weight, bias = np.ones((1, 32), np.float32), np.zeros((8, 32), ml_dtypes.bfloat16), np.zeros(8)
    results = run_everywhere(
        "MoERouter", {"x": x, "weight": weight, "bias": bias.astype(ml_dtypes.bfloat16)}, {"top_k": 3}
    )
    del results["torch"]  # torch.topk promises no order
    for weights, experts in results.values():
        assert experts.tolist() == [[0, 1, 2]]
        np.testing.assert_allclose(weights, 1 / 3, rtol=1e-6)


ALPHA, LIMIT = 1.702, 7.0


def experts_float64(
    x: np.ndarray,
    weights: np.ndarray,
    experts: np.ndarray,
    w1: np.ndarray,
    b1: np.ndarray,
    w2: np.ndarray,
    b2: np.ndarray,
) -> np.ndarray:
    """The definition, token by token. w1 [E, 2I, H], w2 [E, H, I]."""
    y = np.zeros(x.shape)
    for token in np.ndindex(*x.shape[:-1]):
        for weight, e in zip(weights[token], experts[token], strict=True):
            h = w1[e].astype(np.float64) @ x[token].astype(np.float64) + b1[e].astype(np.float64)
            gate, up = np.minimum(h[0::2], LIMIT), np.clip(h[1::2], -LIMIT, LIMIT)
            a = gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)
            y[token] += weight * (w2[e].astype(np.float64) @ a + b2[e].astype(np.float64))
    return y


def expert_operands(E: int, H: int, I: int, tokens: tuple[int, ...], K: int) -> dict[str, np.ndarray]:  # noqa: E741
    rng = np.random.default_rng(3)
    weights = rng.random((*tokens, K), dtype=np.float32)
    # Experts 0 and E-1 among the chosen, most others not: an expert without tokens must cost and change nothing.
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(int(np.prod(tokens)))]).reshape(*tokens, K)
    chosen.reshape(-1, K)[0, :2] = (E - 1, 0)
    return {
        # Wide enough that both clamps are met.
        "x": 3 * normal(rng, *tokens, H),
        "weights": weights / weights.sum(-1, keepdims=True),
        "experts": chosen.astype(np.int64),
        "gate_up_blocks": rng.integers(0, 256, (E, 2 * I, H // 32, 16), dtype=np.uint8),
        "gate_up_scales": rng.integers(119, 124, (E, 2 * I, H // 32), dtype=np.uint8),
        "gate_up_bias": bf16(rng, E, 2 * I),
        "down_blocks": rng.integers(0, 256, (E, H, I // 32, 16), dtype=np.uint8),
        "down_scales": rng.integers(117, 122, (E, H, I // 32), dtype=np.uint8),
        "down_bias": bf16(rng, E, H),
    }


ATTRIBUTES = {"swiglu_alpha": ALPHA, "swiglu_limit": LIMIT}
SHAPES = [(16, 64, 96, (1,), 4), (16, 64, 96, (2, 5), 4), (4, 32, 32, (9,), 2), (9, 96, 32, (3,), 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts(shape: tuple[int, int, int, tuple[int, ...], int]) -> None:
    operands = expert_operands(*shape)
    o = operands
    expected = experts_float64(
        o["x"],
        o["weights"],
        o["experts"],
        decode(o["gate_up_blocks"], o["gate_up_scales"]),
        o["gate_up_bias"],
        decode(o["down_blocks"], o["down_scales"]),
        o["down_bias"],
    )
    assert_close(run_everywhere("MoEExperts", operands, ATTRIBUTES), [expected])


def test_experts_reach_both_clamps() -> None:
    """Otherwise the test above would not see them."""
    o = expert_operands(*SHAPES[1])
    h = o["x"].reshape(-1, 64) @ decode(o["gate_up_blocks"], o["gate_up_scales"])[0].T
    assert (h[:, 0::2] > LIMIT).any() and (np.abs(h[:, 1::2]) > LIMIT).any() and (h[:, 0::2] < -LIMIT).any()


@pytest.mark.parametrize("scale", [0, 1, 27, 127, 200])
def test_experts_decode_every_byte_at_extreme_scales(scale: int) -> None:
    """One-hot inputs read the decoded weights out of the body; 2^-127 is a subnormal that must survive."""
    E, H = 1, 512
    blocks = np.zeros((E, 64, H // 32, 16), np.uint8)
    blocks[0, 1] = np.arange(256, dtype=np.uint8).reshape(H // 32, 16)  # an `up` row holds all bytes
    scales = np.full((E, 64, H // 32), scale, np.uint8)
    identity = np.zeros((E, H, 1, 16), np.uint8)
    identity[0, 0, 0, 0] = 2  # y[0] = a[0] = gate * sigmoid(alpha * gate) * (up + 1)
    operands = {
        "x": np.eye(H, dtype=np.float32),
        "weights": np.ones((H, 1), np.float32),
        "experts": np.zeros((H, 1), np.int64),
        "gate_up_blocks": blocks,
        "gate_up_scales": scales,
        "gate_up_bias": np.tile(np.array([5, -1], ml_dtypes.bfloat16), 32)[None],  # gate 5, up + 1 = weight
        "down_blocks": identity,
        "down_scales": np.full((E, H, 1), 127, np.uint8),
        "down_bias": np.zeros((E, H), ml_dtypes.bfloat16),
    }
    weights = decode(blocks, scales)[0, 1].astype(np.float64)
    expected = 5 / (1 + np.exp(-ALPHA * 5)) * (np.clip(weights - 1, -LIMIT, LIMIT) + 1)
    for who, (y,) in run_everywhere("MoEExperts", operands, ATTRIBUTES).items():
        np.testing.assert_allclose(y[:, 0], expected, rtol=1e-5, atol=2e-6, err_msg=who)


def test_dense_experts_are_the_same_network() -> None:
    operands = expert_operands(*SHAPES[1])
    o = operands
    w1, w2 = decode(o["gate_up_blocks"], o["gate_up_scales"]), decode(o["down_blocks"], o["down_scales"])
    dense = {
        **{name: o[name] for name in ("x", "weights", "experts")},
        "gate_up": np.ascontiguousarray(w1.transpose(0, 2, 1)).astype(ml_dtypes.bfloat16),
        "gate_up_bias": o["gate_up_bias"],
        "down": np.ascontiguousarray(w2.transpose(0, 2, 1)).astype(ml_dtypes.bfloat16),
        "down_bias": o["down_bias"],
    }
    expected = experts_float64(o["x"], o["weights"], o["experts"], w1, o["gate_up_bias"], w2, o["down_bias"])
    assert_close(run_everywhere("MoEExpertsDense", dense, ATTRIBUTES), [expected])


def attention_float64(o: dict[str, np.ndarray], heads: int, kv: int, scale: float, window: int) -> list[np.ndarray]:
    """The definition, query by query and head by head."""
    B, S = o["q"].shape[:2]
    D = o["past_key"].shape[-1]
    q = o["q"].reshape(B, S, heads, D).astype(np.float64)
    new = [o[n].reshape(B, S, kv, D).transpose(0, 2, 1, 3) for n in ("k", "v")]
    K, V = (np.concatenate([o[p], n], axis=2) for p, n in zip(("past_key", "past_value"), new, strict=True))
    out = np.zeros((B, S, heads, D))
    for b, s, h in np.ndindex(B, S, heads):
        here, keys = o["query_positions"][b, s], o["key_positions"][b]
        seen = [j for j, p in enumerate(keys) if 0 <= p <= here and (window == 0 or here - p < window)]
        scores = [scale * (q[b, s, h] @ K[b, h // (heads // kv), j]) for j in seen]
        total = np.exp(float(o["sinks"][h])) + sum(np.exp(x) for x in scores)
        for x, j in zip(scores, seen, strict=True):
            out[b, s, h] += np.exp(x) / total * V[b, h // (heads // kv), j]
    return [out.reshape(B, S, -1), K, V]


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("padding", ["none", "left", "right", "between"])
@pytest.mark.parametrize(("new", "past"), [(1, 0), (9, 0), (1, 8), (3, 6)])
def test_attention(window: int, padding: str, new: int, past: int) -> None:
    rng = np.random.default_rng(5)
    B, heads, kv, D = 2, 6, 2, 16
    mask = np.ones((B, past + new), np.int64)
    if padding != "none" and past + new > 4:
        mask[0, {"left": slice(0, 3), "right": slice(-2, None), "between": slice(2, 4)}[padding]] = 0
    positions = np.where(mask == 1, mask.cumsum(-1) - 1, -1)
    operands = {
        "q": normal(rng, B, new, heads * D),
        "k": normal(rng, B, new, kv * D),
        "v": normal(rng, B, new, kv * D),
        "past_key": normal(rng, B, kv, past, D),
        "past_value": normal(rng, B, kv, past, D),
        "sinks": bf16(rng, heads),
        "query_positions": positions[:, past:],
        "key_positions": positions,
    }
    attributes = {"num_heads": heads, "kv_heads": kv, "scale": 0.25, "window": window}
    expected = attention_float64(operands, heads, kv, 0.25, window)
    assert_close(run_everywhere("SinkAttention", operands, attributes), expected)


@pytest.mark.parametrize(
    ("window", "padding", "new", "past", "slots"),
    [
        (0, "none", 1, 0, 1),
        (0, "none", 5, 7, 12),
        (0, "between", 3, 9, 40),
        (4, "none", 1, 11, 4),
        (4, "none", 3, 20, 6),
        (4, "left", 3, 20, 9),
        (4, "between", 2, 9, 16),
        (1, "none", 1, 5, 1),
    ],
)
@pytest.mark.parametrize("runtime", ["onnxruntime", "onnx", "kernel"])
def test_attention_on_a_ring(runtime: str, window: int, padding: str, new: int, past: int, slots: int) -> None:
    """Text index j lies in slot j mod slots; what was overwritten nobody sees any more."""
    rng = np.random.default_rng(8)
    B, heads, kv, D = 2, 6, 2, 16
    mask = np.ones((B, past + new), np.int64)
    if padding != "none":
        mask[0, {"left": slice(0, 3), "between": slice(2, 4)}[padding]] = 0
    positions = np.where(mask == 1, mask.cumsum(-1) - 1, -1)
    whole = {
        "q": normal(rng, B, new, heads * D),
        "k": normal(rng, B, new, kv * D),
        "v": normal(rng, B, new, kv * D),
        "past_key": normal(rng, B, kv, past, D),
        "past_value": normal(rng, B, kv, past, D),
        "sinks": bf16(rng, heads),
        "query_positions": positions[:, past:],
        "key_positions": positions,
    }
    attention, keys, values = attention_float64(whole, heads, kv, 0.25, window)

    def ring(text: np.ndarray, length: int) -> np.ndarray:
        cache = np.zeros((B, kv, slots, D), np.float32)
        for j in range(length):
            cache[:, :, j % slots] = text[:, :, j]
        return cache

    operands = {
        **{name: whole[name] for name in ("q", "k", "v")},
        "cache_key": ring(keys, past),
        "cache_value": ring(values, past),
        **{name: whole[name] for name in ("sinks", "query_positions", "key_positions")},
    }
    attributes = {"num_heads": heads, "kv_heads": kv, "scale": 0.25, "window": window}
    expected = [attention, ring(keys, past + new), ring(values, past + new)]
    model = model_of(BY_NAME["SharedSinkAttention"], operands, attributes)
    feeds = {k: v for k, v in operands.items() if v.dtype != ml_dtypes.bfloat16}
    if runtime == "onnx":
        outputs = ReferenceEvaluator(model).run(None, feeds)
    else:
        options = ort.SessionOptions()
        if runtime == "kernel":
            options.register_custom_ops_library(str(kernel_library()))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        outputs = session.run(None, feeds)
    real = positions[:, past:] >= 0
    np.testing.assert_allclose(outputs[0][real], expected[0][real], rtol=0, atol=2e-6)
    for actual, wanted in zip(outputs[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(actual, wanted.astype(np.float32))


def test_position_bias() -> None:
    operands = {"query_positions": np.array([[2, 3]]), "key_positions": np.array([[-1, 0, 1, 2, 3]])}
    for bias in (out[0] for out in run_everywhere("PositionBias", operands, {"window": 2}).values()):
        seen = [[False, False, True, True, False], [False, False, False, True, True]]
        np.testing.assert_array_equal(bias[0, 0], np.where(seen, np.float32(0), np.float32(MASKED)))


@pytest.mark.parametrize("op", [op for op in OPS if op.torch_op is not None], ids=lambda op: op.name)
def test_torch_op_and_schema_agree(op: Op) -> None:
    """The trace maps arguments by position: operands first, then attributes of the same names."""
    assert op.torch_op is not None
    names = [argument.name for argument in op.torch_op._schema.arguments]
    assert names[: len(op.schema.inputs)] == [i.name for i in op.schema.inputs]
    assert set(names[len(op.schema.inputs) :]) == set(op.schema.attributes)
    assert list(op.function.input) == [i.name for i in op.schema.inputs]
    assert list(op.function.output) == [o.name for o in op.schema.outputs]
    assert set(op.function.attribute) == set(op.schema.attributes)


def test_torch_ops_pass_opcheck() -> None:
    """Fakes agree with the mathematics on shapes, strides and types."""
    rng = np.random.default_rng(6)
    o = expert_operands(4, 32, 32, (3,), 2)

    def tensor(a: np.ndarray) -> torch.Tensor:
        return (
            torch.from_numpy(a.astype(np.float32)).bfloat16() if a.dtype == ml_dtypes.bfloat16 else torch.from_numpy(a)
        )

    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(BY_NAME["MoEExperts"].torch_op, [*map(tensor, o.values()), ALPHA, LIMIT], test_utils=checks)
    x, weight, bias = (tensor(a) for a in (normal(rng, 2, 3, 32), bf16(rng, 8, 32), bf16(rng, 8)))
    torch.library.opcheck(BY_NAME["MoERouter"].torch_op, [x, weight, bias, 2], test_utils=checks)
    torch.library.opcheck(BY_NAME["Linear"].torch_op, [x, weight, bias], test_utils=checks)
    q, kv = tensor(normal(rng, 2, 3, 64)), tensor(normal(rng, 2, 3, 32))
    past, positions = tensor(normal(rng, 2, 2, 5, 16)), torch.arange(8).expand(2, 8)
    torch.library.opcheck(
        BY_NAME["SinkAttention"].torch_op,
        [q, kv, kv, past, past, tensor(bf16(rng, 4)), positions[:, 5:], positions, 4, 2, 0.25, 0],
        test_utils=checks,
    )

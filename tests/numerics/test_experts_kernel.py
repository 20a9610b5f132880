"""The kernel of MoEExperts against the definition in float64, for every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gptoss_export.engines.ort.library import kernel_library
from gptoss_export.exporter.checkpoint.mxfp4 import decode
from gptoss_export.exporter.ops import DOMAIN, OPSET, VERSION

LEVELS = ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon"]
ALPHA, LIMIT = 1.702, 7.0
BATCH, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2, 96, 160, 5, 3

# A process chooses its instruction set once.
RUN = """
import sys
import numpy as np
import onnxruntime as ort

model, library, feeds, out = sys.argv[1:]
options = ort.SessionOptions()
options.register_custom_ops_library(library)
session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
with np.load(feeds) as arrays:
    cases = sorted({name.split(".")[0] for name in arrays})
    inputs = ("x", "weights", "experts")
    results = {case: session.run(None, {i: arrays[f"{case}.{i}"] for i in inputs})[0] for case in cases}
np.savez(out, **results)
"""


def bf16(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)


def operands(rng: np.random.Generator) -> dict[str, np.ndarray]:
    E, H, I = EXPERTS, HIDDEN, INTERMEDIATE  # noqa: E741
    return {
        "gate_up_blocks": rng.integers(0, 256, (E, 2 * I, H // 32, 16), dtype=np.uint8),
        "gate_up_scales": rng.integers(121, 124, (E, 2 * I, H // 32), dtype=np.uint8),
        "gate_up_bias": bf16(rng, E, 2 * I),
        "down_blocks": rng.integers(0, 256, (E, H, I // 32, 16), dtype=np.uint8),
        "down_scales": rng.integers(121, 124, (E, H, I // 32), dtype=np.uint8),
        "down_bias": bf16(rng, E, H),
    }


def case(rng: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    """BATCH rows of `length` tokens that all go to different experts."""
    tokens = (BATCH, length)
    weights = rng.random((*tokens, TOP_K), dtype=np.float32)
    experts = np.argsort(rng.random((*tokens, EXPERTS)), axis=-1)[..., :TOP_K]
    x = rng.standard_normal((*tokens, HIDDEN), dtype=np.float32)
    return {"x": x, "weights": weights / weights.sum(-1, keepdims=True), "experts": experts}


def float64(o: dict[str, np.ndarray], x: np.ndarray, weights: np.ndarray, experts: np.ndarray) -> np.ndarray:
    up, down = (decode(o[f"{m}_blocks"], o[f"{m}_scales"]).astype(np.float64) for m in ("gate_up", "down"))
    y = np.zeros(x.shape)
    for token in np.ndindex(*x.shape[:-1]):
        for weight, e in zip(weights[token], experts[token], strict=True):
            h = up[e] @ x[token].astype(np.float64) + o["gate_up_bias"][e].astype(np.float64)
            gate, linear = np.minimum(h[0::2], LIMIT), np.clip(h[1::2], -LIMIT, LIMIT)
            a = gate / (1 + np.exp(-ALPHA * gate)) * (linear + 1)
            y[token] += weight * (down[e] @ a + o["down_bias"][e].astype(np.float64))
    return y


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A folder with model.onnx and feeds.npz, and what float64 makes of each case."""
    rng = np.random.default_rng(4)
    o = operands(rng)
    # Decoding, and prompts long enough that an expert gets many tokens.
    cases = {f"length_{length}": case(rng, length) for length in (1, 3, 40)}
    info = helper.make_tensor_value_info
    node = helper.make_node(
        "MoEExperts",
        ["x", "weights", "experts", *o],
        ["y"],
        domain=DOMAIN,
        swiglu_alpha=ALPHA,
        swiglu_limit=LIMIT,
    )
    graph = helper.make_graph(
        [node],
        "experts",
        [
            info("x", TensorProto.FLOAT, [BATCH, None, HIDDEN]),
            info("weights", TensorProto.FLOAT, [BATCH, None, TOP_K]),
            info("experts", TensorProto.INT64, [BATCH, None, TOP_K]),
        ],
        [info("y", TensorProto.FLOAT, [BATCH, None, HIDDEN])],
        [numpy_helper.from_array(a, name) for name, a in o.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    folder = tmp_path_factory.mktemp("experts")
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=11), folder / "model.onnx")
    feeds = {f"{name}.{i}": a for name, inputs in cases.items() for i, a in inputs.items()}
    np.savez(folder / "feeds.npz", **feeds)
    return folder, {name: float64(o, **inputs) for name, inputs in cases.items()}


@pytest.mark.parametrize("level", LEVELS)
def test_experts_are_exact_enough(level: str, problem: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    """Relative RMS within 5e-5: 16 bits of activations, twice."""
    folder, expected = problem
    out = tmp_path / "y.npz"
    command = [sys.executable, "-c", RUN, folder / "model.onnx", str(kernel_library()), folder / "feeds.npz", out]
    environment = os.environ | {"GPTOSS_EXPORT_ISA": level}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    if "ignored" in done.stderr:
        pytest.skip(done.stderr.strip())
    with np.load(out) as results:
        assert set(results) == set(expected)
        for name, y in expected.items():
            error = np.sqrt(((results[name] - y) ** 2).sum() / (y**2).sum())
            assert 0 < error <= 5e-5, f"{name}: {error:.2e}"

"""The kernel library: it is built where a compiler is, ONNX Runtime takes it, and each kernel is what its body says."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from gptoss_export.engines.ort.library import kernel_library, kernels_work
from gptoss_export.exporter.ops import DOMAIN, OPS

INT8_KERNELS = {"LinearInt8", "LinearInt8NoBias"}
STORED_KERNELS = {"Linear", "LinearQKV", "LinearNoBias", "MoERouter", "MoEExperts", "SharedSinkAttention"}
LEVELS = ["scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon"]


def test_the_library_was_built_and_is_taken() -> None:
    """An installation may be without it; this one, on a machine with a compiler, must not be."""
    assert platform.system() == "Linux"
    assert kernel_library() is not None
    assert kernels_work() is None


def test_a_kernel_wins_over_its_function_body(tiny_builds: dict[str, Path]) -> None:
    """ONNX Runtime inlines a function unless a kernel of the name is registered: no body's node may be left."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernel_library()))
    target = tiny_builds["ort-cpu"] / "optimized.onnx"
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
    ort.InferenceSession(tiny_builds["ort-cpu"] / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = [(n.domain, n.op_type) for n in onnx.load(target, load_external_data=False).graph.node]
    assert {op for domain, op in nodes if domain == DOMAIN} == STORED_KERNELS
    assert nodes.count((DOMAIN, "MoEExperts")) == 4
    assert ("", "Loop") not in nodes and ("", "NonZero") not in nodes


def test_every_kernel_has_a_body() -> None:
    assert {op.name for op in OPS} >= STORED_KERNELS | INT8_KERNELS


RUN = """
import sys
import numpy as np
from pathlib import Path
from gptoss_export.engines.targets import TARGETS

runner = TARGETS["ort-cpu"].open_runner(Path(sys.argv[1]), int(sys.argv[2]))
ids = np.random.default_rng(0).integers(0, 2030, (1, 100))
step = runner.forward(ids[:, :90], keep=0)
out = [step.logits]
for i in range(90, 100):
    step = runner.forward(ids[:, i : i + 1], cache=step.cache)
    out.append(step.logits)
np.save(sys.argv[3], np.concatenate(out, axis=1))
"""


def logits(folder: Path, out: Path, *, threads: int, level: str | None = None) -> tuple[Any, str]:
    environment = {k: v for k, v in os.environ.items() if k != "GPTOSS_EXPORT_ISA"}
    if level is not None:
        environment["GPTOSS_EXPORT_ISA"] = level
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder, str(threads), out],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return np.load(out), done.stderr


@pytest.fixture(scope="module")
def scalar(tiny_builds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("scalar") / "logits.npy"
    return logits(tiny_builds["ort-cpu"], out, threads=1, level="scalar")[0]


@pytest.mark.parametrize("level", LEVELS)
def test_every_instruction_set_is_the_scalar_one(
    level: str,
    scalar: Any,
    tiny_builds: dict[str, Path],
    tiny_reference: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    """Forced by the environment; one that this processor has not is ignored, and says so."""
    result, stderr = logits(tiny_builds["ort-cpu"], tmp_path / "logits.npy", threads=2, level=level)
    np.testing.assert_allclose(result, scalar, rtol=0, atol=2e-5)
    np.testing.assert_allclose(result, tiny_reference[1], rtol=0, atol=2e-3)
    if level == "neon" and platform.machine() == "x86_64":
        assert "neon" in stderr and "ignored" in stderr


def test_threads_change_no_bit(tiny_builds: dict[str, Path], tmp_path: Path) -> None:
    results = [logits(tiny_builds["ort-cpu"], tmp_path / f"{n}.npy", threads=n)[0] for n in (1, 2, 4)]
    assert np.array_equal(results[0], results[1]) and np.array_equal(results[0], results[2])


def test_an_expert_out_of_range_is_an_error_not_a_crash(tiny_builds: dict[str, Path]) -> None:
    session_options = ort.SessionOptions()
    session_options.register_custom_ops_library(str(kernel_library()))
    E, H = 2, 32
    values = {
        "x": np.zeros((1, H), np.float32),
        "weights": np.ones((1, 1), np.float32),
        "experts": np.array([[7]]),
        "gb": np.zeros((E, 64, 1, 16), np.uint8),
        "gs": np.zeros((E, 64, 1), np.uint8),
        "db": np.zeros((E, H, 1, 16), np.uint8),
        "ds": np.zeros((E, H, 1), np.uint8),
    }
    node = onnx.helper.make_node(
        "MoEExperts",
        ["x", "weights", "experts", "gb", "gs", "g", "db", "ds", "d"],
        ["y"],
        domain=DOMAIN,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
    )
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [info(k, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in values.items()],
        [info("y", onnx.TensorProto.FLOAT, [1, H])],
        [
            onnx.helper.make_tensor("g", onnx.TensorProto.BFLOAT16, [E, 64], [0.0] * E * 64),
            onnx.helper.make_tensor("d", onnx.TensorProto.BFLOAT16, [E, H], [0.0] * E * H),
        ],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 23), onnx.helper.make_opsetid(DOMAIN, 1)], ir_version=11
    )
    session = ort.InferenceSession(model.SerializeToString(), session_options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="experts must be below their number"):
        session.run(None, values)

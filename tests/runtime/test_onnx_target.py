"""The portable file: every tool of the ONNX world reads it, and two runtimes run it without a library of ours."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator

from gptoss_export.exporter.ops import DOMAIN


@pytest.fixture(scope="module")
def model_file(tiny_builds: dict[str, Path]) -> Path:
    return tiny_builds["onnx"] / "model.onnx"


def feeds(ids: np.ndarray) -> dict[str, np.ndarray]:
    empty = np.zeros((1, 2, 0, 32), np.float32)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "num_logits_to_keep": np.array(0),
        **{f"past_key_values.{n}.{part}": empty for n in range(4) for part in ("key", "value")},
    }


def test_checker_and_shape_inference(model_file: Path) -> None:
    onnx.checker.check_model(model_file, full_check=True)
    model = onnx.load(model_file)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    assert {o.domain for o in model.opset_import} == {"", DOMAIN}


def test_onnxruntime_without_a_library_of_ours(model_file: Path, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    session = ort.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], feeds(ids))[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    without_keep = {k: v for k, v in feeds(ids).items() if k != "num_logits_to_keep"}
    np.testing.assert_array_equal(session.run(["logits"], without_keep)[0], logits)
    last = session.run(["logits"], {**feeds(ids), "num_logits_to_keep": np.array(1)})[0]
    assert last.shape == (1, 1, 2048)
    np.testing.assert_allclose(last, expected[:, -1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_optimisation_level_changes_nothing(
    model_file: Path, tiny_reference: tuple[np.ndarray, np.ndarray], level: str
) -> None:
    ids, expected = tiny_reference
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(model_file, options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["logits"], feeds(ids))[0], expected, rtol=0, atol=1e-4)


def test_reference_evaluator(model_file: Path, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    logits = ReferenceEvaluator(onnx.load(model_file)).run(["logits"], feeds(ids[:, :24]))[0]
    np.testing.assert_allclose(logits, expected[:, :24], rtol=0, atol=1e-4)


def test_polygraphy_inspects_it(model_file: Path) -> None:
    polygraphy = Path(sys.executable).parent / "polygraphy"
    shown = subprocess.run(
        [polygraphy, "inspect", "model", model_file, "--show", "layers"], capture_output=True, text=True, check=True
    ).stdout
    assert "Op: MoEExperts" in shown and "Op: SinkAttention" in shown

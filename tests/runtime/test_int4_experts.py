"""Experts requantised to int4, which is how others put gpt-oss on a CPU, do not pass for the model under any gate."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnxruntime.capi._pybind_state import quantize_matmul_4bits

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.graph.build import build_graph
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.validators.floor import FloorDtype, FloorRecord
from gptoss_export.validators.gates import GATES, GatePolicy
from gptoss_export.validators.parity import Subject, Yardstick, validate
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.report.schema import Binding, Engine, ParityReport

BLOCK = 32
ZERO = 8


def int4(weights: np.ndarray) -> np.ndarray:
    """[K, N] float32 there and back by onnxruntime's own quantiser: symmetric, a scale for every 32 of K."""
    k, n = weights.shape
    packed, scales = np.zeros((n, k // BLOCK, BLOCK // 2), np.uint8), np.zeros(n * k // BLOCK, np.float32)
    zeros = np.zeros((n, (k // BLOCK + 1) // 2), np.uint8)
    quantize_matmul_4bits(packed, np.ascontiguousarray(weights), scales, zeros, BLOCK, n, k, True)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(n, k // BLOCK, BLOCK).astype(np.float32)
    return ((codes - ZERO) * scales.reshape(n, k // BLOCK, 1)).reshape(n, k).T


@pytest.fixture(scope="module")
def requantised(tiny_layouts: Mapping[Layout, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An ort-cpu artifact whose experts went through int4, and the relative error of its worst experts' tensor."""
    folder = tmp_path_factory.mktemp("int4")
    shutil.copytree(tiny_layouts[Layout.HF_BF16], folder / "weights")
    checkpoint, worst = open_checkpoint(folder / "weights"), 0.0
    for name, ref in checkpoint.tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored = np.memmap(ref.file, ml_dtypes.bfloat16, "r+", offset=ref.offset, shape=ref.shape)
            exact = stored.astype(np.float32)
            lossy = np.stack([int4(expert) for expert in exact])
            worst = max(worst, float(np.linalg.norm(lossy - exact) / np.linalg.norm(exact)))
            stored[:] = lossy.astype(ml_dtypes.bfloat16)
            stored.flush()
    graph = build_graph(checkpoint.config, checkpoint.layout)
    TARGETS["ort-cpu"].build(graph, checkpoint, folder, "weights", BuildSettings())
    return folder, worst


@pytest.fixture(scope="module")
def yardstick(run_of: Callable[[Effort], Reference], floor_of: Callable[[FloorDtype], FloorRecord]) -> Yardstick:
    return Yardstick(run_of("quick"), "quick", {"bfloat16": floor_of("bfloat16")})


# The gates of a target that reads the experts as they are, of the loosest target on a CPU, and of rounding to bfloat16.
@pytest.mark.parametrize("gates", ["ort-cpu", "ort-cpu-int8", "trt-bf16"])
def test_int4_experts_fail(
    gates: str, requantised: tuple[Path, float], yardstick: Yardstick, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, error = requantised
    report = judged(folder, yardstick, GATES[gates])
    assert not report.verdict.passed
    failing = {failure.gate for failure in report.verdict.failures}
    assert {"max_kl_mean", "max_layer_error"} <= failing
    prefill = next(s.metrics for s in report.evidence.scenarios if s.name == "prefill")
    layers = [record.experts for record in report.evidence.layers]
    assert error > 0.05 and all(e is not None and e > 0.04 for e in layers)
    assert report.bisection is not None
    assert report.bisection.sentence.startswith("Layer 0, experts (all experts")
    with capsys.disabled():
        print(
            f"\nint4 experts under the gates of {gates}: weights off by {error:.3f}, layers by "
            f"{', '.join(f'{e:.3f}' for e in layers if e is not None)}, mean KL {prefill.kl_mean:.2e}, top-1 "
            f"{prefill.top1_agreement:.3f}; {len(report.verdict.failures)} gates not kept"
        )


def judged(folder: Path, yardstick: Yardstick, policy: GatePolicy) -> ParityReport:
    subject = Subject(
        target="ort-cpu",
        runner=TARGETS["ort-cpu"].open_runner(folder, 1),
        inspector=TARGETS["ort-cpu"].inspect(folder, 1),
        checkpoint=open_checkpoint(folder / "weights"),
        engine=Engine("onnxruntime", "", "CPUExecutionProvider"),
        binding=Binding({}, {}),
    )
    floors = yardstick.floors if policy.floor_dtype else {}
    used = Yardstick(yardstick.reference, yardstick.effort, floors)
    return validate(subject, used, policy=policy, with_bisection=True)

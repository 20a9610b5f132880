"""The MoE kernels on a GPU against float64: compiled cubins, launched through the driver as the plugin does."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gptoss_export.engines.tensorrt.kernels.aot import compile_bundle
from gptoss_export.engines.tensorrt.kernels.bundle import KernelBundle
from gptoss_export.engines.tensorrt.kernels.driver import MoELauncher
from gptoss_export.engines.tensorrt.kernels.launch import MoEShape, workspace_bytes
from gptoss_export.exporter.errors import EngineMismatchError

CANARY = 4096
TENSOR_CORES = 1e-5
"""Relative error allowed for sums on tensor cores, which cut bits off where float32 rounds."""


def _cases() -> ModuleType:
    path = Path(__file__).parents[1] / "numerics" / "test_moe_triton.py"
    spec = importlib.util.spec_from_file_location("moe_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["moe_cases"] = module
    spec.loader.exec_module(module)
    return module


moe = _cases()
REAL = {f"real_{tokens}": moe.Case(3, 2880, 2880, 2, tokens) for tokens in (1, 8, 9, 200)}
CASES = moe.CASES | REAL
BUNDLES: dict[MoEShape, bytes] = {}


def launcher_for(shape: MoEShape, arch: int) -> MoELauncher:
    """Compiles a shape once in a session; what is loaded went through the bytes that an engine carries."""
    if shape not in BUNDLES:
        BUNDLES[shape] = compile_bundle(shape, (arch,)).to_bytes()
    return MoELauncher(KernelBundle.from_bytes(BUNDLES[shape]))


class Run:
    """One problem on the device; y and the workspace begin as NaN and have a canary behind them."""

    def __init__(self, gpu: Any, name: str, dtype: str, tokens: int | None = None) -> None:
        case = CASES[name]
        self.gpu, self.shape, self.dtype = gpu, case.shape(dtype), dtype
        self.operands = moe.operands(np.random.default_rng(list(CASES).index(name)), case, dtype)
        self.tokens = tokens or case.T
        for operand in ("x", "weights", "experts"):
            self.operands[operand] = self.operands[operand][: self.tokens]
        self.launcher = launcher_for(self.shape, gpu.arch)
        self.pointers = {operand: gpu.upload(array) for operand, array in self.operands.items()}
        self.y_bytes = self.tokens * case.H * 4
        self.scratch_bytes = workspace_bytes(self.shape, self.tokens)
        self.y, self.workspace = gpu.filled(self.y_bytes + CANARY), gpu.filled(self.scratch_bytes + CANARY)

    def launch(self) -> None:
        self.launcher.launch(
            self.tokens, **self.pointers, y=self.y, workspace=self.workspace, stream=int(self.gpu.stream)
        )

    def result(self) -> np.ndarray:
        y = self.gpu.download(self.y, (self.tokens, self.shape.hidden), np.float32)
        for pointer, size in ((self.y, self.y_bytes), (self.workspace, self.scratch_bytes)):
            assert (self.gpu.download(pointer + size, (CANARY,), np.uint8) == 255).all(), "wrote behind its memory"
        return y


@pytest.mark.parametrize("dtype", moe.NUMPY)
@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_definition(name: str, dtype: str, gpu: Any) -> None:
    """The bounds of the interpreter's test, and tensor cores' own."""
    run = Run(gpu, name, dtype)
    run.launch()
    y = run.result()
    unit = moe.UNIT[dtype]
    alike = moe.relative_rms(y, moe.float64(run.operands, moe.NUMPY[dtype]))
    exact = moe.relative_rms(y, moe.float64(run.operands, np.float64))
    print(f"{name} {dtype}: {alike:.1e}, {exact:.1e}")
    assert 0 < alike <= 1e-6 + (2 * unit * np.sqrt(2.0**-22 / unit) + TENSOR_CORES if unit else 0)
    assert 0 < exact <= 1e-6 + unit / 2 + (TENSOR_CORES if unit else 0)


@pytest.mark.parametrize("dtype", moe.NUMPY)
@pytest.mark.parametrize("name", ["real_8", "real_200"])
def test_the_same_inputs_give_the_same_bits(name: str, dtype: str, gpu: Any) -> None:
    """The second run finds the first one's scratch memory instead of NaN."""
    run = Run(gpu, name, dtype)
    run.launch()
    first = run.result()
    run.launch()
    assert first.tobytes() == run.result().tobytes()


@pytest.mark.parametrize("dtype", moe.NUMPY)
def test_decode_and_prefill_agree(dtype: str, gpu: Any) -> None:
    prompt, decoded = Run(gpu, "real_9", dtype), Run(gpu, "real_9", dtype, tokens=8)
    prompt.launch()
    decoded.launch()
    unit = moe.UNIT[dtype]
    limit = 1e-6 + (2 * unit * np.sqrt(2.0**-22 / unit) + TENSOR_CORES if unit else 0)
    assert moe.relative_rms(decoded.result(), prompt.result()[:8].astype(np.float64)) <= limit


@pytest.mark.parametrize("name", ["real_1", "real_200"])
def test_a_cuda_graph_replays_it(name: str, gpu: Any) -> None:
    """The graph is recorded without a launch before it: nothing is loaded lazily."""
    run = Run(gpu, name, "fp16")
    gpu.call("cuStreamBeginCapture", gpu.stream, gpu.cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
    run.launch()
    graph = gpu.call("cuGraphInstantiate", gpu.call("cuStreamEndCapture", gpu.stream), 0)
    assert np.isnan(run.result()).all()
    gpu.call("cuGraphLaunch", graph, gpu.stream)
    replayed = run.result()
    run.launch()
    assert replayed.tobytes() == run.result().tobytes()


def test_another_gpus_kernels_are_refused(gpu: Any) -> None:
    shape = CASES["one_token"].shape("fp16")
    other = 90 if gpu.arch != 90 else 100
    with pytest.raises(EngineMismatchError, match="this GPU has compute capability"):
        MoELauncher(compile_bundle(shape, (other,)))

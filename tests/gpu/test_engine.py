"""Engines of the small checkpoint, executed: parity through the pipeline, CUDA graphs, memory.

    python -m pytest tests/gpu

Skipped, with the reason, where this host cannot execute an engine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptoss_export.engines.tensorrt.cuda import Device, device_missing
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.run import TensorRTRunner, open_trt_runner
from gptoss_export.exporter.errors import IntegrityError, PromptError
from gptoss_export.exporter.pipeline import ExportRequest, export

pytestmark = pytest.mark.skipif(device_missing() is not None, reason=f"not executed: {device_missing()}")

OPTIONS = EngineOptions(max_batch=3, max_prompt=64, max_context=300, max_logits=192)
TARGETS = ("trt-fp32", "trt-fp16", "trt-bf16")

Build = Callable[..., Path]


@pytest.fixture(scope="module")
def build(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Exports the small checkpoint, each combination once; the folder of the artifact."""
    made: dict[tuple[str, EngineOptions], Path] = {}

    def make(target: str, options: EngineOptions = OPTIONS) -> Path:
        if (target, options) not in made:
            folder = tmp_path_factory.mktemp("engine") / target
            export(ExportRequest(str(tiny_dir), folder, (target,), parity="off", engine=options))
            made[target, options] = folder
        return made[target, options]

    return make


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Three texts of 290 tokens."""
    return np.random.default_rng(0).integers(0, 2030, (3, 290))


def decode(runner: TensorRTRunner, ids: np.ndarray, prompt: int) -> np.ndarray:
    """Logits [n, V] of the last column of a prompt of one row and of every token after it, one by one."""
    step = runner.forward(ids[None, :prompt], keep=1)
    logits = [step.logits[0, 0]]
    for token in ids[prompt:]:
        step = runner.forward(np.array([[token]]), None, step.cache, 1)
        logits.append(step.logits[0, 0])
    return np.stack(logits)


@pytest.mark.parametrize("target", TARGETS)
def test_an_executed_engine_keeps_the_gates(target: str, tiny_dir: Path, tmp_path: Path) -> None:
    (result,) = export(ExportRequest(str(tiny_dir), tmp_path / "release", (target,), parity="quick", engine=OPTIONS))
    assert result.report is not None
    assert result.report.engine.execution == "executed"
    assert result.report.outcome == "pass", result.summary


@pytest.mark.parametrize("target", TARGETS)
def test_decoding_by_graphs_gives_the_bits_of_decoding_without(target: str, build: Build, ids: np.ndarray) -> None:
    folder = build(target)
    with open_trt_runner(folder) as graphs, open_trt_runner(folder, cuda_graphs=False) as plain:
        by_graphs = decode(graphs, ids[0, :160], 100)
        assert graphs.graphs_refused is None
        np.testing.assert_array_equal(by_graphs, decode(plain, ids[0, :160], 100))
        np.testing.assert_array_equal(by_graphs, decode(graphs, ids[0, :160], 100), "the same graphs, another text")


def test_decoding_through_every_size_is_the_prompt_at_once(build: Build, ids: np.ndarray) -> None:
    with open_trt_runner(build("trt-fp32")) as runner:
        step = runner.forward(ids[:1], keep=190)
        np.testing.assert_allclose(decode(runner, ids[0], 100), step.logits[0, 99 - 290 :], atol=2e-3)


def test_padding_on_either_side_is_as_if_it_were_not_there(build: Build, ids: np.ndarray) -> None:
    lengths = (40, 17, 1)
    with open_trt_runner(build("trt-fp32")) as runner:
        alone = [runner.forward(ids[row : row + 1, :n], keep=1).logits[0, 0] for row, n in enumerate(lengths)]
        for left in (True, False):
            padded, mask = np.zeros((3, 40), np.int64), np.zeros((3, 40), np.int64)
            for row, n in enumerate(lengths):
                place = slice(40 - n, 40) if left else slice(0, n)
                padded[row, place], mask[row, place] = ids[row, :n], 1
            logits = runner.forward(padded, mask, keep=0).logits
            for row, n in enumerate(lengths):
                np.testing.assert_allclose(logits[row, 39 if left else n - 1], alone[row], atol=2e-3)


def test_experts_by_kernels_are_experts_by_their_function(build: Build, ids: np.ndarray) -> None:
    function = EngineOptions(max_batch=3, max_prompt=64, max_context=300, max_logits=192, plugin=False)
    with open_trt_runner(build("trt-fp32")) as kernels, open_trt_runner(build("trt-fp32", function)) as body:
        expected = body.forward(ids[:, :60], keep=0).logits
        np.testing.assert_allclose(kernels.forward(ids[:, :60], keep=0).logits, expected, atol=2e-3)


def test_weights_in_the_engine_are_the_weights_beside_it(build: Build, ids: np.ndarray) -> None:
    embedded = EngineOptions(max_batch=3, max_prompt=64, max_context=300, max_logits=192, engine_weights="embedded")
    with open_trt_runner(build("trt-fp32")) as beside, open_trt_runner(build("trt-fp32", embedded)) as inside:
        expected = beside.forward(ids[:, :60], keep=0).logits
        np.testing.assert_allclose(inside.forward(ids[:, :60], keep=0).logits, expected, atol=2e-3)


def test_close_gives_the_device_its_memory_back(build: Build, ids: np.ndarray) -> None:
    folder = build("trt-fp16")
    open_trt_runner(folder).close()  # what CUDA and TensorRT keep for themselves
    device = Device()
    before = device.free_bytes()
    for _ in range(3):
        with open_trt_runner(folder) as runner:
            decode(runner, ids[0, :20], 10)
    assert before - device.free_bytes() < 32 << 20


def test_limits_and_bytes_are_held_to(build: Build, ids: np.ndarray, tmp_path: Path) -> None:
    folder = build("trt-fp16")
    with open_trt_runner(folder) as runner, pytest.raises(PromptError, match="301 positions"):
        runner.forward(np.zeros((1, 301), np.int64))
    for name in ("engine.json", "engine.plan"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "weights").symlink_to(folder / "weights")
    data = bytearray((folder / "engine.plan").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "engine.plan").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"is not the engine that engine\.json describes"):
        open_trt_runner(tmp_path)

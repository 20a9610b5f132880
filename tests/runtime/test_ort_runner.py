"""The runner on both targets: whole, chunked, stepwise, padded; and what it refuses."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from gptoss_export.engines.ort import probe
from gptoss_export.engines.ort.build import build_ort_cpu
from gptoss_export.engines.ort.lower import lower_attention
from gptoss_export.engines.ort.probe import probe_attention
from gptoss_export.engines.ort.run import OrtRunner
from gptoss_export.engines.runner import KVCache, Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, SessionError, TargetUnavailableError

TOLERANCE = 1e-4


@pytest.fixture(params=list(TARGETS))
def runner(request: pytest.FixtureRequest, tiny_builds: dict[str, Path]) -> Runner:
    return TARGETS[request.param].open_runner(tiny_builds[request.param], 1)


def test_chunks_of_any_size(runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    cache: KVCache | None = None
    start = 0
    for size in (1, 15, 16, 1, 17, 50):
        step = runner.forward(ids[:, start : start + size], cache=cache, keep=0)
        np.testing.assert_allclose(step.logits, expected[:, start : start + size], rtol=0, atol=TOLERANCE)
        cache, start = step.cache, start + size
        assert cache.length == start


def test_only_the_logits_asked_for(runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    for keep, shape in ((0, 20), (1, 1), (7, 7)):
        logits = runner.forward(ids[:, :20], keep=keep).logits
        assert logits.shape == (1, shape, runner.vocab_size) and logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected[:, 20 - shape : 20], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_then_chunk_then_steps(
    runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray], side: str
) -> None:
    """Three lengths in one batch; after padding on the right the cache has holes, and every window crosses them."""
    ids, expected = tiny_reference
    lengths = [40, 9, 23]
    tokens, mask = np.zeros((3, 40), np.int64), np.zeros((3, 40), np.int64)
    places = [slice(40 - n, 40) if side == "left" else slice(0, n) for n in lengths]
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        tokens[row, place], mask[row, place] = ids[0, :n], 1
    step = runner.forward(tokens, mask, keep=0)
    for row, (n, place) in enumerate(zip(lengths, places, strict=True)):
        np.testing.assert_allclose(step.logits[row, place], expected[0, :n], rtol=0, atol=TOLERANCE)
    for size in (6, 1, 1):
        chunk = np.stack([ids[0, n : n + size] for n in lengths])
        step = runner.forward(chunk, cache=step.cache, keep=0)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(step.logits[row], expected[0, n : n + size], rtol=0, atol=TOLERANCE)
        lengths = [n + size for n in lengths]


def test_a_cache_may_be_taken_up_twice(runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    """Two continuations of one prompt: nothing is written in place behind the caller's back."""
    ids, expected = tiny_reference
    prompt = runner.forward(ids[:, :30])
    first = runner.forward(ids[:, 50:51], cache=prompt.cache)
    second = runner.forward(ids[:, 30:31], cache=prompt.cache)
    assert not np.array_equal(first.logits, second.logits)
    np.testing.assert_allclose(second.logits[:, 0], expected[:, 30], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("ids", "mask", "keep", "message"),
    [
        ([[5, 2048]], None, 1, "2048 is not in the vocabulary"),
        ([[-1]], None, 1, "-1 is not in the vocabulary"),
        ([[]], None, 1, "shape"),
        ([5], None, 1, "shape"),
        ([[5, 6]], [[1]], 1, "mask of shape"),
        ([[5, 6]], None, 3, "last 3 of 2"),
    ],
)
def test_refuses(runner: Runner, ids: list[object], mask: list[object] | None, keep: int, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        runner.forward(np.array(ids, np.int64), None if mask is None else np.array(mask), keep=keep)


def test_refuses_a_cache_of_another_batch(runner: Runner) -> None:
    cache = runner.forward(np.array([[1, 2]])).cache
    with pytest.raises(PromptError, match="cache"):
        runner.forward(np.array([[1], [2]]), cache=cache)


def test_a_broken_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x00not a model")
    with pytest.raises(SessionError) as caught:
        OrtRunner(tmp_path, "CPUExecutionProvider")
    assert "\n" not in caught.value.what


def test_another_provider_is_refused(tiny_builds: dict[str, Path]) -> None:
    with pytest.raises(TargetUnavailableError, match="CUDAExecutionProvider"):
        OrtRunner(tiny_builds["ort-cpu"], "CUDAExecutionProvider")


def test_attention_is_lowered_after_a_probe(tiny: Checkpoint, tiny_builds: dict[str, Path]) -> None:
    result = probe_attention(tiny.config)
    assert result.passed and result.cases >= 20 and result.max_error < 2e-6
    nodes = [node.op_type for node in onnx.load(tiny_builds["ort-cpu"] / "model.onnx").graph.node]
    assert nodes.count("GroupQueryAttention") == 4 and "SinkAttention" not in nodes
    assert nodes.count("PositionBias") == 2  # once for each kind of layer


@pytest.mark.parametrize("wrong", ["scale", "window", "sinks"])
def test_an_operator_that_differs_keeps_the_body(
    wrong: str,
    tiny: Checkpoint,
    tiny_graph: object,
    tiny_reference: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A runtime whose operator is subtly wrong, as has happened: the probe says so and the export stays right."""
    import onnx_ir as ir

    def subtly_wrong(model: ir.Model) -> ir.Model:
        model = lower_attention(model)
        for node in model.graph:
            if node.op_type == "GroupQueryAttention" and wrong == "scale":
                node.attributes["scale"] = ir.AttrFloat32("scale", node.attributes["scale"].as_float() * 1.001)
            elif node.op_type == "GroupQueryAttention" and wrong == "sinks":
                node.replace_input_with(11, None)
            elif node.op_type == "PositionBias" and wrong == "window" and node.attributes["window"].as_int():
                node.attributes["window"] = ir.AttrInt64("window", node.attributes["window"].as_int() + 1)
        return model

    monkeypatch.setattr(probe, "lower_attention", subtly_wrong)
    (tmp_path / "weights").mkdir()
    for file in tiny.weight_files:
        (tmp_path / "weights" / file.name).write_bytes(file.read_bytes())
    assert isinstance(tiny_graph, ir.Model)
    info = build_ort_cpu(tiny_graph, tiny, tmp_path, "weights")
    assert "function body" in info.notes[0] and "differs" in info.notes[0]
    ids, expected = tiny_reference
    logits = OrtRunner(tmp_path, "CPUExecutionProvider", 1).forward(ids, keep=0).logits
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)

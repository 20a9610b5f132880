"""The runner on both targets: whole, chunked, stepwise, padded; and what it refuses."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gptoss_export.engines.build_info import BuildInfo
from gptoss_export.engines.ort import build, probe, shared_cache
from gptoss_export.engines.ort.build import build_ort_cpu
from gptoss_export.engines.ort.lower import lower_attention
from gptoss_export.engines.ort.probe import probe_attention
from gptoss_export.engines.ort.run import open_ort_runner
from gptoss_export.engines.ort.shared_cache import SharedCache
from gptoss_export.engines.runner import KVCache, Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import PromptError, SessionError, TargetUnavailableError

TOLERANCE = 2e-3
"""Our kernels hold activations in 16 bits; logits are up to 16."""


def stock_build(tiny: Checkpoint, tiny_graph: ir.Model, folder: Path) -> tuple[BuildInfo, Path]:
    """ort-cpu as an installation without the kernel library builds it."""
    (folder / "weights").mkdir()
    for file in tiny.weight_files:
        (folder / "weights" / file.name).write_bytes(file.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "kernels_work", lambda: "not in this test")
        return build_ort_cpu(tiny_graph, tiny, folder, "weights"), folder


@pytest.fixture(scope="module")
def stock(tiny: Checkpoint, tiny_graph: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildInfo, Path]:
    return stock_build(tiny, tiny_graph, tmp_path_factory.mktemp("stock"))


@pytest.fixture(params=["onnx", "ort-cpu", "ort-cpu by bodies", "stock operators"])
def runner(request: pytest.FixtureRequest, tiny_builds: dict[str, Path], stock: tuple[BuildInfo, Path]) -> Runner:
    """Every way in which a model runs here; the third is an artifact that came to a host without the library."""
    if request.param == "stock operators":
        return open_ort_runner(stock[1], "CPUExecutionProvider", 1, kernels=False)
    if request.param == "ort-cpu by bodies":
        return open_ort_runner(tiny_builds["ort-cpu"], "CPUExecutionProvider", 1, kernels=False)
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


def test_a_cache_taken_up_twice_is_right_or_refused(
    runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]
) -> None:
    """Nothing is overwritten behind the caller's back."""
    ids, expected = tiny_reference
    prompt = runner.forward(ids[:, :30])
    runner.forward(ids[:, 50:51], cache=prompt.cache)
    if isinstance(prompt.cache, SharedCache):
        with pytest.raises(PromptError, match="continued already"):
            runner.forward(ids[:, 30:31], cache=prompt.cache)
    else:
        second = runner.forward(ids[:, 30:31], cache=prompt.cache)
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
        open_ort_runner(tmp_path, "CPUExecutionProvider")
    assert "\n" not in caught.value.what


def test_another_provider_is_refused(tiny_builds: dict[str, Path]) -> None:
    with pytest.raises(TargetUnavailableError, match="CUDAExecutionProvider"):
        open_ort_runner(tiny_builds["ort-cpu"], "CUDAExecutionProvider")


def test_attention_is_lowered_after_a_probe(tiny: Checkpoint, stock: tuple[BuildInfo, Path]) -> None:
    result = probe_attention(tiny.config)
    assert result.passed and result.cases >= 20 and result.max_error < 2e-6
    info, folder = stock
    assert "not in this test" in info.notes[0] and "GroupQueryAttention, within" in info.notes[1]
    nodes = [node.op_type for node in onnx.load(folder / "model.onnx").graph.node]
    assert nodes.count("GroupQueryAttention") == 4 and "SinkAttention" not in nodes
    assert nodes.count("PositionBias") == 2  # once for each kind of layer


@pytest.mark.parametrize("wrong", ["scale", "window", "sinks"])
def test_an_operator_that_differs_keeps_the_body(
    wrong: str,
    tiny: Checkpoint,
    tiny_graph: ir.Model,
    tiny_reference: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A runtime whose operator is subtly wrong, as has happened: the probe says so and the export stays right."""

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
    info, folder = stock_build(tiny, tiny_graph, tmp_path)
    assert "function body" in info.notes[1] and "differs" in info.notes[1]
    ids, expected = tiny_reference
    runner = open_ort_runner(folder, "CPUExecutionProvider", 1, kernels=False)
    np.testing.assert_allclose(runner.forward(ids, keep=0).logits, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(params=["kernels", "bodies"])
def ring_runner(
    request: pytest.FixtureRequest, tiny_builds: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """A window of 16 and calls of at most 4 positions: rings of 19 slots, gone round five times."""
    monkeypatch.setattr(shared_cache, "CHUNK", 4)
    monkeypatch.setattr(shared_cache, "FIRST_CAPACITY", 4)
    return open_ort_runner(tiny_builds["ort-cpu"], "CPUExecutionProvider", 1, kernels=request.param == "kernels")


def test_rings(ring_runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    step = ring_runner.forward(ids[:, :37], keep=0)
    np.testing.assert_allclose(step.logits, expected[:, :37], rtol=0, atol=TOLERANCE)
    for begin, end in ((37, 38), (38, 39), (39, 60), (60, 61), (61, 100)):
        step = ring_runner.forward(ids[:, begin:end], cache=step.cache, keep=2 if end - begin > 1 else 1)
        kept = step.logits.shape[1]
        np.testing.assert_allclose(step.logits, expected[:, end - kept : end], rtol=0, atol=TOLERANCE)
    assert isinstance(step.cache, SharedCache)
    slots = [value.shape()[2] for value in step.cache.values[::2]]
    assert slots[0] == slots[2] == 19  # sliding layers kept their window and no more
    assert slots[1] == slots[3] >= 100


def test_rings_with_padding_on_the_left(ring_runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    ids, expected = tiny_reference
    lengths = [50, 21]
    tokens, mask = np.zeros((2, 50), np.int64), np.zeros((2, 50), np.int64)
    for row, n in enumerate(lengths):
        tokens[row, 50 - n :], mask[row, 50 - n :] = ids[0, :n], 1
    step = ring_runner.forward(tokens, mask)
    for i in range(30):
        step = ring_runner.forward(np.array([[ids[0, n + i]] for n in lengths]), cache=step.cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(step.logits[row, 0], expected[0, n + i], rtol=0, atol=TOLERANCE)


def test_rings_grow_over_padding_between(ring_runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]) -> None:
    """Padding on the right of a short prompt lies inside of the text from then on; windows reach across it."""
    ids, expected = tiny_reference
    tokens, mask = np.zeros((2, 12), np.int64), np.zeros((2, 12), np.int64)
    lengths = [12, 3]
    for row, n in enumerate(lengths):
        tokens[row, :n], mask[row, :n] = ids[0, :n], 1
    step = ring_runner.forward(tokens, mask)
    for i in range(40):
        step = ring_runner.forward(np.array([[ids[0, n + i]] for n in lengths]), cache=step.cache)
        for row, n in enumerate(lengths):
            np.testing.assert_allclose(step.logits[row, 0], expected[0, n + i], rtol=0, atol=TOLERANCE)


def test_a_ring_that_lost_what_padding_makes_visible_is_refused(
    ring_runner: Runner, tiny_reference: tuple[np.ndarray, np.ndarray]
) -> None:
    ids, _ = tiny_reference
    step = ring_runner.forward(np.concatenate([ids[:, :40]] * 2))
    mask = np.array([[1, 1, 1, 1], [1, 0, 0, 0]])
    step = ring_runner.forward(np.concatenate([ids[:, 40:44]] * 2), mask, cache=step.cache)
    with pytest.raises(PromptError, match="padding inside"):
        for _ in range(3):
            step = ring_runner.forward(np.concatenate([ids[:, 44:48]] * 2), mask, cache=step.cache)

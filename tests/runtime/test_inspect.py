"""Looking inside of artifacts: what comes out is the artifact's own, and what is put in reaches only what it should."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.inspector import OPS, Inspector
from gptoss_export.engines.ort import build, shared_cache
from gptoss_export.engines.ort.build import build_ort_cpu
from gptoss_export.engines.ort.inspect import GraphInspector, open_ort_inspector
from gptoss_export.engines.ort.run import open_ort_runner
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, write_metadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.engines.tensorrt.target import open_graph, write_graph
from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.errors import GraphError, IntegrityError, PromptError, SessionError
from gptoss_export.exporter.graph.build import build_graph
from gptoss_export.exporter.model.gpt_oss import GptOss

CPU = "CPUExecutionProvider"
WINDOW = 16
N = 60
ALL_OPS = tuple(op for op in OPS if op != "router")


@dataclass(frozen=True)
class Artifact:
    """An artifact and the rounding of its values and of its matrices, as a share of them; types of its operations.

    rounding: of what passes between operators. weights: of dense matrices, beside that.
    """

    folder: Path
    inspector: Callable[[], Inspector]
    runner: Callable[[], Runner]
    rounding: float
    weights: float = 0.0
    narrow: str = "float32"


def with_weights(checkpoint: Checkpoint, folder: Path) -> Path:
    (folder / "weights").mkdir(parents=True)
    for file in checkpoint.weight_files:
        shutil.copyfile(file, folder / "weights" / file.name)
    return folder


def write_trt(checkpoint: Checkpoint, graph: ir.Model, name: str, folder: Path, options: EngineOptions) -> Path:
    """The graph and engine.json, without an engine."""
    precision = Precision(name.removeprefix("trt-"))
    with_weights(checkpoint, folder)
    inputs, _ = write_graph(precision, graph, checkpoint, folder, "weights", BuildSettings(options))
    sizes = {size: getattr(options, size) for size in ("max_batch", "max_prompt", "max_context", "max_logits")}
    metadata = EngineMetadata(
        flavor="rtx",
        version="1.7.1.116",
        compute_capabilities=("8.0+",),
        dtype=precision.value,
        engine_weights=options.engine_weights,
        plugin=options.plugin,
        engine_sha256="0" * 64,
        inputs=inputs,
        **sizes,
    )
    write_metadata(metadata, folder)
    return folder


def trt(folder: Path, rounding: float, narrow: str) -> Artifact:
    inspect = TARGETS["trt-fp32"].inspect
    return Artifact(folder, lambda: inspect(folder, 1), lambda: open_graph(folder, 1), rounding, narrow=narrow)


def of_target(name: str, folder: Path, rounding: float, weights: float = 0.0) -> Artifact:
    target = TARGETS[name]
    return Artifact(folder, lambda: target.inspect(folder, 1), lambda: target.open_runner(folder, 1), rounding, weights)


def by_bodies(folder: Path, rounding: float) -> Artifact:
    return Artifact(
        folder,
        lambda: open_ort_inspector(folder, CPU, 1, kernels=False),
        lambda: open_ort_runner(folder, CPU, 1, kernels=False),
        rounding,
    )


KINDS = (
    "onnx",
    "onnx of bfloat16 experts",
    "ort-cpu",
    "ort-cpu with stock operators",
    "ort-cpu-int8",
    "trt-fp32",
    "trt-fp16",
    "trt-bf16",
    "trt-fp16 embedded",
)


@pytest.fixture(scope="module")
def artifacts(
    tiny: Checkpoint,
    tiny_graph: ir.Model,
    tiny_builds: dict[str, Path],
    tiny_layouts: dict[Layout, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Artifact]:
    """Every kind of graph that there is. Kernels of ours hold activations in 16 bits."""
    base = tmp_path_factory.mktemp("inspected")
    dense = open_checkpoint(tiny_layouts[Layout.HF_BF16])
    dense_graph = build_graph(dense.config, dense.layout)
    TARGETS["onnx"].build(dense_graph, dense, with_weights(dense, base / "dense"), "weights", BuildSettings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "kernels_work", lambda: "not in this test")
        build_ort_cpu(tiny_graph, tiny, with_weights(tiny, base / "stock"), "weights")
    for name in ("trt-fp32", "trt-fp16", "trt-bf16"):
        write_trt(tiny, tiny_graph, name, base / name, EngineOptions())
    write_trt(tiny, tiny_graph, "trt-fp16", base / "embedded", EngineOptions(engine_weights="embedded"))
    return {
        "onnx": of_target("onnx", tiny_builds["onnx"], 1e-6),
        "onnx of bfloat16 experts": of_target("onnx", base / "dense", 1e-6),
        "ort-cpu": of_target("ort-cpu", tiny_builds["ort-cpu"], 1e-4),
        "ort-cpu by bodies": by_bodies(tiny_builds["ort-cpu"], 1e-6),
        "ort-cpu with stock operators": by_bodies(base / "stock", 1e-6),
        "ort-cpu-int8": of_target("ort-cpu-int8", tiny_builds["ort-cpu-int8"], 1e-4, 0.02),
        "trt-fp32": trt(base / "trt-fp32", 1e-6, "float32"),
        "trt-fp16": trt(base / "trt-fp16", 2**-10, "float16"),
        "trt-bf16": trt(base / "trt-bf16", 2**-7, "bfloat16"),
        "trt-fp16 embedded": trt(base / "embedded", 2**-10, "float16"),
    }


@pytest.fixture(params=KINDS)
def artifact(request: pytest.FixtureRequest, artifacts: dict[str, Artifact]) -> Artifact:
    return artifacts[request.param]


@pytest.fixture(scope="module")
def ort_cpu(artifacts: dict[str, Artifact]) -> Inspector:
    return artifacts["ort-cpu"].inspector()


@pytest.fixture(scope="module")
def spec(tiny: Checkpoint) -> GptOss:
    """The specification with the weights of the small checkpoint."""
    model = GptOss(tiny.config, tiny.layout)
    state = {}
    for name, ref in tiny.tensors.items():
        stored = torch.from_numpy(np.array(read_tensor(ref)).view(np.uint8 if ref.dtype == "U8" else np.int16))
        state[name] = stored if ref.dtype == "U8" else stored.view(torch.bfloat16)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2030, N)


@pytest.fixture(scope="module")
def streams(tiny: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """hidden and residual, which have nothing to do with each other; rows of different sizes."""
    rng = np.random.default_rng(1)
    shape = (N, tiny.config.hidden_size)
    scale = rng.uniform(0.5, 4, (N, 1))
    return tuple((scale * rng.normal(size=shape)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def close(found: np.ndarray, expected: np.ndarray, share: float) -> None:
    """Within that share of the root mean square of what is expected."""
    assert found.shape == expected.shape and found.dtype == np.float32
    error = np.sqrt(np.mean((found.astype(np.float64) - expected) ** 2) / np.mean(expected.astype(np.float64) ** 2))
    assert error <= share


def in_torch(spec: GptOss, index: int, hidden: np.ndarray, residual: np.ndarray) -> dict[str, np.ndarray]:
    """The operations of a layer by the specification, and `attention_residual` and `output`."""
    layer = spec.model.layers[index]
    c = layer.self_attn
    found: dict[str, torch.Tensor] = {}
    kept = c.o_proj.register_forward_pre_hook(lambda module, args: found.update(attention=args[0]))
    x, r = (torch.from_numpy(array)[None] for array in (hidden, residual))
    positions = torch.arange(len(hidden))[None]
    nothing = torch.zeros(1, c.kv, 0, c.sinks.numel() and spec.rope.inv_freq.numel() * 2)
    with torch.no_grad():
        t = found["input_layernorm"] = layer.input_layernorm(x)
        for name in ("q_proj", "k_proj", "v_proj"):
            found[name] = getattr(c, name)(t)
        found["o_proj"], _ = c(t, spec.rope(positions), positions, positions, (nothing, nothing))
        kept.remove()
        t = found["post_attention_layernorm"] = layer.post_attention_layernorm(r)
        found["experts"] = layer.mlp(t)
    found |= {"attention_residual": x + found["o_proj"], "output": r + found["experts"]}
    return {name: value[0].numpy() for name, value in found.items()}


def logits_of(spec: GptOss, hidden: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return spec.head(torch.from_numpy(hidden)[None])[0].numpy()


def embedded(spec: GptOss, ids: np.ndarray) -> np.ndarray:
    return spec.model.embed_tokens["weight"][torch.from_numpy(ids)].float().detach().numpy()


def test_routing_is_of_the_run_that_gives_the_runners_logits(artifact: Artifact, ids: np.ndarray) -> None:
    inspector = artifact.inspector()
    expected = artifact.runner().forward(ids[None], keep=0).logits[0]
    chunks = list(inspector.route(ids, rows=25))
    assert [(c.start, len(c.logits)) for c in chunks] == [(0, 25), (25, 25), (50, 10)]
    logits, weights, experts = (
        np.concatenate([getattr(c, name) for c in chunks]) for name in ("logits", "weights", "experts")
    )
    (whole,) = inspector.route(ids, rows=1000)
    np.testing.assert_array_equal(whole.logits, expected)
    assert whole.weights.dtype == np.float32 and whole.experts.dtype == np.int64
    assert whole.weights.shape == whole.experts.shape == (N, 4, 4)
    np.testing.assert_allclose(whole.weights.sum(-1), 1, atol=1e-6)
    assert (np.diff(whole.weights, axis=-1) <= 0).all()
    close(logits, expected, 30 * artifact.rounding)
    np.testing.assert_allclose(weights[experts == whole.experts], whole.weights[experts == whole.experts], atol=0.05)
    assert (experts == whole.experts).mean() > 0.97  # 16 bits flip near-ties


def test_a_chain_of_layers_is_the_model(artifact: Artifact, ids: np.ndarray, spec: GptOss) -> None:
    inspector = artifact.inspector()
    (whole,) = inspector.route(ids, rows=N)
    hidden = embedded(spec, ids)
    for n in range(inspector.num_layers):
        layer = inspector.layer(n)
        out = layer.run(hidden, layer.run(hidden, hidden).attention)
        np.testing.assert_array_equal(out.experts, whole.experts[:, n])
        np.testing.assert_allclose(out.weights, whole.weights[:, n], rtol=0, atol=1e-6)
        hidden = out.output
    assert n == 3
    close(logits_of(spec, hidden), whole.logits, artifact.rounding + artifact.weights)


def test_ends_are_those_of_the_specification(
    artifact: Artifact, ids: np.ndarray, streams: tuple[np.ndarray, np.ndarray], spec: GptOss
) -> None:
    last, _ = streams
    ends = artifact.inspector().ends()
    chunks = list(ends.run(ids, last, rows=25))
    assert [(c.start, len(c.logits)) for c in chunks] == [(0, 25), (25, 25), (50, 10)]
    embedding, norm, logits = (
        np.concatenate([getattr(c, name) for c in chunks]) for name in ("embedding", "norm", "logits")
    )
    close(embedding, embedded(spec, ids), artifact.rounding)
    with torch.no_grad():
        close(norm, spec.model.norm(torch.from_numpy(last)).numpy(), artifact.rounding)
    close(logits, logits_of(spec, last), 2 * artifact.rounding + artifact.weights)
    (other,) = ends.run(ids[::-1], last, rows=N)
    np.testing.assert_array_equal(other.embedding, embedding[::-1])
    close(other.logits, logits, artifact.rounding)


def test_ends_refuse_what_does_not_fit(ort_cpu: Inspector, ids: np.ndarray, streams: tuple[np.ndarray, ...]) -> None:
    ends = ort_cpu.ends()
    with pytest.raises(ValueError, match="59 ids"):
        next(ends.run(ids[1:], streams[0], rows=N))
    with pytest.raises(PromptError, match="not all in the vocabulary"):
        next(ends.run(ids + 2048, streams[0], rows=N))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_operations_are_those_of_the_specification(
    artifact: Artifact, streams: tuple[np.ndarray, np.ndarray], spec: GptOss, index: int
) -> None:
    expected = in_torch(spec, index, *streams)
    out = artifact.inspector().layer(index).run(*streams, ops=True)
    assert tuple(out.ops) == tuple(out.types) == ALL_OPS
    share = 2 * artifact.rounding + artifact.weights
    for name, values in out.ops.items():
        if name != "experts":
            close(values, expected[name], share)
    close(out.attention, expected["attention_residual"], share)
    chosen, _ = routed(spec, index, expected["post_attention_layernorm"])
    same = (np.sort(out.experts) == np.sort(chosen)).all(-1)  # the others were flipped by 16 bits
    assert same.mean() > 0.97
    close(out.ops["experts"][same], expected["experts"][same], share)
    close(out.output[same], expected["output"][same], share)
    narrow = dict.fromkeys(ALL_OPS, artifact.narrow) | {"experts": "float32"}
    assert out.types == narrow


def routed(spec: GptOss, index: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The specification's experts for x [n, H], and all logits [n, E] in float64."""
    router = spec.model.layers[index].mlp.router
    weight, bias = router.weight.detach().double().numpy(), router.bias.detach().double().numpy()
    logits = x.astype(np.float64) @ weight.T + bias
    return np.argsort(-logits, axis=-1, kind="stable")[:, :4], logits


def test_token_by_token_is_in_one_call(artifact: Artifact, streams: tuple[np.ndarray, np.ndarray]) -> None:
    inspector = artifact.inspector()
    for index in (0, 1):  # with a window and without
        layer = inspector.layer(index)
        whole = layer.run(*streams, ops=True)
        for calls in ((WINDOW - 2, *(1,) * (N - WINDOW + 2)), (WINDOW + 1, 5, N - WINDOW - 6), (1, N - 1)):
            parts = layer.run(*streams, calls=calls, ops=True)
            close(parts.attention, whole.attention, artifact.rounding)
            for name in ALL_OPS[:-1]:
                close(parts.ops[name], whole.ops[name], 2 * artifact.rounding)
            assert (parts.experts == whole.experts).mean() > 0.97


def test_each_half_has_its_own_input(artifact: Artifact, streams: tuple[np.ndarray, np.ndarray]) -> None:
    hidden, residual = streams
    layer = artifact.inspector().layer(2)
    out = layer.run(hidden, residual, ops=True)
    other_residual = layer.run(hidden, residual[::-1], ops=True)
    other_hidden = layer.run(hidden[::-1], residual, ops=True)
    for same, other in ((out, other_residual), (other_residual, out)):
        np.testing.assert_array_equal(same.attention, other.attention)
        assert not np.array_equal(same.output, other.output) and not np.array_equal(same.experts, other.experts)
    np.testing.assert_array_equal(out.output, other_hidden.output)
    np.testing.assert_array_equal(out.weights, other_hidden.weights)
    assert not np.array_equal(out.attention, other_hidden.attention)
    first_half = ALL_OPS[: ALL_OPS.index("post_attention_layernorm")]
    for name in ALL_OPS:
        changed = other_hidden if name in first_half else other_residual
        unchanged = other_residual if name in first_half else other_hidden
        np.testing.assert_array_equal(out.ops[name], unchanged.ops[name])
        assert not np.array_equal(out.ops[name], changed.ops[name])


def test_a_position_sees_none_that_come_later(artifact: Artifact, streams: tuple[np.ndarray, np.ndarray]) -> None:
    """Rows come out where they went in, whatever the calls."""
    hidden, residual = streams
    layer = artifact.inspector().layer(1)
    changed = hidden.copy()
    changed[40] += 1
    for calls in (None, (30, 1, 29)):
        before, after = layer.run(hidden, residual, calls), layer.run(changed, residual, calls)
        np.testing.assert_array_equal(before.attention[:40], after.attention[:40])
        assert (before.attention[40:] != after.attention[40:]).any(-1).all()


def test_replaying_its_own_choice_changes_nothing(artifact: Artifact, ids: np.ndarray) -> None:
    inspector = artifact.inspector()
    (own,) = inspector.route(ids, rows=N)
    (again,) = inspector.route(ids, experts=own.experts, rows=N)
    np.testing.assert_array_equal(again.experts, own.experts)
    np.testing.assert_allclose(again.weights, own.weights, rtol=0, atol=1e-4)
    close(again.logits, own.logits, artifact.rounding + 1e-5)
    (back,) = inspector.route(ids, experts=own.experts[..., ::-1], rows=N)
    np.testing.assert_array_equal(back.experts, own.experts[..., ::-1])
    np.testing.assert_allclose(back.weights, own.weights[..., ::-1], rtol=0, atol=1e-4)


def test_replaying_another_choice_is_the_specification_with_that_choice(
    artifact: Artifact, ids: np.ndarray, spec: GptOss, monkeypatch: pytest.MonkeyPatch
) -> None:
    inspector = artifact.inspector()
    (own,) = inspector.route(ids, rows=N)
    # The worst one among the chosen, too, whose weight the router alone would never have looked at.
    given = np.stack([np.random.default_rng(2).permutation(16)[:4] for _ in range(4 * N)]).reshape(N, 4, 4)
    for n, layer in enumerate(spec.model.layers):

        def choose(x: torch.Tensor, n: int = n) -> tuple[torch.Tensor, torch.Tensor]:
            _, logits = routed(spec, n, x[0].numpy())
            picked = torch.from_numpy(np.take_along_axis(logits, given[:, n], -1))
            return torch.softmax(picked, -1).float()[None], torch.from_numpy(given[:, n])[None]

        monkeypatch.setattr(layer.mlp.router, "forward", choose)
    nothing = torch.zeros(1, 2, 0, 32)
    with torch.no_grad():
        expected = spec(torch.from_numpy(ids)[None], torch.ones(1, N, dtype=torch.int64), [(nothing, nothing)] * 4)[0]
    chunks = list(inspector.route(ids, experts=given, rows=22))
    found = np.concatenate([c.logits for c in chunks])
    np.testing.assert_array_equal(np.concatenate([c.experts for c in chunks]), given)
    close(found, expected[0].numpy(), 4 * artifact.rounding + 2 * artifact.weights)
    assert np.abs(found - own.logits).max() > 1


def test_texts_may_be_run_by_turns(ort_cpu: Inspector, ids: np.ndarray) -> None:
    """Also one with a replay in between, which is another session."""
    (expected,) = ort_cpu.route(ids, rows=N)
    turns = zip(
        ort_cpu.route(ids, rows=20),
        ort_cpu.route(ids[::-1], rows=20),
        ort_cpu.route(ids, experts=expected.experts, rows=20),
        strict=True,
    )
    found = [first for first, *_ in turns]
    np.testing.assert_array_equal(np.concatenate([c.logits for c in found]), expected.logits)
    np.testing.assert_array_equal(np.concatenate([c.experts for c in found]), expected.experts)


def test_however_the_runner_cuts_a_text(
    tiny: Checkpoint,
    tiny_graph: ir.Model,
    artifacts: dict[str, Artifact],
    ids: np.ndarray,
    streams: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = EngineOptions(max_batch=1, max_prompt=14, max_logits=9, max_context=100)
    folder = write_trt(tiny, tiny_graph, "trt-fp32", tmp_path / "small", options)
    cases = [(artifacts["trt-fp32"].inspector(), trt(folder, 1e-6, "float32").inspector())]
    monkeypatch.setattr(shared_cache, "CHUNK", 11)
    cases.append((artifacts["ort-cpu by bodies"].inspector(), artifacts["ort-cpu by bodies"].inspector()))
    for large, small in cases:
        monkeypatch.setattr(shared_cache, "CHUNK", 512)
        (whole,) = large.route(ids, rows=N)
        out = large.layer(1).run(*streams)
        monkeypatch.setattr(shared_cache, "CHUNK", 11)
        (cut,) = small.route(ids, rows=N)
        np.testing.assert_array_equal(cut.experts, whole.experts)
        np.testing.assert_allclose(cut.logits, whole.logits, atol=1e-4)
        (ends,), (cut_ends,) = (list(which.ends().run(ids, streams[0], rows=N)) for which in (large, small))
        for name in ("embedding", "norm", "logits"):
            np.testing.assert_allclose(getattr(cut_ends, name), getattr(ends, name), atol=1e-4)
        other = small.layer(1).run(*streams)
        np.testing.assert_allclose(other.attention, out.attention, atol=1e-4)
        np.testing.assert_allclose(other.output, out.output, atol=1e-4)
    with pytest.raises(PromptError, match="at most 100"):
        next(cases[0][1].route(np.zeros(101, np.int64), rows=1000))


def test_a_text_may_be_longer_than_the_vocabulary(ort_cpu: Inspector, artifacts: dict[str, Artifact]) -> None:
    """Ids are indexes in here, and of those there may be more."""
    ids = np.random.default_rng(3).integers(0, 2030, 2100)
    *_, last = ort_cpu.route(ids, rows=512)
    expected = artifacts["ort-cpu"].runner().forward(ids[None], keep=1).logits[0, 0]
    assert last.start == 2048
    np.testing.assert_allclose(last.logits[-1], expected, atol=2e-3)


def test_a_layer_brings_its_own_weights_alone(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    inspector = artifact.inspector()
    assert isinstance(inspector, GraphInspector)
    backend, kept = inspector._backend, []
    session = type(backend).session
    monkeypatch.setattr(type(backend), "session", lambda self, model: (kept.append(model), session(self, model))[1])
    inspector.layer(2)
    (model,) = kept
    names = {*model.graph.initializers, *(value.name for value in model.graph.inputs)}
    assert any(name.startswith("model.layers.2.mlp.experts.") for name in names)
    weights = {name for name in names if "model." in name or "lm_head" in name}
    assert all("model.layers.2." in name for name in weights)
    assert {n for n in names if n.startswith("past")} == {f"past_key_values.2.{part}" for part in ("key", "value")}
    assert sum(t.const_value.nbytes for t in model.graph.initializers.values() if t.name not in weights) < 4096


def test_what_runs_it_is_named(artifact: Artifact) -> None:
    inspector = artifact.inspector()
    assert inspector.num_layers == 4
    assert inspector.description.startswith("onnxruntime 1.") and CPU in inspector.description


@pytest.mark.parametrize("bad", [[], [-1], [2048], [[1, 2]]], ids=str)
def test_ids_that_are_none(ort_cpu: Inspector, bad: list) -> None:
    with pytest.raises(PromptError, match="vocabulary"):
        ort_cpu.route(np.array(bad, np.int64), rows=8)


def test_experts_that_do_not_fit(ort_cpu: Inspector) -> None:
    ids = np.arange(3)
    for shape in ((3, 4), (2, 4, 4), (3, 3, 4)):
        with pytest.raises(ValueError, match="positions in 4 layers"):
            ort_cpu.route(ids, experts=np.zeros(shape, np.int64), rows=8)
    for expert in (-1, 16):
        with pytest.raises(ValueError, match="a layer has 16"):
            ort_cpu.route(ids, experts=np.full((3, 4, 4), expert), rows=8)


def test_layers_and_streams_that_do_not_fit(ort_cpu: Inspector, streams: tuple[np.ndarray, np.ndarray]) -> None:
    for index in (-1, 4):
        with pytest.raises(ValueError, match="of 4"):
            ort_cpu.layer(index)
    hidden, residual = streams
    layer = ort_cpu.layer(0)
    with pytest.raises(ValueError, match="residual"):
        layer.run(hidden, residual[1:])
    for calls in ((), (N, 1), (N - 1,), (0, N), (-1, N + 1)):
        with pytest.raises(ValueError, match="positions"):
            layer.run(hidden, residual, calls)


def test_after_an_error_it_goes_on(ort_cpu: Inspector, streams: tuple[np.ndarray, np.ndarray]) -> None:
    layer = ort_cpu.layer(0)
    before = layer.run(*streams)
    with pytest.raises(Exception, match="hidden"):
        layer.run(streams[0][:, :-1], streams[1][:, :-1])
    np.testing.assert_array_equal(layer.run(*streams).output, before.output)


@pytest.mark.parametrize("name", ["onnx", "trt-fp32"])
def test_graphs_that_are_none_of_ours(artifacts: dict[str, Artifact], name: str, tmp_path: Path) -> None:
    source = artifacts[name].folder

    def changed(change: Callable[[onnx.ModelProto], None]) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(source, folder)
        model = onnx.load(source / "model.onnx", load_external_data=False)
        change(model)
        (folder / "model.onnx").unlink()
        (folder / "model.onnx").write_bytes(model.SerializeToString())
        return folder

    def rename_weight(part: str) -> Callable[[onnx.ModelProto], None]:
        def change(model: onnx.ModelProto) -> None:
            for weight in model.graph.initializer:
                if part in weight.name:
                    for node in model.graph.node:
                        node.input[:] = [f"x.{i}" if i == weight.name else i for i in node.input]
                    weight.name = f"x.{weight.name}"

        return change

    def without_residual(model: onnx.ModelProto) -> None:
        add = next(n for n in model.graph.node if n.op_type == "Add" and n.name.startswith("model.layers.1."))
        add.op_type = "Sub"

    inspect = TARGETS[name].inspect
    for part in ("input_layernorm", "mlp.router", "embed_tokens"):
        if name == "onnx" or part != "embed_tokens":
            with pytest.raises(GraphError):
                inspect(changed(rename_weight(part)), 1)
    inspector = inspect(changed(without_residual), 1)
    with pytest.raises(GraphError, match="layer 1"):
        inspector.layer(1)
    with pytest.raises(GraphError, match="layer 1"):
        next(inspector.route(np.arange(3), rows=3))


@pytest.mark.parametrize("content", [None, b"", b"junk"], ids=["missing", "empty", "junk"])
@pytest.mark.parametrize("name", ["onnx", "trt-fp32"])
def test_files_that_are_no_graph(
    artifacts: dict[str, Artifact], name: str, content: bytes | None, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(artifacts[name].folder, folder)
    (folder / "model.onnx").unlink()
    if content is not None:
        (folder / "model.onnx").write_bytes(content)
    with pytest.raises(IntegrityError if content is None else (SessionError, GraphError)):
        TARGETS[name].inspect(folder, 1)

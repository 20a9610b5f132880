"""Engines of the small checkpoint, from the command to the report: what is built, what it is bound to, what refuses.

Engines are built with TensorRT for RTX, which needs no GPU. Where none can run them, their graphs are compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from gptoss_export.engines.build_info import BuildInfo, BuildSettings
from gptoss_export.engines.targets import TARGETS
from gptoss_export.engines.tensorrt.cuda import device_missing
from gptoss_export.engines.tensorrt.flavor import find_flavor
from gptoss_export.engines.tensorrt.header import read_header
from gptoss_export.engines.tensorrt.kernels.bundle import MAGIC
from gptoss_export.engines.tensorrt.lower import is_external
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, read_metadata, write_metadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.engines.tensorrt.target import execution, open_engine, open_graph, write_graph
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import read_manifest, verify_files
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout, TensorRef
from gptoss_export.exporter.errors import TargetUnavailableError
from gptoss_export.exporter.measure import make_yardstick
from gptoss_export.exporter.model.gpt_oss import inverse_frequencies
from gptoss_export.exporter.planning.request import MeasureOptions
from gptoss_export.exporter.progress import SilentProgress
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.parity import Subject, Yardstick, validate
from gptoss_export.validators.report.schema import Binding, Engine
from gptoss_export.validators.scenario_run import run_scenarios
from gptoss_export.validators.scenarios import SCENARIOS
from gptoss_export.validators.verdict import Case

pytest.importorskip("tensorrt_rtx")
pytest.importorskip("triton")

without_gpu = pytest.mark.skipif(device_missing() is None, reason="a GPU executes the engines here")

NAMES = ("trt-fp16", "trt-bf16", "trt-fp32")
FUNCTION = EngineOptions(flavor="rtx", plugin=False)
# Kernels for one architecture take a fifth of the time; that all five are compiled is shown elsewhere.
PLUGIN = EngineOptions(flavor="rtx", compute_capabilities=("8.6",))
BUILDS = [(name, options) for name in NAMES for options in (FUNCTION, PLUGIN)]
BUILD_IDS = [f"{name}-{'plugin' if options.plugin else 'function'}" for name, options in BUILDS]
Q_PROJ = "model.layers.2.self_attn.q_proj.weight"

Build = Callable[[str, EngineOptions], tuple[Path, BuildInfo]]
Graph = Callable[..., Path]


def precision_of(name: str) -> Precision:
    return Precision(name.removeprefix("trt-"))


def with_weights(folder: Path, tiny: Checkpoint) -> Path:
    (folder / "weights").mkdir()
    for file in tiny.weight_files:
        shutil.copyfile(file, folder / "weights" / file.name)
    return folder


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["-q", *map(str, arguments)])
    assert "Traceback" not in err.getvalue()
    return code, out.getvalue(), err.getvalue()


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def built(tiny: Checkpoint, tiny_graph: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """An artifact's folder as a target builds it, each once."""

    @cache
    def make(name: str, options: EngineOptions) -> tuple[Path, BuildInfo]:
        folder = with_weights(tmp_path_factory.mktemp(name), tiny)
        return folder, TARGETS[name].build(tiny_graph, tiny, folder, "weights", BuildSettings(options))

    return make


def describe(name: str, options: EngineOptions, inputs: dict, folder: Path) -> None:
    """engine.json for a graph without an engine, which is all that its runner reads."""
    metadata = EngineMetadata(
        flavor="rtx",
        version="1.7.1.116",
        compute_capabilities=("8.0+",),
        dtype=precision_of(name).value,
        engine_weights=options.engine_weights,
        max_batch=options.max_batch,
        max_prompt=options.max_prompt,
        max_context=options.max_context,
        max_logits=options.max_logits,
        plugin=options.plugin,
        engine_sha256="0" * 64,
        inputs=inputs,
    )
    write_metadata(metadata, folder)


@pytest.fixture(scope="module")
def graph_of(tiny: Checkpoint, tiny_graph: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """A folder with the graph alone, without an engine; another one each time."""

    def make(name: str, engine_weights: str = "external", **options: int) -> Path:
        folder = with_weights(tmp_path_factory.mktemp(f"{name}-graph"), tiny)
        chosen = EngineOptions(engine_weights=engine_weights, **options)
        inputs, _ = write_graph(precision_of(name), tiny_graph, tiny, folder, "weights", BuildSettings(chosen))
        describe(name, chosen, inputs, folder)
        return folder

    return make


@pytest.fixture(scope="module")
def yardstick(tiny: Checkpoint) -> Yardstick:
    return make_yardstick(tiny, {}, "quick", list(NAMES), MeasureOptions(), SilentProgress())


# What is built.


@pytest.mark.parametrize(("name", "options"), BUILDS, ids=BUILD_IDS)
def test_the_engine_and_what_describes_it(name: str, options: EngineOptions, built: Build, tiny: Checkpoint) -> None:
    folder, info = built(name, options)
    metadata, engine = read_metadata(folder), folder / "engine.plan"
    header = read_header(engine)
    capabilities = options.compute_capabilities or ("8.0+",)
    assert metadata.engine_sha256 == hashlib.sha256(engine.read_bytes()).hexdigest()
    assert header.nbytes == engine.stat().st_size > 5e6
    assert header.compute_capabilities == metadata.compute_capabilities == capabilities
    assert ".".join(map(str, header.version)) == metadata.version
    assert (metadata.flavor, metadata.dtype) == ("rtx", precision_of(name).value)
    assert metadata.plugin is options.plugin
    limits = (metadata.max_batch, metadata.max_prompt, metadata.max_context, metadata.max_logits)
    assert limits == (options.max_batch, options.max_prompt, options.max_context, options.max_logits)
    assert info.engine == f"tensorrt_rtx {metadata.version}"
    assert info.provider == f"compute capability {capabilities[0]}"
    assert any(f"experts by {'plugin' if options.plugin else 'function body'}" in note for note in info.notes)


@pytest.mark.parametrize(("name", "options"), BUILDS, ids=BUILD_IDS)
def test_nothing_lies_beside_it_that_does_not_belong(name: str, options: EngineOptions, built: Build) -> None:
    folder, _ = built(name, options)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {file for file in files if not file.startswith("weights/")}
    dense = set() if name == "trt-bf16" else {f"dense/{precision_of(name).value}.safetensors"}
    assert own == {"model.onnx", "engine.plan", "engine.json"} | dense
    assert (folder / "model.onnx").stat().st_size < 1 << 20


@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_are_in_the_engine(name: str, built: Build) -> None:
    function, plugin = ((built(name, options)[0] / "engine.plan").read_bytes() for options in (FUNCTION, PLUGIN))
    assert MAGIC in plugin
    assert MAGIC not in function


@pytest.mark.parametrize("name", NAMES)
def test_the_inputs_are_the_bytes_of_the_checkpoint(name: str, built: Build, tiny: Checkpoint) -> None:
    folder, _ = built(name, FUNCTION)
    inputs = read_metadata(folder).inputs
    assert inputs.keys() == {weight for weight in tiny.tensors if is_external(weight)}
    for weight, entry in inputs.items():
        ref = tiny.tensors[weight]
        assert (entry.dtype, entry.shape, entry.nbytes) == (ref.dtype, ref.shape, ref.nbytes)
        assert data_of(folder / entry.file, entry.offset, entry.nbytes) == data_of(ref.file, ref.offset, ref.nbytes)


def data_of(file: Path, offset: int, nbytes: int) -> bytes:
    with file.open("rb") as f:
        f.seek(offset)
        return f.read(nbytes)


@pytest.mark.parametrize("name", NAMES)
def test_the_graph_is_valid_where_it_lies(name: str, built: Build) -> None:
    onnx.checker.check_model(built(name, PLUGIN)[0] / "model.onnx", full_check=True)


@pytest.mark.parametrize("name", NAMES)
def test_the_engines_weights_are_no_larger_than_was_planned(name: str, built: Build, tiny: Checkpoint) -> None:
    """A few MB of machine code come on top, which the plan has as one sum for everything that is no weight."""
    folder, _ = built(name, FUNCTION)
    own = TARGETS[name].own_bytes(tiny, BuildSettings(FUNCTION))
    written = sum(path.stat().st_size for path in folder.glob("dense/*")) + (folder / "engine.plan").stat().st_size
    assert 0 < own < written < own + (32 << 20)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_graph_and_dense_weights_every_time(name: str, built: Build, graph_of: Graph) -> None:
    """The engines themselves differ in a few bytes from build to build."""
    first, again = built(name, FUNCTION)[0], graph_of(name)
    for path in (Path("model.onnx"), *(file.relative_to(first) for file in first.glob("dense/*"))):
        assert (first / path).read_bytes() == (again / path).read_bytes()


def test_other_targets_can_be_built_from_the_same_graph_afterwards(
    tiny: Checkpoint, tiny_graph: ir.Model, graph_of: Graph, tiny_builds: dict[str, Path], tmp_path: Path
) -> None:
    for name in NAMES:
        graph_of(name)
    with_weights(tmp_path, tiny)
    TARGETS["onnx"].build(tiny_graph, tiny, tmp_path, "weights", BuildSettings())
    assert (tmp_path / "model.onnx").read_bytes() == (tiny_builds["onnx"] / "model.onnx").read_bytes()


# What runs, and what does not.


@without_gpu
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gpu_the_engine_is_not_opened(name: str, built: Build) -> None:
    folder, _ = built(name, PLUGIN)
    with pytest.raises(TargetUnavailableError, match="this host cannot execute an engine: ") as caught:
        open_engine(folder, None)
    assert device_missing() in caught.value.what
    with pytest.raises(TargetUnavailableError):
        TARGETS[name].open_runner(folder, 1)


@without_gpu
@pytest.mark.parametrize("name", NAMES)
def test_execution_says_what_runs_instead_and_why(name: str, built: Build) -> None:
    folder, _ = built(name, PLUGIN)
    found = execution(folder)
    assert found.not_executed_reason == device_missing()
    assert found.not_executed_reason
    assert found.ran_instead is not None
    assert found.ran_instead.startswith("onnxruntime ")
    assert (found.name, found.version) == ("tensorrt_rtx", read_metadata(folder).version)
    assert (found.provider, found.max_batch) == ("compute capability 8.6", PLUGIN.max_batch)


@pytest.mark.parametrize("name", ["trt-fp16", "trt-bf16"])
def test_the_graph_keeps_the_gates(name: str, built: Build, tiny: Checkpoint, yardstick: Yardstick) -> None:
    folder = built(name, PLUGIN)[0]
    subject = Subject(
        target=name,
        runner=open_graph(folder, None),
        inspector=TARGETS[name].inspect(folder, None),
        checkpoint=tiny,
        engine=Engine("tensorrt_rtx", "", "", "graph only", "not in this test", "onnxruntime"),
        binding=Binding({}, {}),
        max_batch=PLUGIN.max_batch,
        max_context=PLUGIN.max_context,
    )
    report = validate(subject, yardstick, policy=GATES[name])
    assert report.verdict.passed, report.verdict.failures
    assert report.outcome == "not executed"
    floor = yardstick.floors[GATES[name].floor_dtype or ""].metrics
    assert floor.kl_median is not None
    for scenario in report.evidence.scenarios:
        assert scenario.metrics.kl_median is not None
        assert scenario.metrics.kl_median <= 2 * floor.kl_median


@pytest.mark.parametrize("name", NAMES)
def test_embedded_weights_are_the_same_weights(name: str, built: Build, graph_of: Graph) -> None:
    ids = np.random.default_rng(0).integers(0, 2030, (2, 23))
    found = []
    for folder in (built(name, FUNCTION)[0], graph_of(name, "embedded")):
        runner = open_graph(folder, 1)
        step = runner.forward(ids[:, :20], keep=0)
        rest = runner.forward(ids[:, 20:], cache=step.cache, keep=2)
        found.append(np.concatenate([step.logits, rest.logits], axis=1))
    assert np.isfinite(found[0]).all()
    assert np.array_equal(found[0], found[1])


def test_prompts_in_pieces_are_the_prompt(graph_of: Graph, built: Build) -> None:
    ids = np.random.default_rng(1).integers(0, 2030, (2, 37))
    small = open_graph(graph_of("trt-fp32", max_batch=2, max_prompt=10, max_context=40, max_logits=16), 1)
    large = open_graph(built("trt-fp32", FUNCTION)[0], 1)
    pieces, whole = (runner.forward(ids, keep=8).logits for runner in (small, large))
    np.testing.assert_allclose(pieces, whole, atol=1e-4)


# The command.


@pytest.fixture(scope="module")
def known_graph(tiny_graph: ir.Model) -> Iterator[None]:
    """Spares a command the tracing; what it builds from is the same graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptoss_export.exporter.graph.build.build_graph", lambda config, layout: tiny_graph)
        yield


@pytest.fixture(scope="module")
def exported(
    tiny_dir: Path, known_graph: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[int, str, str]]:
    """A release of one row a call, and what the command said."""
    out = tmp_path_factory.mktemp("trt") / "release"
    arguments = ["--target", "trt-fp32", "--trt-experts", "function", "--max-batch", 1]
    return out, run(*arguments, "--model", tiny_dir, "--output", out)


@pytest.fixture
def release(exported: tuple[Path, tuple[int, str, str]]) -> Path:
    return exported[0]


@without_gpu
def test_an_engine_that_was_not_executed_is_exit_code_52(exported: tuple[Path, tuple[int, str, str]]) -> None:
    out, (code, stdout, stderr) = exported
    assert code == 52, stderr
    assert "trt-fp32: graph passes (quick), engine NOT EXECUTED" in stdout
    assert len(errors(stderr)) == 1
    assert "was built and never executed" in stderr
    assert "--allow-unexecuted" in stderr
    manifest = read_manifest(out)
    assert (manifest.target, manifest.parity.verdict) == ("trt-fp32", "not executed")
    verify_files(out, manifest)
    assert {"model.onnx", "engine.plan", "engine.json", "dense/fp32.safetensors"} <= manifest.files.keys()
    assert (out / "parity.md").read_text().startswith("**NOT EXECUTED**: the graph passes (graph parity)")
    assert read_metadata(out).max_batch == 1


@without_gpu
def test_one_row_a_call_is_enough_for_every_scenario(release: Path) -> None:
    report = json.loads((release / "parity.json").read_text())
    scenarios = {scenario["name"]: scenario["metrics"] for scenario in report["evidence"]["scenarios"]}
    assert tuple(scenarios) == SCENARIOS
    for metrics in scenarios.values():
        assert metrics["positions"] > 0
        assert metrics["kl_mean"] <= 1e-8
        assert metrics["disagreements"] == 0
    engine = report["engine"]
    assert (engine["name"], engine["execution"]) == ("tensorrt_rtx", "graph only")
    assert engine["not_executed_reason"] == device_missing()
    assert engine["ran_instead"].startswith("onnxruntime ")


@without_gpu
def test_validate_accepts_it_where_that_is_asked_for(release: Path) -> None:
    code, stdout, stderr = run("validate", release, "--allow-unexecuted", "--json")
    assert code == 0, stderr
    (result,) = json.loads(stdout)["results"]
    assert result["verdict"] == "not executed"
    assert read_manifest(release).parity.verdict == "not executed"
    verify_files(release, read_manifest(release))


@without_gpu
@pytest.mark.parametrize("arguments", [["generate", "--token-ids", "1,2,3"], ["bench", "--prompt-lengths", "4"]])
def test_what_has_to_run_the_engine_says_that_it_cannot(arguments: list[str], release: Path) -> None:
    code, stdout, stderr = run(arguments[0], release, *arguments[1:])
    assert (code, stdout) == (30, "")
    (line,) = errors(stderr)
    assert device_missing() in line
    told = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 2, "what, and what to do about it"


def with_weight(source: Checkpoint, value: float, folder: Path) -> Path:
    """A copy of the checkpoint with this weight in row 3, column 5 of Q_PROJ."""
    shutil.copytree(source.root, folder)
    ref = source.tensors[Q_PROJ]
    with (folder / ref.file.name).open("r+b") as f:
        f.seek(ref.offset + 2 * (3 * ref.shape[1] + 5))
        f.write(np.array(value, ml_dtypes.bfloat16).tobytes())
    return folder


@pytest.mark.parametrize("value", [1e5, np.nan, -np.inf])
def test_a_weight_that_float16_cannot_hold(value: float, tiny: Checkpoint, known_graph: None, tmp_path: Path) -> None:
    model, out = with_weight(tiny, value, tmp_path / "model"), tmp_path / "out" / "release"
    code, stdout, stderr = run("--target", "trt-fp16", "--model", model, "--output", out)
    assert (code, stdout) == (35, "")
    (line,) = errors(stderr)
    assert f"{Q_PROJ}: the weight in row 3, column 5 is {float(ml_dtypes.bfloat16(value)):g}" in line
    assert ("trt-bf16" if value == 1e5 else "Download") in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", ["trt-bf16", "trt-fp32"])
def test_a_weight_that_is_no_number_fits_nowhere(
    name: str, tiny: Checkpoint, known_graph: None, tmp_path: Path
) -> None:
    model = with_weight(tiny, np.nan, tmp_path / "model")
    code, _, stderr = run("--target", name, "--model", model, "--output", tmp_path / "release", "--parity", "off")
    assert code == 35
    assert f"{Q_PROJ}: the weight in row 3, column 5 is nan" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bfloat16_holds_it(tiny: Checkpoint, known_graph: None, tmp_path: Path) -> None:
    model, out = with_weight(tiny, 1e5, tmp_path / "model"), tmp_path / "release"
    arguments = ["--target", "trt-bf16", "--trt-experts", "function", "--parity", "off"]
    code, _, stderr = run(*arguments, "--model", model, "--output", out)
    assert code == 0, stderr
    assert "NOT VALIDATED" in stderr
    assert read_manifest(out).parity.verdict == "not validated"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--trt-experts", "function"]])
def test_experts_in_bfloat16_are_refused_before_anything_is_written(
    name: str, more: list[str], tiny_layouts: dict[Layout, Path], tmp_path: Path
) -> None:
    out = tmp_path / "release"
    code, stdout, stderr = run("--target", name, "--model", tiny_layouts[Layout.HF_BF16], "--output", out, *more)
    assert (code, stdout) == (30, "")
    (line,) = errors(stderr)
    assert f"{name} runs MXFP4 experts" in line
    assert list(tmp_path.iterdir()) == []


def test_other_layouts_of_mxfp4_give_the_same_logits(
    tiny_layouts: dict[Layout, Path], built: Build, known_graph: None, tmp_path: Path
) -> None:
    """OpenAI's own: q, k and v lie in one tensor, of which the graph reads parts."""
    out = tmp_path / "release"
    arguments = ["--target", "trt-fp16", "--trt-experts", "function", "--parity", "off"]
    code, _, stderr = run(*arguments, "--model", tiny_layouts[Layout.ORIGINAL], "--output", out)
    assert code == 0, stderr
    ids = np.random.default_rng(2).integers(0, 2030, (1, 30))
    ours, theirs = (
        open_graph(folder, 1).forward(ids, keep=0).logits for folder in (built("trt-fp16", FUNCTION)[0], out)
    )
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("more", [[], ["--engine-weights", "embedded"]])
def test_a_dry_run_tells_sizes_and_writes_nothing(more: list[str], tiny: Checkpoint, tmp_path: Path) -> None:
    arguments = ["--target", "trt-fp16", "--model", tiny.root, "--output", tmp_path / "release", "--dry-run", *more]
    code, stdout, stderr = run(*arguments)
    assert code == 0, stderr
    assert "build trt-fp16, with " in stdout
    assert "of weights in a form of its own" in stdout
    assert "MB needed" in stdout
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_embedded_weights_needs_more(tiny: Checkpoint, tmp_path: Path) -> None:
    needed = {}
    for kind in ("external", "embedded"):
        arguments = ["--target", "trt-fp16", "--output", tmp_path / "release", "--engine-weights", kind]
        _, stdout, _ = run(*arguments, "--model", tiny.root, "--dry-run", "--json")
        needed[kind] = json.loads(stdout)["disk"]["needed_bytes"]
    assert needed["embedded"] - needed["external"] == tiny.nbytes


def test_the_flavor_is_found() -> None:
    assert find_flavor("rtx").name == "rtx"


# What parity finds.

Mutation = Callable[[ir.Model, Checkpoint, Path], None]


def constant(model: ir.Model, name: str, value: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(value, name=name)


def truth(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    pass


def alpha_rounded_to_bfloat16(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    for node in model.graph:
        if node.op_type == "MoEExpertsMXFP4":
            node.attributes["swiglu_alpha"] = ir.AttrFloat32("swiglu_alpha", 1.703125)


def window_off_by_one(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    constant(model, f"window_{checkpoint.config.sliding_window}", np.array(checkpoint.config.sliding_window + 1))


def yarn_truncated(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    assert checkpoint.config.yarn is not None
    config = replace(checkpoint.config, yarn=replace(checkpoint.config.yarn, truncate=True))
    constant(model, "rope.inv_freq", inverse_frequencies(config)[0].numpy())


def no_sinks(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    constant(model, "sink_position", np.array(-3))


def a_padding_key_seen(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Empty slots hold zeros, which no position of a text is."""
    constant(model, "position_0", np.array(-1))


def stored(checkpoint: Checkpoint, folder: Path, suffix: str, dtype: object) -> Iterator[np.ndarray]:
    """Every layer's tensor of this name in the artifact, writable."""
    for layer in range(checkpoint.config.num_layers):
        ref: TensorRef = checkpoint.tensors[f"model.layers.{layer}.{suffix}"]
        data = np.memmap(folder / "weights" / ref.file.name, np.dtype(dtype), "r+", offset=ref.offset, shape=ref.shape)
        yield data
        data.flush()


def sinks_scaled(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """By the factor of the scores."""
    for sinks in stored(checkpoint, folder, "self_attn.sinks", ml_dtypes.bfloat16):
        sinks[:] = (sinks.astype(np.float32) / math.sqrt(checkpoint.config.head_dim)).astype(ml_dtypes.bfloat16)


def gate_and_up_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    for kind, dtype in (("blocks", np.uint8), ("scales", np.uint8), ("bias", np.uint16)):
        for data in stored(checkpoint, folder, f"mlp.experts.gate_up_proj_{kind}", dtype):
            data[:, 0::2], data[:, 1::2] = data[:, 1::2].copy(), data[:, 0::2].copy()


def nibbles_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    for name in ("gate_up_proj", "down_proj"):
        for data in stored(checkpoint, folder, f"mlp.experts.{name}_blocks", np.uint8):
            data[:] = data >> 4 | data << 4


LIES = [
    alpha_rounded_to_bfloat16,
    window_off_by_one,
    yarn_truncated,
    no_sinks,
    a_padding_key_seen,
    sinks_scaled,
    gate_and_up_swapped,
    nibbles_swapped,
]


@pytest.fixture
def measured(
    tiny: Checkpoint, built: Build, yardstick: Yardstick, failing_texts: Callable[..., list[Case]], tmp_path: Path
) -> Callable[[Mutation], list[Case]]:
    """The gates that the graph of trt-fp32 does not keep once `mutate` had it, in every scenario."""

    def measure(mutate: Mutation) -> list[Case]:
        folder = tmp_path / "artifact"
        shutil.copytree(built("trt-fp32", FUNCTION)[0], folder, ignore=shutil.ignore_patterns("engine.plan"))
        model = ir.load(folder / "model.onnx")
        mutate(model, tiny, folder)
        ir.save(model, folder / "model.onnx")
        found = run_scenarios(open_graph(folder, None), yardstick.reference, effort="quick")
        return failing_texts(found, yardstick.reference, GATES["trt-fp32"].absolute, 0.0)

    return measure


@pytest.mark.parametrize("mutation", LIES, ids=lambda lie: lie.__name__)
def test_a_lie_about_the_network_fails(mutation: Mutation, measured: Callable[[Mutation], list[Case]]) -> None:
    expected = "settled positions of prefill", "max_kl_position"
    assert expected in {(case.where, case.gate) for case in measured(mutation)}


def test_the_truth_passes(measured: Callable[[Mutation], list[Case]]) -> None:
    assert not measured(truth)

"""Fifteen faults, each as small as such a fault is: a gate catches each, the bisection names layer and operation.

What each run found is printed as a matrix at the end.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.targets import TARGETS
from gptoss_export.engines.tensorrt.metadata import EngineMetadata, write_metadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.engines.tensorrt.target import open_graph, write_graph
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.model.gpt_oss import inverse_frequencies
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.validators.floor import measure_floor
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.parity import Subject, Yardstick, validate
from gptoss_export.validators.probes import default_probes
from gptoss_export.validators.reference import Reference, run_reference
from gptoss_export.validators.report.schema import Binding, Engine, ParityReport

Change = Callable[[ir.Model, Checkpoint, Path], object]


@dataclass(frozen=True)
class Fault:
    """op: how the finding begins. says: what its detail has to contain."""

    name: str
    change: Change
    layer: int | None
    op: str
    says: str = ""
    target: str = "ort-cpu"


def nodes(model: ir.Model, layer: int, op: str) -> list[ir.Node]:
    found = [
        n for n in model.graph if n.op_type == op and (n.outputs[0].name or "").startswith(f"model.layers.{layer}.")
    ]
    assert found, f"layer {layer} has no {op}"
    return found


def tensor(checkpoint: Checkpoint, folder: Path, name: str) -> np.memmap:
    """The bytes of a tensor in the artifact, writable, [.., bytes of the last dimension]."""
    ref = checkpoint.tensors[name]
    shape = (*ref.shape[:-1], ref.nbytes // math.prod(ref.shape[:-1]))
    return np.memmap(folder / "weights" / ref.file.name, np.uint8, "r+", offset=ref.offset, shape=shape)


def wrong_alpha(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """1.703125 for 1.702: what rounding alpha to bfloat16 gives."""
    (node,) = nodes(model, 1, "MoEExperts")
    node.attributes["swiglu_alpha"] = ir.AttrFloat32("swiglu_alpha", 1.703125)


def window_off_by_one(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    (node,) = nodes(model, 2, "SinkAttention")
    node.attributes["window"] = ir.AttrInt64("window", node.attributes["window"].as_int() + 1)


def sink_dropped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    sinks = tensor(checkpoint, folder, "model.layers.1.self_attn.sinks").view(ml_dtypes.bfloat16)
    sinks[:] = -1e30
    sinks.flush()


def sink_scaled(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """By the factor of the scores, which is not theirs."""
    sinks = tensor(checkpoint, folder, "model.layers.3.self_attn.sinks").view(ml_dtypes.bfloat16)
    sinks[:] = (sinks.astype(np.float32) * checkpoint.config.head_dim**-0.5).astype(ml_dtypes.bfloat16)
    sinks.flush()


def yarn_truncated(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    assert checkpoint.config.yarn is not None
    config = replace(checkpoint.config, yarn=replace(checkpoint.config.yarn, truncate=True))
    frequencies = model.graph.initializers["rope.inv_freq"]
    frequencies.const_value = ir.tensor(inverse_frequencies(config)[0].numpy(), name="rope.inv_freq")


def rope_interleaved(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    for node in nodes(model, 1, "RotaryEmbedding"):
        node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def gate_and_up_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    for kind, view in (("blocks", np.uint8), ("scales", np.uint8), ("bias", np.uint16)):
        data = tensor(checkpoint, folder, f"model.layers.2.mlp.experts.gate_up_proj_{kind}").view(view)
        data[:, 0::2], data[:, 1::2] = data[:, 1::2].copy(), data[:, 0::2].copy()


def nibbles_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    data = tensor(checkpoint, folder, "model.layers.3.mlp.experts.down_proj_blocks")
    data[:] = data >> 4 | data << 4


EXPERT = 6


def scale_off_by_one(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Twice one expert's down projection."""
    data = tensor(checkpoint, folder, "model.layers.1.mlp.experts.down_proj_scales")
    data[EXPERT] += 1


def bias_dropped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    tensor(checkpoint, folder, "model.layers.2.self_attn.v_proj.bias")[:] = 0


def cache_off_by_one(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """The last key that the window still sees is gone from the cache, as if it kept one token too few."""
    (node,) = nodes(model, 2, "SinkAttention")
    for index in (3, 4):
        node.replace_input_with(index, _forget(model, node, index, checkpoint.config.sliding_window - 2))


def _forget(model: ir.Model, node: ir.Node, index: int, kept: int) -> ir.Value:
    """The past with zeros for all but the last `kept` positions."""
    past, made = node.inputs[index], []

    def add(op: str, inputs: Sequence[ir.Value | None], **attributes: object) -> ir.Value:
        made.append(ir.node(op, inputs, attributes or None))
        made[-1].outputs[0].name = f"forget.{index}.{len(made)}"
        return made[-1].outputs[0]

    one = add("Constant", [], value_ints=[1])
    zero = add("Constant", [], value_ints=[0])
    axis = add("Constant", [], value_ints=[2])
    end = add("Constant", [], value_ints=[1 << 62])
    most = add("Constant", [], value_ints=[kept])
    length = add("Slice", [add("Shape", [past]), axis, add("Add", [axis, one])])
    edge = add("Max", [add("Sub", [length, most]), zero])
    old = add("Slice", [past, zero, edge, axis])
    nothing = add("Sub", [old, old])
    joined = add("Concat", [nothing, add("Slice", [past, edge, end, axis])], axis=2)
    for new in made:
        model.graph.insert_before(node, new)
    return joined


def embedding_of_one_token(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    token = default_probes(checkpoint, "quick")[0].ids[0]
    rows = tensor(checkpoint, folder, "model.embed_tokens.weight").view(ml_dtypes.bfloat16)
    rows[token] = rows[token].astype(np.float32) * 2
    rows.flush()


def norm_of_one_channel(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    tensor(checkpoint, folder, "model.norm.weight")[:2] = 0


def head_of_one_token(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    rows = tensor(checkpoint, folder, "lm_head.weight").view(ml_dtypes.bfloat16)
    rows[17] = rows[17].astype(np.float32) * 2
    rows.flush()


FAULTS = (
    Fault("wrong alpha", wrong_alpha, 1, "experts", "all experts"),
    Fault("window off by one", window_off_by_one, 2, "attention", "the window"),
    Fault("sink dropped", sink_dropped, 1, "attention", "the sinks"),
    Fault("sink scaled", sink_scaled, 3, "attention", "the sinks"),
    Fault("YaRN truncate", yarn_truncated, 0, "attention", "the rotation"),
    Fault("RoPE interleaved", rope_interleaved, 1, "attention", "the rotation"),
    Fault("gate and up swapped", gate_and_up_swapped, 2, "experts", "all experts"),
    Fault("nibbles swapped", nibbles_swapped, 3, "experts", "all experts"),
    Fault("one expert's scale", scale_off_by_one, 1, "experts", f"expert {EXPERT}:"),
    Fault("one bias dropped", bias_dropped, 2, "v_proj"),
    Fault("cache off by one", cache_off_by_one, 2, "attention", "its cache", "onnx"),
    Fault("one token's embedding", embedding_of_one_token, None, "embedding"),
    Fault("one channel of the last norm", norm_of_one_channel, None, "norm"),
    Fault("one token's row of lm_head", head_of_one_token, None, "lm_head"),
)


ENDS = {"embedding": "The embedding:", "norm": "The final norm:", "lm_head": "lm_head:"}


@pytest.fixture(scope="module")
def yardstick(run_of: Callable[[Effort], Reference]) -> Yardstick:
    return Yardstick(run_of("quick"), "quick", {})


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """The rows of what was found, printed when all faults are through, captured output or not."""
    rows = ["", "| fault | target | gates not kept | first | bisection |", "|---|---|---|---|---|"]
    yield rows
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(rows))


def copy_weights(checkpoint: Checkpoint, folder: Path) -> None:
    (folder / "weights").mkdir()
    for file in (*checkpoint.weight_files, *checkpoint.side_files):
        shutil.copyfile(file, folder / "weights" / file.name)


def subject(target: str, folder: Path, checkpoint: Checkpoint, runner: object) -> Subject:
    return Subject(
        target=target,
        runner=runner,
        inspector=TARGETS[target].inspect(folder, 1),
        checkpoint=checkpoint,
        engine=Engine("onnxruntime", "", "CPUExecutionProvider"),
        binding=Binding({}, {}),
    )


def judged(target: str, change: Change, checkpoint: Checkpoint, graph: ir.Model, folder: Path, yardstick: Yardstick):
    copy_weights(checkpoint, folder)
    model = graph.clone()
    change(model, checkpoint, folder)
    TARGETS[target].build(model, checkpoint, folder, "weights", BuildSettings())
    opened = subject(target, folder, checkpoint, TARGETS[target].open_runner(folder, 1))
    return validate(opened, yardstick, policy=GATES[target], with_bisection=True)


def row(name: str, target: str, report: ParityReport) -> str:
    first = report.verdict.failures[0]
    assert report.bisection is not None
    return (
        f"| {name} | {target} | {len(report.verdict.failures)} | {first.gate} in {first.where} "
        f"({first.measured}, limit {first.limit:.3g}) | {report.bisection.sentence} |"
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(
    fault: Fault, tiny: Checkpoint, tiny_graph: ir.Model, tmp_path: Path, yardstick: Yardstick, matrix: list[str]
) -> None:
    report = judged(fault.target, fault.change, tiny, tiny_graph, tmp_path, yardstick)
    assert not report.verdict.passed
    matrix.append(row(fault.name, fault.target, report))
    assert report.bisection is not None
    first = report.bisection.findings[0]
    assert (first.layer, first.op) == (fault.layer, fault.op), report.bisection.sentence
    assert first.detail.startswith(fault.says)
    named = f"Layer {fault.layer}, {fault.op}" if fault.layer is not None else ENDS[fault.op]
    assert report.bisection.sentence.startswith(named)
    if fault.layer is None:
        assert report.bisection.sentence.endswith("0 of 4 layers are beyond their gate.")
        assert len(report.bisection.findings) == 1


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_without_a_fault_nothing_is_caught_or_named(
    target: str, tiny: Checkpoint, tiny_graph: ir.Model, tmp_path: Path, yardstick: Yardstick
) -> None:
    report = judged(target, lambda *_: None, tiny, tiny_graph, tmp_path, yardstick)
    assert report.verdict.passed, report.verdict.failures
    assert report.bisection is not None and not report.bisection.findings
    assert report.bisection.sentence == "Every layer keeps its gate, and so does the whole."


@pytest.fixture(scope="module")
def loud(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same network in other numbers: layer 2 has values of 2 ** 16 times the size, and o_proj makes up for it."""
    folder = tmp_path_factory.mktemp("loud")
    shutil.copytree(tiny_dir, folder / "weights")
    checkpoint = open_checkpoint(folder / "weights")
    for name, factor in (("v_proj.weight", 2.0**16), ("v_proj.bias", 2.0**16), ("o_proj.weight", 2.0**-16)):
        data = tensor(checkpoint, folder, f"model.layers.2.self_attn.{name}").view(ml_dtypes.bfloat16)
        data[:] = (data.astype(np.float32) * factor).astype(ml_dtypes.bfloat16)
        data.flush()
    return open_checkpoint(folder / "weights")  # again: a file that changed since is refused


def test_an_overflow_of_float16_is_caught_and_named(
    loud: Checkpoint, tiny: Checkpoint, tiny_graph: ir.Model, tmp_path: Path, matrix: list[str]
) -> None:
    target, options = "trt-fp16", EngineOptions(flavor="rtx", plugin=False)
    copy_weights(loud, tmp_path)
    assert (loud.config, loud.layout) == (tiny.config, tiny.layout)
    inputs, _ = write_graph(Precision.FP16, tiny_graph, loud, tmp_path, "weights", BuildSettings(options))
    sizes = {name: getattr(options, name) for name in ("max_batch", "max_prompt", "max_context", "max_logits")}
    write_metadata(
        EngineMetadata("rtx", "1.7.1.116", ("8.0+",), "fp16", "external", **sizes, plugin=False,
                       engine_sha256="0" * 64, inputs=inputs),
        tmp_path,
    )  # fmt: skip
    reference = run_reference(loud, default_probes(loud, "quick"))
    floor = measure_floor(loud, reference, "float16")
    opened = subject(target, tmp_path, loud, open_graph(tmp_path, 1))
    report = validate(
        opened, Yardstick(reference, "quick", {"float16": floor}), policy=GATES[target], with_bisection=True
    )
    assert not report.verdict.passed
    matrix.append(row("float16 overflow", target, report))
    kept = {(failure.where, failure.gate) for failure in report.verdict.failures}
    assert ("range of layer 2 in float16", "min_headroom_bits") in kept
    assert ("range of layer 2 in float16", "saturated") in kept
    assert not any(where.startswith("range of layer 1 ") for where, _ in kept)
    assert report.bisection is not None
    first = report.bisection.findings[0]
    assert (first.layer, first.op, first.error) == (2, "v_proj", None), report.bisection.sentence
    assert "infinite or NaN in float16" in first.detail


def test_the_matrix_has_fifteen_rows(matrix: list[str]) -> None:
    assert len(matrix) == 3 + len(FAULTS) + 1 == 18

"""A gate that cannot fail is no gate: every small lie about the network must fail parity, and the truth must pass."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from gptoss_export.engines.build_info import BuildSettings
from gptoss_export.engines.ort import build
from gptoss_export.engines.ort.quantize import INT8_DIR, INT8_FILE, int8_matrices, plan_file
from gptoss_export.engines.ort.run import open_ort_runner
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.model.gpt_oss import inverse_frequencies
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.parity import Subject, Yardstick, validate
from gptoss_export.validators.reference import Reference
from gptoss_export.validators.report.schema import Binding, Engine
from gptoss_export.validators.scenario_run import run_scenarios
from gptoss_export.validators.verdict import Case, cases

Mutation = Callable[[ir.Model, Checkpoint, Path], ir.Model]


def alpha(model: ir.Model, *_: object) -> ir.Model:
    """1.702 -> 1.703125, which is what rounding alpha to bfloat16 gives."""
    for node in model.graph:
        if node.op_type == "MoEExperts":
            node.attributes["swiglu_alpha"] = ir.AttrFloat32("swiglu_alpha", 1.703125)
    return model


def window(model: ir.Model, *_: object) -> ir.Model:
    """One key too many."""
    for node in model.graph:
        if node.op_type == "SinkAttention" and node.attributes["window"].as_int():
            node.attributes["window"] = ir.AttrInt64("window", node.attributes["window"].as_int() + 1)
    return model


def stored(checkpoint: Checkpoint, folder: Path, suffix: str) -> Iterator[np.memmap]:
    """The bytes of every layer's tensor of this name in the artifact, writable, [.., bytes of the last dimension].

    A change to the weights is seen by every operator, function body and kernel alike.
    """
    for n in range(checkpoint.config.num_layers):
        tensor = checkpoint.tensors[f"model.layers.{n}.{suffix}"]
        file = folder / "weights" / tensor.file.name
        shape = (*tensor.shape[:-1], tensor.nbytes // math.prod(tensor.shape[:-1]))
        data = np.memmap(file, np.uint8, "r+", offset=tensor.offset, shape=shape)
        yield data
        data.flush()


def sinks_scaled(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> ir.Model:
    """The factor of the scores applied to the sinks as well."""
    for data in stored(checkpoint, folder, "self_attn.sinks"):
        sinks = data.view(ml_dtypes.bfloat16)
        sinks[:] = (sinks.astype(np.float32) * checkpoint.config.head_dim**-0.5).astype(ml_dtypes.bfloat16)
    return model


def gate_and_up_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> ir.Model:
    for name in ("blocks", "scales"):
        for data in stored(checkpoint, folder, f"mlp.experts.gate_up_proj_{name}"):
            data[:, 0::2], data[:, 1::2] = data[:, 1::2].copy(), data[:, 0::2].copy()
    for data in stored(checkpoint, folder, "mlp.experts.gate_up_proj_bias"):
        bias = data.view(np.uint16)
        bias[:, 0::2], bias[:, 1::2] = bias[:, 1::2].copy(), bias[:, 0::2].copy()
    return model


def nibbles_swapped(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> ir.Model:
    for name in ("gate_up_proj", "down_proj"):
        for data in stored(checkpoint, folder, f"mlp.experts.{name}_blocks"):
            data[:] = data >> 4 | data << 4
    return model


def yarn_truncated(model: ir.Model, checkpoint: Checkpoint, *_: object) -> ir.Model:
    assert checkpoint.config.yarn is not None
    config = replace(checkpoint.config, yarn=replace(checkpoint.config.yarn, truncate=True))
    frequencies = model.graph.initializers["rope.inv_freq"]
    frequencies.const_value = ir.tensor(inverse_frequencies(config)[0].numpy(), name="rope.inv_freq")
    return model


def truth(model: ir.Model, *_: object) -> ir.Model:
    return model


INT8 = "ort-cpu-int8"


@pytest.fixture(scope="module")
def reference(run_of: Callable[[Effort], Reference]) -> Reference:
    return run_of("quick")


Failures = Callable[[Path, Runner, str], list[Case]]


@pytest.fixture
def failures(tiny: Checkpoint, reference: Reference, failing_texts: Callable[..., list[Case]]) -> Failures:
    """The gates that were not kept: of texts alone, and all of them where weights are rounded, which texts do not tell
    from small faults."""

    def run(folder: Path, runner: Runner, target: str) -> list[Case]:
        gates = GATES[target]
        if target != INT8:
            return failing_texts(run_scenarios(runner, reference, effort="quick"), reference, gates.absolute, 0.0)
        inspector, engine = TARGETS[target].inspect(folder, 1), Engine("onnxruntime", "", "CPUExecutionProvider")
        subject = Subject(target, runner, inspector, tiny, engine, Binding({}, {}))
        report = validate(subject, Yardstick(reference, "quick", {}), policy=gates)
        return [case for case in cases(report.evidence, report.gates) if not case.kept]

    return run


@pytest.fixture
def judged(tiny: Checkpoint, tiny_graph: ir.Model, failures: Failures, tmp_path: Path) -> Callable[..., list[Case]]:
    """Builds what `mutate` gives, has `damage` at the artifact, and compares it with the reference."""

    def run(target: str, mutate: Mutation, damage: Callable[[Path], None] | None = None) -> list[Case]:
        (tmp_path / "weights").mkdir()
        for file in tiny.weight_files:
            (tmp_path / "weights" / file.name).write_bytes(file.read_bytes())
        TARGETS[target].build(mutate(tiny_graph.clone(), tiny, tmp_path), tiny, tmp_path, "weights", BuildSettings())
        if damage is not None:
            damage(tmp_path)
        return failures(tmp_path, TARGETS[target].open_runner(tmp_path, 1), target)

    return run


ORT_TARGETS = [name for name in TARGETS if not name.startswith("trt-")]
"""The lowered graphs of the others are mutated in test_trt_target.py, where they need no engine."""

MUTATIONS = [alpha, window, sinks_scaled, gate_and_up_swapped, nibbles_swapped, yarn_truncated]


# Alpha rounded to bfloat16 changes less than weights rounded to int8 do.
FAILING = [(target, m) for target in ORT_TARGETS for m in MUTATIONS if (target, m) != (INT8, alpha)]


@pytest.mark.parametrize(("target", "mutation"), FAILING, ids=lambda v: getattr(v, "__name__", v))
def test_a_mutation_fails(target: str, mutation: Mutation, judged: Callable[[str, Mutation], list[Case]]) -> None:
    where = "routing replay" if target == INT8 else "settled positions of prefill"
    gate = "max_kl_mean" if target == INT8 else "max_kl_position"
    assert (where, gate) in {(case.where, case.gate) for case in judged(target, mutation)}


@pytest.mark.parametrize("target", ORT_TARGETS)
def test_the_truth_passes(target: str, judged: Callable[[str, Mutation], list[Case]]) -> None:
    assert not judged(target, truth)


def int8_tensor(tiny: Checkpoint, folder: Path, name: str) -> np.memmap:
    """A tensor of the int8 file in the artifact, writable."""
    ref = plan_file(int8_matrices(tiny), folder / INT8_DIR / INT8_FILE).tensors[name]
    kind = np.int8 if ref.dtype == "I8" else ml_dtypes.bfloat16
    return np.memmap(ref.file, np.dtype(kind), "r+", offset=ref.offset, shape=ref.shape)


@pytest.mark.parametrize("layer", [2, 3])
def test_rows_of_q_that_are_off_by_one_fail(layer: int, tiny: Checkpoint, judged: Callable[..., list[Case]]) -> None:
    def shift(folder: Path) -> None:
        weight = int8_tensor(tiny, folder, f"model.layers.{layer}.self_attn.qkv_proj.weight_int8")
        weight[:256] = np.roll(weight[:256], 1, axis=0)
        weight.flush()

    assert judged(INT8, truth, shift)


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.qkv_proj", "model.layers.2.self_attn.o_proj", "lm_head"])
def test_scales_that_are_off_by_a_twentieth_fail(
    name: str, tiny: Checkpoint, judged: Callable[..., list[Case]]
) -> None:
    def scale(folder: Path) -> None:
        scales = int8_tensor(tiny, folder, f"{name}.weight_scales")
        scales[:] = (scales.astype(np.float32) * 1.05).astype(ml_dtypes.bfloat16)
        scales.flush()

    assert judged(INT8, truth, scale)


def test_without_our_kernels_ort_cpu_keeps_the_exact_gates(
    judged: Callable[[str, Mutation], list[Case]],
    failures: Failures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "kernels_work", lambda: "not in this test")
    judged("ort-cpu", truth)
    runner = open_ort_runner(tmp_path, "CPUExecutionProvider", 1, kernels=False)
    assert not failures(tmp_path, runner, "onnx")

"""A gate that cannot fail is no gate: every small lie about the network must fail parity, and the truth must pass."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter import ops
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.model.gpt_oss import inverse_frequencies
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.parity import validate
from gptoss_export.validators.probes import default_probes
from gptoss_export.validators.reference import Reference, run_reference
from gptoss_export.validators.report.schema import Binding, Engine, ParityReport

Mutation = Callable[[ir.Model, Checkpoint, Path, pytest.MonkeyPatch], ir.Model]


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


def sinks_scaled(model: ir.Model, checkpoint: Checkpoint, folder: Path, _: pytest.MonkeyPatch) -> ir.Model:
    """The factor of the scores applied to the sinks as well; done to the weights, so that any operator sees it."""
    for n in range(checkpoint.config.num_layers):
        tensor = checkpoint.tensors[f"model.layers.{n}.self_attn.sinks"]
        file = np.memmap(folder / "weights" / tensor.file.name, np.uint8, "r+")
        sinks = file[tensor.offset : tensor.offset + tensor.nbytes].view(ml_dtypes.bfloat16)
        sinks[:] = (sinks.astype(np.float32) * checkpoint.config.head_dim**-0.5).astype(ml_dtypes.bfloat16)
        file.flush()
    return model


def with_experts(model: ir.Model, monkeypatch: pytest.MonkeyPatch, experts: ops.Op) -> ir.Model:
    monkeypatch.setattr(ops, "OPS", tuple(experts if op.name == experts.name else op for op in ops.OPS))
    return ir.Model(model.graph, ir_version=model.ir_version, functions=ops.functions_of(model.graph))


def gate_and_up_swapped(model: ir.Model, _: Checkpoint, __: Path, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    op = next(op for op in ops.OPS if op.name == "MoEExperts")
    body = op.body.replace("Gather <axis = 2> (pairs, first)", "Gather <axis = 2> (pairs, third)")
    body = body.replace("Gather <axis = 2> (pairs, second)", "Gather <axis = 2> (pairs, first)")
    body = body.replace("(pairs, third)", "(pairs, second)")
    assert body != op.body
    return with_experts(model, monkeypatch, replace(op, body=body))


def nibbles_swapped(model: ir.Model, _: Checkpoint, __: Path, monkeypatch: pytest.MonkeyPatch) -> ir.Model:
    op = next(op for op in ops.OPS if op.name == "MoEExperts")
    constants = {**op.constants, "byte_table": np.ascontiguousarray(op.constants["byte_table"][:, ::-1])}
    return with_experts(model, monkeypatch, replace(op, constants=constants))


def yarn_truncated(model: ir.Model, checkpoint: Checkpoint, *_: object) -> ir.Model:
    assert checkpoint.config.yarn is not None
    config = replace(checkpoint.config, yarn=replace(checkpoint.config.yarn, truncate=True))
    frequencies = model.graph.initializers["rope.inv_freq"]
    frequencies.const_value = ir.tensor(inverse_frequencies(config)[0].numpy(), name="rope.inv_freq")
    return model


def truth(model: ir.Model, *_: object) -> ir.Model:
    return model


@pytest.fixture(scope="module")
def reference(tiny: Checkpoint) -> Reference:
    return run_reference(tiny, default_probes(tiny, "quick"))


@pytest.fixture
def judged(
    tiny: Checkpoint, tiny_graph: ir.Model, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Mutation], ParityReport]:
    def run(target: str, mutate: Mutation) -> ParityReport:
        (tmp_path / "weights").mkdir()
        for file in tiny.weight_files:
            (tmp_path / "weights" / file.name).write_bytes(file.read_bytes())
        mutated = mutate(tiny_graph.clone(), tiny, tmp_path, monkeypatch)
        TARGETS[target].build(mutated, tiny, tmp_path, "weights")
        return validate(
            TARGETS[target].open_runner(tmp_path, 1),
            reference,
            target=target,
            effort="quick",
            gates=GATES[target],
            binding=Binding({}, {}),
            engine_description=Engine("onnxruntime", "", "CPUExecutionProvider"),
        )

    return run


MUTATIONS = [alpha, window, sinks_scaled, gate_and_up_swapped, nibbles_swapped, yarn_truncated]


@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.__name__)
def test_a_mutation_fails(target: str, mutation: Mutation, judged: Callable[[str, Mutation], ParityReport]) -> None:
    report = judged(target, mutation)
    assert not report.verdict.passed
    prefill = next(s for s in report.scenarios if s.name == "prefill").metrics
    assert prefill.kl_mean is not None and prefill.kl_mean > 10 * GATES[target].max_kl_mean


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_truth_passes(target: str, judged: Callable[[str, Mutation], ParityReport]) -> None:
    report = judged(target, truth)
    assert report.verdict.passed, report.verdict.failures

"""The canonical graph: its interface, its size, its weights by reference, and what refuses to build."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxsim
import pytest
import torch

from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.graph.assemble import assemble
from gptoss_export.exporter.graph.bind import bind
from gptoss_export.exporter.graph.build import build_graph
from gptoss_export.exporter.graph.simplify import simplify
from gptoss_export.exporter.graph.trace import trace
from gptoss_export.exporter.ops import DOMAIN


def test_interface(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    layers = range(tiny.config.num_layers)
    cache = [f"{n}.{part}" for n in layers for part in ("key", "value")]
    inputs = {v.name: [str(d) for d in v.shape or ()] for v in tiny_graph.graph.inputs}
    assert list(inputs) == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{name}" for name in cache),
        "num_logits_to_keep",
    ]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs["past_key_values.3.value"] == ["batch_size", "2", "past_sequence_length", "32"]
    outputs = {v.name: [str(d) for d in v.shape or ()] for v in tiny_graph.graph.outputs}
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert outputs["logits"] == ["batch_size", "kept_length", "2048"]
    assert outputs["present.0.key"] == ["batch_size", "2", "total_sequence_length", "32"]


def test_about_a_dozen_nodes_a_layer(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    for n in range(tiny.config.num_layers):
        nodes = [node for node in tiny_graph.graph if (node.name or "").startswith(f"model.layers.{n}.")]
        assert len(nodes) <= 15
        ours = Counter(node.op_type for node in nodes if node.domain == DOMAIN)
        assert ours == {"Linear": 4, "SinkAttention": 1, "MoERouter": 1, "MoEExperts": 1}


def test_layers_differ_in_their_window_only(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    windows = [n.attributes["window"].as_int() for n in tiny_graph.graph if n.op_type == "SinkAttention"]
    assert windows == [tiny.config.sliding_window, 0] * 2


def test_every_weight_is_there_and_none_has_data(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    weights = {name: v for name, v in tiny_graph.graph.initializers.items() if v.const_value is None}
    assert weights.keys() == tiny.tensors.keys()
    small = [v for v in tiny_graph.graph.initializers.values() if v.const_value is not None]
    assert sum(v.const_value.nbytes for v in small if v.const_value is not None) < 1024


def test_no_weight_is_read_through_a_node_that_could_be_folded(tiny_graph: ir.Model) -> None:
    """A cast or transpose of a large weight in the graph would be a float copy of it in every runtime."""
    for node in tiny_graph.graph:
        for value in node.inputs:
            if value is not None and value.is_initializer() and value.const_value is None and node.domain != DOMAIN:
                assert node.op_type == "Gather" or (value.shape is not None and len(value.shape) == 1), node


@pytest.mark.parametrize("layout", Layout)
def test_bound_tensors_are_the_checkpoints(
    layout: Layout, tiny: Checkpoint, tiny_graph: ir.Model, tiny_layouts: dict[Layout, Path], tmp_path: Path
) -> None:
    """Through the saved file and onnx's own loader: offsets, row ranges of stacked tensors, types and shapes."""
    checkpoint = open_checkpoint(tiny_layouts[layout])
    model = tiny_graph.clone() if layout is tiny.layout else build_graph(checkpoint.config, layout)
    (tmp_path / "weights").mkdir()
    for file in checkpoint.weight_files:
        (tmp_path / "weights" / file.name).write_bytes(file.read_bytes())
    bind(model, {"weights": checkpoint.tensors})
    ir.save(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").stat().st_size < 100_000
    loaded = {i.name: i for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, tensor in checkpoint.tensors.items():
        stored = onnx.numpy_helper.to_array(loaded[name])
        assert stored.shape == tensor.shape
        assert stored.tobytes() == read_tensor(tensor).tobytes(), name


def test_same_config_same_bytes(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    def content(model: ir.Model) -> bytes:
        model = model.clone()
        bind(model, {"weights": tiny.tensors})
        return ir.serde.serialize_model(model).SerializeToString(deterministic=True)

    again = build_graph(tiny.config, tiny.layout)
    assert content(again) == content(tiny_graph)
    # torch writes the traced source lines and their paths into metadata.
    assert b".py" not in content(tiny_graph)


def test_any_sequence_of_layer_kinds(tiny: Checkpoint) -> None:
    config = replace(tiny.config, num_layers=3, layer_types=("full_attention",) * 3)
    model = build_graph(config, tiny.layout)
    assert [n.attributes["window"].as_int() for n in model.graph if n.op_type == "SinkAttention"] == [0, 0, 0]


@pytest.mark.parametrize("change", ["missing in checkpoint", "missing in graph", "shape", "dtype"])
def test_bind_refuses_another_checkpoint(tiny: Checkpoint, tiny_graph: ir.Model, change: str) -> None:
    name = "model.layers.2.self_attn.sinks"
    tensors = dict(tiny.tensors)
    if change == "missing in checkpoint":
        del tensors[name]
    elif change == "missing in graph":
        tensors["model.layers.9.self_attn.sinks"] = replace(tensors[name], name="model.layers.9.self_attn.sinks")
    elif change == "shape":
        tensors[name] = replace(tensors[name], shape=(4, 2))
    else:
        tensors[name] = replace(tensors[name], dtype="U8")
    with pytest.raises(GraphError, match="sinks"):
        bind(tiny_graph.clone(), {"weights": tensors})


def test_simplify_notices_a_touched_weight(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    model = assemble(trace(tiny.config, tiny.layout), tiny.config)
    honest = onnxsim.simplify

    def cast_added(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
        proto, ok = honest(proto)
        weight = "model.layers.1.self_attn.q_proj.weight"
        proto.graph.node.insert(0, onnx.helper.make_node("Cast", [weight], ["copy"], to=1))
        return proto, ok

    monkeypatch.setattr(onnxsim, "simplify", cast_added)
    with pytest.raises(GraphError, match="weight"):
        simplify(model)


def test_untraceable_is_a_graph_error(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no decomposition\nand twenty lines more")

    monkeypatch.setattr(torch.export, "export", broken)
    with pytest.raises(GraphError, match="could not trace GptOss: no decomposition") as caught:
        trace(tiny.config, tiny.layout)
    assert "\n" not in caught.value.what

"""The surgery on graphs, without running any: what is found, what is left, and that it is ONNX."""

from __future__ import annotations

from itertools import pairwise

import onnx
import onnx_ir as ir
import pytest

from gptoss_export.engines.inspector import OPS
from gptoss_export.engines.ort import taps
from gptoss_export.engines.ort.anatomy import count_layers, find_layer, narrowest, num_experts, vocab_size
from gptoss_export.engines.ort.fuse_qkv import fuse_qkv
from gptoss_export.engines.ort.share_cache import share_cache
from gptoss_export.engines.ort.shared_cache import WINDOWS_KEY
from gptoss_export.engines.tensorrt.lower import lower
from gptoss_export.engines.tensorrt.precision import Precision
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.graph.simplify import weightless_proto


@pytest.fixture(params=["canonical", "ort-cpu", "external", "embedded"])
def model(request: pytest.FixtureRequest, tiny_graph: ir.Model) -> ir.Model:
    graph = tiny_graph.clone()
    if request.param == "canonical":
        return graph
    if request.param == "ort-cpu":
        return share_cache(fuse_qkv(graph))
    return lower(graph, Precision.FP16, slots=128, external_weights=request.param == "external")


def token_rows(model: ir.Model) -> bool:
    return any(value.name == "logit_rows" for value in model.graph.inputs)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(weightless_proto(model), full_check=True)


def names(values: object) -> set[str]:
    return {value.name for value in values}  # type: ignore[attr-defined]


def test_where_things_are(model: ir.Model) -> None:
    assert (count_layers(model), num_experts(model), vocab_size(model)) == (4, 16, 2048)
    layers = [find_layer(model.graph, n) for n in range(4)]
    for n, layer in enumerate(layers):
        assert tuple(layer.ops) == tuple(op for op in OPS if op != "router")
        assert layer.moe.op_type.startswith("MoEExperts")
        for name, value in layer.ops.items():
            assert str(value.name).startswith(f"model.layers.{n}.")
            if name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                producer = value.producer()
                assert producer is not None and f"model.layers.{n}.self_attn.{name}.weight" in names(producer.inputs)
            narrow = token_rows(model) and name != "experts"
            assert narrowest(value) == ("float16" if narrow else "float32")
    for before, after in pairwise(layers):
        assert before.output is after.hidden


@pytest.mark.parametrize("replay", [False, True])
def test_the_whole_model_keeps_its_interface(model: ir.Model, replay: bool) -> None:
    inputs, outputs = list(model.graph.inputs), list(model.graph.outputs)
    tapped = taps.tap_model(model, replay=replay, token_rows=token_rows(model))
    check(model)
    assert list(model.graph.inputs)[: len(inputs)] == inputs
    assert names(list(model.graph.inputs)[len(inputs) :]) == set(tapped.tables)
    assert list(model.graph.outputs)[: len(outputs)] == outputs
    shown = [name for layer in tapped.taps for name in layer.values()]
    assert names(list(model.graph.outputs)[len(outputs) :]) == set(shown)
    assert len(set(shown)) == 8
    assert tapped.tables == ((taps.TOKENS, taps.REPLAY) if replay else (taps.TOKENS,))


@pytest.mark.parametrize("index", [0, 3])
def test_of_a_cut_layer_is_left(model: ir.Model, index: int) -> None:
    before = {name for name in model.graph.initializers if name.startswith("model.")} | names(model.graph.inputs)
    tapped = taps.cut_layer(model, index, token_rows=token_rows(model))
    check(model)
    left = {*model.graph.initializers, *names(model.graph.inputs)}
    own = {name for name in before if name.startswith((f"model.layers.{index}.", f"past_key_values.{index}."))}
    assert own <= left
    assert not any(name in left for name in before - own if name.startswith(("model.", "lm_head", "past_key_values.")))
    assert {taps.HIDDEN, taps.RESIDUAL} <= names(model.graph.inputs)
    first, key, value, *_ = model.graph.outputs
    assert (key.name, value.name) == (f"present.{index}.key", f"present.{index}.value")
    assert first.name not in tapped.taps[0].values()
    assert set(tapped.taps[0].values()) <= names(model.graph.outputs)
    assert all(value.dtype != ir.DataType.FLOAT16 for value in model.graph.outputs if "present" not in str(value.name))


def test_of_cut_ends_is_left(model: ir.Model) -> None:
    logits = model.graph.outputs[0].name
    tapped = taps.cut_ends(model, token_rows=token_rows(model))
    check(model)
    left = {*model.graph.initializers, *names(model.graph.inputs)}
    assert {taps.TOKENS, taps.HIDDEN, "model.embed_tokens.weight", "model.norm.weight"} <= left
    assert any(name.startswith("lm_head") for name in left)
    assert not any(name.startswith("model.layers.") and not name.startswith("model.layers.0.") for name in left)
    assert not any("experts" in name or "router" in name for name in left)
    assert [value.name for value in model.graph.outputs[:3]] == [logits, "present.0.key", "present.0.value"]
    assert set(tapped.taps[0].values()) == names(model.graph.outputs[3:]) and len(tapped.taps[0]) == 2


def test_the_window_is_the_layers(tiny_graph: ir.Model) -> None:
    model = share_cache(fuse_qkv(tiny_graph.clone()))
    for index, window in enumerate(("16", "0", "16", "0")):
        cut = model.clone()
        taps.cut_layer(cut, index, token_rows=False)
        assert cut.metadata_props[WINDOWS_KEY] == window
    model.metadata_props[WINDOWS_KEY] = "16,0"
    with pytest.raises(GraphError, match="window of layer 2"):
        taps.cut_layer(model, 2, token_rows=False)


def test_a_graph_of_somebody_else() -> None:
    x, y = (ir.val(name, ir.DataType.FLOAT, (1,)) for name in "xy")
    graph = ir.Graph([x], [y], nodes=[ir.Node("", "Neg", [x], outputs=[y])], opset_imports={"": 23})
    with pytest.raises(GraphError, match="no layer"):
        count_layers(ir.Model(graph, ir_version=11))

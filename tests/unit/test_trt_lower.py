"""The graph that TensorRT builds: its interface, which type every number has, and where weights are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir
import pytest

from gptoss_export.engines.tensorrt.cache import slots_for
from gptoss_export.engines.tensorrt.dense import is_dense
from gptoss_export.engines.tensorrt.lower import EMBEDDING, is_external, lower
from gptoss_export.engines.tensorrt.precision import LOWEST, Precision
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import GraphError
from gptoss_export.exporter.graph.simplify import weightless_proto
from gptoss_export.exporter.ops import DOMAIN

SLOTS = slots_for(300)
MOST_CONSTANT_BYTES = 64 << 10
INT64 = ["input_ids", "query_positions", "key_positions", "write_index", "logit_rows"]

Key = tuple[Precision, bool]


@pytest.fixture(scope="module")
def lowered(tiny_graph: ir.Model) -> Mapping[Key, ir.Model]:
    """By precision, and whether weights are external."""
    keys = [(precision, external) for precision in Precision for external in (True, False)]
    return {key: lower(tiny_graph.clone(), key[0], slots=SLOTS, external_weights=key[1]) for key in keys}


@pytest.fixture(params=list(Precision), ids=lambda p: p.value)
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


@pytest.fixture
def model(precision: Precision, lowered: Mapping[Key, ir.Model]) -> ir.Model:
    return lowered[precision, True]


@pytest.fixture(scope="module")
def types(lowered: Mapping[Key, ir.Model]) -> Mapping[Precision, Mapping[str, str]]:
    """The type of every value of the graph, as ONNX infers it from the inputs alone."""
    found = {}
    for precision in Precision:
        proto = weightless_proto(lowered[precision, True])
        del proto.graph.value_info[:]
        graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
        values = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
        kinds = [v.data_type if isinstance(v, onnx.TensorProto) else v.type.tensor_type.elem_type for v in values]
        names = {v.name: onnx.TensorProto.DataType.Name(kind) for v, kind in zip(values, kinds, strict=True)}
        assert names.keys() >= {value.name for node in lowered[precision, True].graph for value in node.outputs}
        found[precision] = names
    return found


@pytest.fixture
def type_of(precision: Precision, types: Mapping[Precision, Mapping[str, str]]) -> Mapping[str, str]:
    return types[precision]


def nodes(model: ir.Model, *names: str) -> Iterator[ir.Node]:
    found = [node for node in model.graph if node.op_type in names]
    assert found, f"no {names} in the graph"
    yield from found


def kinds(node: ir.Node, type_of: Mapping[str, str]) -> set[str]:
    """The types of what a node reads and writes."""
    return {type_of[str(value.name)] for value in (*node.inputs, *node.outputs) if value is not None}


def test_inputs(model: ir.Model, precision: Precision, tiny: Checkpoint) -> None:
    config, inputs = tiny.config, list(model.graph.inputs)
    shapes = {v.name: [str(d) for d in v.shape or ()] for v in inputs}
    cache = [f"past_key_values.{n}.{part}" for n in range(config.num_layers) for part in ("key", "value")]
    assert [v.name for v in inputs[: 5 + len(cache)]] == [*INT64, *cache]
    assert {v.name for v in inputs[5 + len(cache) :]} == {name for name in tiny.tensors if is_external(name)}
    assert all(v.dtype == ir.DataType.INT64 for v in inputs[:5])
    assert list(shapes.values())[:5] == [
        ["batch_size", "sequence_length"],
        ["batch_size", "sequence_length"],
        ["batch_size", "read_slots"],
        ["batch_size"],
        ["logit_count"],
    ]
    for value in inputs[5 : 5 + len(cache)]:
        assert value.dtype == ir.DataType[precision.onnx_type]
        assert shapes[value.name] == ["batch_size", str(config.num_kv_heads), str(SLOTS), str(config.head_dim)]


def test_outputs(model: ir.Model, precision: Precision, tiny: Checkpoint) -> None:
    config, (logits, *presents) = tiny.config, model.graph.outputs
    assert (logits.name, logits.dtype) == ("logits", ir.DataType.FLOAT)
    assert [str(d) for d in logits.shape or ()] == ["logit_count", str(config.vocab_size)]
    names = [f"present.{n}.{part}" for n in range(config.num_layers) for part in ("key", "value")]
    assert [v.name for v in presents] == names
    for value in presents:
        assert value.dtype == ir.DataType[precision.onnx_type]
        shape = ["batch_size", str(config.num_kv_heads), str(SLOTS), str(config.head_dim)]
        assert [str(d) for d in value.shape or ()] == shape


def test_versions(model: ir.Model) -> None:
    assert dict(model.opset_imports) == {"": 24, DOMAIN: 1}
    assert model.ir_version >= 12
    assert [key[:2] for key in model.functions] == [(DOMAIN, "MoEExpertsMXFP4")]
    assert all(function.opset_imports[""] == 24 for function in model.functions.values())


def test_onnx_accepts_it(lowered: Mapping[Key, ir.Model]) -> None:
    for model in lowered.values():
        onnx.checker.check_model(weightless_proto(model), full_check=True)


def test_the_types_that_lowering_writes_down_are_those_that_follow(model: ir.Model, type_of: Mapping[str, str]) -> None:
    """The emulation goes by them."""
    for node in model.graph:
        for value in node.outputs:
            assert value.dtype is None or value.dtype.name == type_of[str(value.name)], value.name


def test_what_is_float32_in_every_precision(model: ir.Model, type_of: Mapping[str, str], tiny: Checkpoint) -> None:
    layers = tiny.config.num_layers
    counts = {"RMSNormalization": 2 * layers + 1, "RotaryEmbedding": 2 * layers, "Softmax": layers, "Add": 2 * layers}
    for operator, count in counts.items():
        found = list(nodes(model, operator))
        assert len(found) == count
        assert all(kinds(node, type_of) == {"FLOAT"} for node in found), operator
    for node in nodes(model, "TopK"):
        assert [type_of[str(v.name)] for v in (node.inputs[0], *node.outputs)] == ["FLOAT", "FLOAT", "INT64"]
    for node in nodes(model, "Cos", "Sin"):
        assert kinds(node, type_of) == {"FLOAT"}


def test_matrices_are_of_the_targets_type_and_the_router_is_not(
    model: ir.Model, precision: Precision, type_of: Mapping[str, str], tiny: Checkpoint
) -> None:
    by_kind: dict[bool, list[set[str]]] = {True: [], False: []}
    for node in nodes(model, "Gemm"):
        by_kind[".router." in str(node.name)].append(kinds(node, type_of))
    layers = tiny.config.num_layers
    assert by_kind[True] == [{"FLOAT"}] * layers
    assert by_kind[False] == [{precision.onnx_type}] * (4 * layers + 1)


def test_attention_and_cache_are_of_the_targets_type(
    model: ir.Model, precision: Precision, type_of: Mapping[str, str]
) -> None:
    for node in nodes(model, "Attention"):
        assert kinds(node, type_of) == {precision.onnx_type}
        assert len(node.inputs) == 4
    for node in nodes(model, "TensorScatter", "Slice"):
        assert kinds(node, type_of) == {precision.onnx_type, "INT64"}


def test_nothing_else_has_a_narrow_type(model: ir.Model, precision: Precision, type_of: Mapping[str, str]) -> None:
    """Beside matrices, attention and what moves their operands: the masks, and x of the experts."""
    narrow = {"FLOAT16", "BFLOAT16"}
    movers = {"Reshape", "Transpose", "Cast", "TensorScatter", "Slice", "Gather", "Where"}
    readers = {node.op_type for node in model.graph if kinds(node, type_of) & narrow}
    assert readers <= movers | {"Gemm", "Attention", "MoEExpertsMXFP4"}
    other = narrow - {precision.onnx_type}
    for node in model.graph:
        for value in node.outputs:
            # The embedding's rows are read as stored.
            assert type_of[str(value.name)] not in other or value.producer().op_type == "Gather"


def test_no_cast_rounds_what_stays_float32(model: ir.Model, type_of: Mapping[str, str]) -> None:
    """A residual stream that goes through 16 bits and back would still add up in float32."""
    for node in nodes(model, "Add", "RMSNormalization"):
        for value in node.inputs:
            assert value is not None
            producer = value.producer()
            if producer is None or producer.op_type != "Cast":
                continue
            source = producer.inputs[0]
            assert source is not None
            before = source.producer()
            assert before is None or before.op_type in ("Gemm", "Gather"), f"{value.name} from {source.name}"


def test_every_matrix_reads_the_weight_of_its_name(model: ir.Model, tiny: Checkpoint) -> None:
    read = {str(node.inputs[1].name) for node in nodes(model, "Gemm") if ".router." not in str(node.name)}
    assert read == {name for name in tiny.tensors if is_dense(name) and name.endswith("weight")}
    assert all(node.attributes["transB"].as_int() == 1 for node in nodes(model, "Gemm"))


def test_experts_are_the_plugins(
    model: ir.Model, precision: Precision, type_of: Mapping[str, str], tiny: Checkpoint
) -> None:
    found = list(nodes(model, "MoEExpertsMXFP4"))
    assert len(found) == tiny.config.num_layers
    for layer, node in enumerate(found):
        assert node.domain == DOMAIN
        assert node.attributes["plugin_namespace"].as_string() == "com.gptoss"
        assert node.attributes["plugin_version"].as_string() == "1"
        assert node.attributes["swiglu_alpha"].as_float() == pytest.approx(tiny.config.swiglu_alpha, rel=1e-7)
        assert node.attributes["swiglu_limit"].as_float() == tiny.config.swiglu_limit
        assert len(node.attributes) == 4
        stored = [f"{part}_{kind}" for part in ("gate_up_proj", "down_proj") for kind in ("blocks", "scales", "bias")]
        names = [str(value.name) for value in node.inputs[3:] if value is not None]
        assert names == [f"model.layers.{layer}.mlp.experts.{name}" for name in stored]
        assert [type_of[str(value.name)] for value in node.inputs if value is not None] == [
            precision.onnx_type,
            "FLOAT",
            "INT32",
            *["INT8", "INT8", "BFLOAT16"] * 2,
        ]
        assert type_of[str(node.outputs[0].name)] == "FLOAT"


def test_windows(model: ir.Model, tiny: Checkpoint) -> None:
    """Every other layer sees the window; the masks of a kind are made once."""
    masks = [str(node.inputs[2].name) for node in nodes(model, "Where") if str(node.name).endswith(".mask")]
    assert masks == ["window_16_bias", "full_bias"] * (tiny.config.num_layers // 2)
    assert tiny.config.sliding_window == 16
    assert Counter(node.name for node in nodes(model, "Less")) == {"window_16.near": 1}
    window = model.graph.initializers["window_16"].const_value
    assert window is not None
    assert int(window.numpy()) == 16


def test_constants_of_the_masks(model: ir.Model, precision: Precision) -> None:
    values = {name: model.graph.initializers[name].const_value for name in ("visible", "masked", "sink_position")}
    found = {name: float(tensor.numpy()) for name, tensor in values.items() if tensor is not None}
    assert found == {"visible": 0.0, "masked": LOWEST[precision], "sink_position": -2.0}


def test_the_scale_is_that_of_the_heads(model: ir.Model, tiny: Checkpoint) -> None:
    for node in nodes(model, "Attention"):
        assert node.attributes["scale"].as_float() == pytest.approx(tiny.config.head_dim**-0.5, rel=1e-6)
        assert node.attributes.keys() == {"scale"}, "no cap, no causal mask of its own, softmax in float32 by default"


def test_a_layer_stays_readable(model: ir.Model, tiny: Checkpoint) -> None:
    per_layer = Counter(str(node.name).split(".")[2] for node in model.graph if "model.layers." in str(node.name))
    assert len(per_layer) == tiny.config.num_layers
    assert max(per_layer.values()) <= 45
    assert sum(1 for _ in model.graph) <= 50 * tiny.config.num_layers + 30


def test_names_are_there_and_unique(model: ir.Model) -> None:
    names = Counter(node.name for node in model.graph)
    values = Counter(value.name for node in model.graph for value in node.outputs)
    assert None not in names
    assert "" not in names
    assert max(names.values()) == max(values.values()) == 1


def test_constants_are_small(model: ir.Model) -> None:
    small = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert all(tensor.nbytes <= MOST_CONSTANT_BYTES for tensor in small)
    assert sum(tensor.nbytes for tensor in small) <= MOST_CONSTANT_BYTES
    assert len(weightless_proto(model).SerializeToString()) < 1 << 20


def test_external_weights_are_experts_and_embedding(
    precision: Precision, lowered: Mapping[Key, ir.Model], tiny: Checkpoint
) -> None:
    external, embedded = lowered[precision, True].graph, lowered[precision, False].graph
    moved = {value.name for value in external.inputs} - {value.name for value in embedded.inputs}
    assert moved == {EMBEDDING} | {name for name in tiny.tensors if ".mlp.experts." in name}
    assert not {value.name for value in embedded.inputs} - {value.name for value in external.inputs}

    def weights(graph: ir.Graph) -> set[str]:
        return {name for name, value in graph.initializers.items() if value.const_value is None}

    assert weights(embedded) == tiny.tensors.keys()
    assert weights(external) == tiny.tensors.keys() - moved


def test_weights_keep_their_shapes_and_the_types_that_fit(
    precision: Precision, lowered: Mapping[Key, ir.Model], tiny: Checkpoint
) -> None:
    values = lowered[precision, False].graph.initializers
    for name, ref in tiny.tensors.items():
        assert tuple(values[name].shape or ()) == ref.shape
        wide = ir.DataType[precision.onnx_type] if is_dense(name) else ir.DataType.BFLOAT16
        assert values[name].dtype == (ir.DataType.INT8 if ref.dtype == "U8" else wide)


def test_embedded_and_external_are_the_same_nodes(precision: Precision, lowered: Mapping[Key, ir.Model]) -> None:
    def listed(model: ir.Model) -> list[tuple[object, ...]]:
        return [(n.op_type, n.name, *(v.name for v in (*n.inputs, *n.outputs) if v is not None)) for n in model.graph]

    assert listed(lowered[precision, True]) == listed(lowered[precision, False])


def test_the_same_graph_again(tiny_graph: ir.Model, lowered: Mapping[Key, ir.Model]) -> None:
    again = lower(tiny_graph.clone(), Precision.FP16, slots=SLOTS, external_weights=True)
    protos = [ir.serde.serialize_model(model) for model in (again, lowered[Precision.FP16, True])]
    assert protos[0].SerializeToString(deterministic=True) == protos[1].SerializeToString(deterministic=True)


@pytest.mark.parametrize("external", [True, False])
def test_the_canonical_graph_stays(external: bool, precision: Precision, tiny_graph: ir.Model) -> None:
    """Clones share type objects with their original, from which the other targets of an export are built."""
    before = ir.serde.serialize_model(tiny_graph).SerializeToString(deterministic=True)
    lower(tiny_graph.clone(), precision, slots=SLOTS, external_weights=external)
    assert ir.serde.serialize_model(tiny_graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("slots", [128, 4224])
def test_slots_are_as_asked_for(slots: int, tiny_graph: ir.Model) -> None:
    graph = lower(tiny_graph.clone(), Precision.FP16, slots=slots, external_weights=True).graph
    caches = [v for v in (*graph.inputs, *graph.outputs) if str(v.name).startswith(("past_key_values.", "present."))]
    assert {v.shape[2] for v in caches if v.shape is not None} == {slots}


def test_experts_in_bfloat16_are_refused(tiny_graph: ir.Model) -> None:
    model = tiny_graph.clone()
    for node in model.graph:
        if node.op_type == "MoEExperts":
            node.op_type = "MoEExpertsDense"
    with pytest.raises(GraphError, match="MoEExpertsDense has no form for TensorRT") as caught:
        lower(model, Precision.FP16, slots=SLOTS, external_weights=True)
    assert caught.value.exit_code == 31
    assert "MXFP4" in caught.value.next_step


def test_a_graph_without_attention_is_refused(tiny_graph: ir.Model) -> None:
    model = tiny_graph.clone()
    for node in model.graph:
        if node.op_type == "SinkAttention":
            node.op_type = "Attention"
    with pytest.raises(GraphError, match="no attention"):
        lower(model, Precision.FP16, slots=SLOTS, external_weights=True)

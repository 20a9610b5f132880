"""Surgery on an artifact's graph: other values go in, more come out, and what is not asked for falls away.

`input_ids` become indexes into tables that are inputs of their own, so that every runner works on the changed graph as
on the whole one, however it cuts a text into calls:

    whole model   token_ids [n] int64; for a replay, replayed_experts [n, L, K] int64
    one layer     hidden [n, H], residual [n, H] float32: the streams before attention and before the experts
    its ends      token_ids [n] int64, hidden [n, H] float32: the stream behind the last layer

Weights stay where they are: nothing here reads one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.ort.anatomy import (
    Layer,
    count_layers,
    find_ends,
    find_layer,
    first_dim,
    graph_input,
    narrowest,
    num_experts,
    uncast,
    unlike_ours,
)
from gptoss_export.engines.ort.shared_cache import WINDOWS_KEY

if TYPE_CHECKING:
    import onnx_ir as ir

TOKENS, REPLAY, HIDDEN, RESIDUAL = "token_ids", "replayed_experts", "hidden", "residual"
"""The tables."""

WEIGHTS, EXPERTS, ATTENTION, OUTPUT = "router_weights", "router_experts", "attention_residual", "layer_output"
"""What a layer gives out beside the operations, which go by their names in `engines.inspector.OPS`."""

EMBEDDED, NORMED = "embedded", "final_norm"
"""What the ends give out."""


@dataclass(frozen=True)
class Tapped:
    """A changed model. tables: its new inputs. taps: for each layer that is left, what it shows, by the name of the
    graph's output. types: see `engines.inspector.LayerOutputs`, for a single layer."""

    model: ir.Model
    tables: tuple[str, ...]
    taps: tuple[Mapping[str, str], ...]
    types: Mapping[str, str]


def tap_model(model: ir.Model, *, replay: bool, token_rows: bool) -> Tapped:
    """The whole model, changed in place: it shows WEIGHTS and EXPERTS of every layer.

    replay: whether REPLAY decides where tokens go. token_rows: whether the graph's activations are [T, H] instead of
    [B, S, H]. Raises GraphError for a graph that is none of ours.
    """
    import onnx_ir as ir

    graph, ids = model.graph, graph_input(model, "input_ids")
    layers = [find_layer(graph, n) for n in range(count_layers(model))]
    _look_up_tokens(graph, find_ends(model).embed)
    if replay:
        table = _table(graph, REPLAY, ir.DataType.INT64, ("table_rows", len(layers), "top_k"))
        chosen = _look_up(graph, table, _indexes(graph, ids, token_rows))
        for n, layer in enumerate(layers):
            _replay(layer, n, chosen, num_experts(model))
    rank = 2 if token_rows else 3
    taps = tuple({name: _tap(graph, value, rank) for name, value in _routing(layer).items()} for layer in layers)
    return Tapped(model, (TOKENS, REPLAY) if replay else (TOKENS,), taps, {})


def cut_layer(model: ir.Model, index: int, *, token_rows: bool) -> Tapped:
    """One layer of the model, which is changed: it shows everything.

    Its first output is OUTPUT once more, of the positions whose logits are asked for. Raises GraphError.
    """
    import onnx_ir as ir

    graph = model.graph
    layer, kept = find_layer(graph, index), find_ends(model).pick
    hidden_size = first_dim(model, f"model.layers.{index}.input_layernorm.weight")
    tables = [_table(graph, name, ir.DataType.FLOAT, ("table_rows", hidden_size)) for name in (HIDDEN, RESIDUAL)]
    indexes = _indexes(graph, graph_input(model, "input_ids"), token_rows)
    for old, table in zip((layer.hidden, layer.residual), tables, strict=True):
        ir.convenience.replace_all_uses_with(old, _look_up(graph, table, indexes))
    kept.replace_input_with(0, layer.output)
    rank = 2 if token_rows else 3
    kept.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    kept.outputs[0].shape = ir.Shape([*[None] * (rank - 1), hidden_size])
    _only_layer(model, index, kept.outputs[0])
    shown = {ATTENTION: layer.residual, OUTPUT: layer.output, **_routing(layer), **layer.ops}
    taps = {name: _tap(graph, value, rank) for name, value in shown.items()}
    types = {name: narrowest(value) for name, value in layer.ops.items()}
    _drop_unused(model)
    return Tapped(model, (HIDDEN, RESIDUAL), (taps,), types)


def cut_ends(model: ir.Model, *, token_rows: bool) -> Tapped:
    """What is no layer, of a model that is changed: it shows EMBEDDED of TOKENS and NORMED of HIDDEN.

    Its first output is the logits of HIDDEN. Attention of the first layer stays, because runners want a cache. Raises
    GraphError.
    """
    import onnx_ir as ir

    graph = model.graph
    ends, first = find_ends(model), find_layer(graph, 0)
    _look_up_tokens(graph, ends.embed)
    hidden_size = first_dim(model, "model.layers.0.input_layernorm.weight")
    table = _table(graph, HIDDEN, ir.DataType.FLOAT, ("table_rows", hidden_size))
    indexes = _indexes(graph, graph_input(model, "input_ids"), token_rows)
    ends.pick.replace_input_with(0, _look_up(graph, table, indexes))
    _only_layer(model, 0, graph.outputs[0])
    first.hidden.type = ir.TensorType(ir.DataType.FLOAT)  # the residual stream is float32 in every target
    rank = 2 if token_rows else 3
    shown = {EMBEDDED: first.hidden, NORMED: ends.norm}
    taps = {name: _tap(graph, value, rank) for name, value in shown.items()}
    _drop_unused(model)
    return Tapped(model, (TOKENS, HIDDEN), (taps,), {})


def _look_up_tokens(graph: ir.Graph, embed: ir.Node) -> None:
    """Has the embedding read TOKENS where `input_ids` point."""
    import onnx_ir as ir

    tokens = _table(graph, TOKENS, ir.DataType.INT64, ("table_rows",))
    ids = _before(embed, "Gather", [tokens, embed.inputs[1]], "looked_up_ids", ir.DataType.INT64)
    embed.replace_input_with(1, ids)


def _only_layer(model: ir.Model, index: int, first: ir.Value) -> None:
    """Leaves the outputs `first` and that layer's caches, and its window among those that the model names."""
    outputs = model.graph.outputs
    outputs[:] = [first, *(value for value in outputs if (value.name or "").startswith(f"present.{index}."))]
    if (windows := model.metadata_props.get(WINDOWS_KEY)) is not None:
        if len(each := windows.split(",")) <= index:
            raise unlike_ours(f"no window of layer {index}")
        model.metadata_props[WINDOWS_KEY] = each[index]


def _drop_unused(model: ir.Model) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    # Caches of other layers, and of an engine's weights those that it takes as inputs.
    gone, inputs = ("past_key_values.", "model."), model.graph.inputs
    inputs[:] = [value for value in inputs if value.uses() or not (value.name or "").startswith(gone)]


def _routing(layer: Layer) -> dict[str, ir.Value]:
    return dict(zip((WEIGHTS, EXPERTS), layer.routing, strict=True))


def _replay(layer: Layer, index: int, chosen: ir.Value, count: int) -> None:
    """Puts chosen [.., L, K] in the place of what the router of the layer found among `count` experts."""
    import onnx_ir as ir

    weights, experts = layer.routing
    router, top = weights.producer(), uncast(experts).producer()
    if router is None or top is None or {router.op_type, top.op_type} not in ({"MoERouter"}, {"Softmax", "TopK"}):
        raise unlike_ours(f"no router in layer {index}")
    at = layer.moe if router is top else top
    number = _constant(at, np.array(index))
    experts = _before(at, "Gather", [chosen, number], f"replayed_{index}", ir.DataType.INT64, axis=-2)
    if router is top:
        layer.moe.replace_input_with(1, _weights_of(router, experts, count, at, f"replayed_{index}"))
        layer.moe.replace_input_with(2, experts)
    else:
        logits = _before(at, "GatherElements", [top.inputs[0], experts], f"replayed_{index}_logits", axis=-1)
        ir.convenience.replace_all_uses_with(top.outputs, [logits, experts])


def _weights_of(router: ir.Node, experts: ir.Value, count: int, at: ir.Node, name: str) -> ir.Value:
    """The softmax over the router's logits of these experts, by the router itself, kernel or body.

    With a top_k of all experts it gives the softmax over all, which has to be put in order and scaled.
    """
    import onnx_ir as ir

    router.attributes["top_k"] = ir.AttrInt64("top_k", count)
    for value in router.outputs:
        value.shape = None
    shares, order = router.outputs
    by_expert = _before(at, "ScatterElements", [shares, order, shares], f"{name}_shares", axis=-1)
    # Of experts that are all out of the question float32 may hold nothing but zeros, and their sum divides.
    smallest = _constant(at, np.array(np.finfo(np.float32).tiny))
    found = _before(at, "GatherElements", [by_expert, experts], f"{name}_found", axis=-1)
    held = _before(at, "Max", [found, smallest], f"{name}_held")
    total = _before(at, "ReduceSum", [held, _constant(at, np.array([-1]))], f"{name}_total", keepdims=1)
    return _before(at, "Div", [held, total], f"{name}_weights")


def _indexes(graph: ir.Graph, ids: ir.Value, token_rows: bool) -> ir.Value:
    """input_ids [B, S], or [B S] where the graph's tokens are rows."""
    import onnx_ir as ir

    if not token_rows:
        return ids
    first = graph[0]
    return _before(first, "Reshape", [ids, _constant(first, np.array([-1]))], "table_indexes", ir.DataType.INT64)


def _look_up(graph: ir.Graph, table: ir.Value, indexes: ir.Value) -> ir.Value:
    """The table's rows of these indexes, right behind what computes the indexes."""
    producer = indexes.producer()
    at = graph[0] if producer is None else list(graph)[list(graph).index(producer) + 1]
    return _before(at, "Gather", [table, indexes], f"{table.name}_rows", table.dtype)


def _constant(at: ir.Node, array: NDArray[Any]) -> ir.Value:
    import onnx_ir as ir

    node = ir.node("Constant", [], {"value": ir.tensor(array)})
    assert at.graph is not None
    at.graph.insert_before(at, node)
    return node.outputs[0]


def _before(
    at: ir.Node,
    op: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    dtype: ir.DataType | None = None,
    **attributes: int,
) -> ir.Value:
    """Puts a node of one output before `at`; dtype: float32 if none is given."""
    import onnx_ir as ir

    node = ir.node(op, inputs, attributes, name=name)
    node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(dtype or ir.DataType.FLOAT)
    assert at.graph is not None
    at.graph.insert_before(at, node)
    return node.outputs[0]


def _tap(graph: ir.Graph, value: ir.Value, rank: int) -> str:
    """Makes an output of the value, of 16 bits as float32, and returns its name."""
    import onnx_ir as ir

    if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        node = value.producer()
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{value.name}.shown")
        assert node is not None
        graph.insert_after(node, cast)
        value, name = cast.outputs[0], cast.name
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    if value.shape is None:
        value.shape = ir.Shape([None] * rank)
    if value not in graph.outputs:
        graph.outputs.append(value)
    return str(value.name)


def _table(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[str | int, ...]) -> ir.Value:
    import onnx_ir as ir

    value = ir.val(name, dtype, shape)
    graph.inputs.append(value)
    return value

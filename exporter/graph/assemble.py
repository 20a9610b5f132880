"""The traced pieces become one graph: every layer a copy of the layer of its kind.

    inputs   input_ids [batch_size, sequence_length], attention_mask [batch_size, total_sequence_length] int64,
             past_key_values.N.key / .value [batch_size, kv_heads, past_sequence_length, head_dim] float32,
             num_logits_to_keep int64, a scalar that may be left out: logits of the last so many, 0 of all
    outputs  logits [batch_size, kept_length, vocab_size], present.N.key / .value [.., total_sequence_length, ..]

Names are those of optimum and onnxruntime-genai. Weights are initializers without data, named as in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.graph.trace import Pieces

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 11
"""The first that carries opset 23."""

BATCH, SEQUENCE, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
KEPT = "kept_length"
KEEP_INPUT = "num_logits_to_keep"
KEEP_DEFAULT = 0
"""Logits of all positions: what optimum and onnxruntime-genai expect of a model that they tell nothing."""


def assemble(pieces: Pieces, config: ModelConfig) -> ir.Model:
    """One model of `config.num_layers` layers. The initializers of its weights have no data yet."""
    import onnx_ir as ir

    from gptoss_export.exporter.ops import DOMAIN, OPSET, VERSION, functions_of

    i64, f32 = ir.DataType.INT64, ir.DataType.FLOAT
    cache_shape = (BATCH, config.num_kv_heads, PAST, config.head_dim)
    ids = ir.val("input_ids", i64, (BATCH, SEQUENCE))
    mask = ir.val("attention_mask", i64, (BATCH, TOTAL))
    keep = ir.val(KEEP_INPUT, i64, (), const_value=ir.tensor(np.array(KEEP_DEFAULT), name=KEEP_INPUT))
    pasts = [
        (
            ir.val(f"past_key_values.{n}.key", f32, cache_shape),
            ir.val(f"past_key_values.{n}.value", f32, cache_shape),
        )
        for n in range(config.num_layers)
    ]
    graph = ir.Graph(
        [ids, mask, *(value for past in pasts for value in past), keep],
        [],
        nodes=[],
        initializers=[keep],
        opset_imports={"": OPSET, DOMAIN: VERSION},
        name="gpt_oss",
    )
    hidden, *shared = _copy(graph, pieces.embed.graph, [ids, mask], "embed.", "")
    for n, (kind, past) in enumerate(zip(config.layer_types, pasts, strict=True)):
        prefix = f"model.layers.{n}."
        hidden, *present = _copy(graph, pieces.layers[kind].graph, [hidden, *shared, *past], prefix, prefix)
        for value, part in zip(present, ("key", "value"), strict=True):
            value.name = f"present.{n}.{part}"
            graph.outputs.append(value)
    (logits,) = _copy(graph, pieces.head.graph, [_last_positions(graph, hidden, keep)], "head.", "")
    logits.name = "logits"
    graph.outputs.insert(0, logits)

    return ir.Model(graph, ir_version=IR_VERSION, producer_name="gptoss-export", functions=functions_of(graph))


def _last_positions(graph: ir.Graph, hidden: ir.Value, keep: ir.Value) -> ir.Value:
    """hidden[:, -keep:], all of it for keep 0: the logits of positions that nobody reads are not computed."""
    import onnx_ir as ir

    def constant(name: str, *values: int) -> ir.Value:
        node = ir.node("Constant", [], {"value_ints": list(values)}, name=name)
        node.outputs[0].name = name
        graph.append(node)
        return node.outputs[0]

    one, end, axis = (
        constant("keep_shape", 1),
        constant("keep_end", np.iinfo(np.int64).max),
        constant("keep_axis", 1),
    )
    negated = ir.node("Neg", [keep], name="keep_negated")
    start = ir.node("Reshape", [negated.outputs[0], one], name="keep_start")
    kept = ir.node("Slice", [hidden, start.outputs[0], end, axis], name="kept_hidden")
    for node in (negated, start, kept):
        node.outputs[0].name = node.name
        graph.append(node)
    kept.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    assert hidden.shape is not None
    kept.outputs[0].shape = ir.Shape([BATCH, KEPT, hidden.shape[2]])
    return kept.outputs[0]


def _copy(graph: ir.Graph, piece: ir.Graph, inputs: Sequence[ir.Value], prefix: str, weights: str) -> list[ir.Value]:
    """Appends the nodes of `piece`, with `inputs` for its inputs, and returns what its outputs became.

    Nodes and their outputs get the prefix, weights theirs. Metadata stays behind: torch writes paths of the machine
    into it.
    """
    import onnx_ir as ir

    dims: dict[str, str | int] = {}
    values: dict[ir.Value, ir.Value] = {}
    for formal, actual in zip(piece.inputs, inputs, strict=True):
        values[formal] = actual
        assert formal.shape is not None and actual.shape is not None
        for symbol, dim in zip(formal.shape, actual.shape, strict=True):
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                dims[symbol.value] = dim.value if isinstance(dim, ir.SymbolicDim) and dim.value else str(dim)

    for weight in piece.initializers.values():
        values[weight] = ir.Value(
            name=f"{weights}{weight.name}",
            shape=weight.shape,
            type=weight.type,
            const_value=weight.const_value,
        )
        graph.initializers.add(values[weight])
    for node in piece:
        name = _module(node, weights) or f"{prefix}{node.outputs[0].name}"
        names = [name] if len(node.outputs) == 1 else [f"{name}.{i}" for i in range(len(node.outputs))]
        outputs = [
            ir.Value(name=new, shape=_renamed(value.shape, dims), type=value.type)
            for new, value in zip(names, node.outputs, strict=True)
        ]
        inputs_of = [None if value is None else values[value] for value in node.inputs]
        graph.append(ir.Node(node.domain, node.op_type, inputs_of, node.attributes, outputs=outputs, name=name))
        values.update(zip(node.outputs, outputs, strict=True))
    return [values[value] for value in piece.outputs]


def _module(node: ir.Node, weights: str) -> str | None:
    """The checkpoint's name of the module that a node computes: its first weight's, less the last part."""
    names = [value.name for value in node.inputs if value is not None and value.is_initializer()]
    return f"{weights}{names[0].rpartition('.')[0]}" if names and names[0] else None


def _renamed(shape: ir.Shape | None, dims: Mapping[str, str | int]) -> ir.Shape | None:
    """The shape with torch's symbols replaced by our names; None where it has symbols that are not ours."""
    import onnx_ir as ir

    if shape is None:
        return None
    renamed: list[str | int] = []
    for dim in shape:
        if isinstance(dim, int):
            renamed.append(dim)
        elif dim.value in dims:
            renamed.append(dims[str(dim.value)])
        else:
            return None
    return ir.Shape(renamed)

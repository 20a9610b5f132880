"""Where things are in an artifact's graph.

Layers are found by their norms' weights and by structure, which all targets have in common: x is normed, added to what
attention made of it, normed and added to what the experts made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_export.exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx_ir as ir

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


@dataclass(frozen=True)
class Ends:
    """What is no layer. embed: the node that looks up the embedding. pick: the one that takes the positions whose
    logits are wanted out of the residual stream behind the last layer. norm: what the final norm makes of them.
    """

    embed: ir.Node
    pick: ir.Node
    norm: ir.Value


@dataclass(frozen=True)
class Layer:
    """The values of a layer. output: the residual stream behind it. moe: the node of the experts, which reads x, the
    router's weights and its experts. ops: by name of OPS, as far as there is one."""

    hidden: ir.Value
    residual: ir.Value
    output: ir.Value
    moe: ir.Node
    ops: Mapping[str, ir.Value]

    @property
    def routing(self) -> tuple[ir.Value, ir.Value]:
        """The weights and the experts of its tokens."""
        weights, experts = self.moe.inputs[1:3]
        assert weights is not None and experts is not None
        return weights, experts


def count_layers(model: ir.Model) -> int:
    """The number of layers. Raises GraphError if there is none."""
    count = 0
    while f"model.layers.{count}.input_layernorm.weight" in model.graph.initializers:
        count += 1
    if not count:
        raise unlike_ours("no layer")
    return count


def num_experts(model: ir.Model) -> int:
    """The number of experts of a layer."""
    return first_dim(model, "model.layers.0.mlp.router.weight")


def vocab_size(model: ir.Model) -> int:
    """The number of tokens that there are embeddings of."""
    return first_dim(model, EMBEDDING)


def find_layer(graph: ir.Graph, index: int) -> Layer:
    prefix = f"model.layers.{index}."
    first, second = (_norm(graph, f"{prefix}{name}.weight") for name in ("input_layernorm", "post_attention_layernorm"))
    hidden, residual = first.inputs[0], second.inputs[0]
    joins = [] if residual is None else [node for node in residual.consumers() if node.op_type == "Add"]
    if hidden is None or residual is None or len(joins) != 1:
        raise unlike_ours(f"no residual stream in layer {index}")
    projected = uncast(_other(residual.producer(), hidden, index))
    summed = _other(joins[0], residual, index)
    project, moe = projected.producer(), uncast(summed).producer()
    attention = project.inputs[0] if project is not None else None
    if attention is None or moe is None or len(moe.inputs) < 3 or None in moe.inputs[1:3]:
        raise unlike_ours(f"no output projection or no experts in layer {index}")
    # The targets' own names: as traced, and as lowered for TensorRT.
    named = {value.name: value for node in graph for value in node.outputs}
    projections = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        found = named.get(f"{prefix}self_attn.{name}.gemm") or named.get(f"{prefix}self_attn.{name}")
        if found is not None:
            projections[name] = found
    ops = {"input_layernorm": first.outputs[0], **projections, "attention": attention, "o_proj": projected}
    ops |= {"post_attention_layernorm": second.outputs[0], "experts": summed}
    return Layer(hidden, residual, joins[0].outputs[0], moe, ops)


def find_ends(model: ir.Model) -> Ends:
    """Raises GraphError for a graph that is none of ours."""
    graph = model.graph
    embed = next((n for n in graph if n.op_type == "Gather" and n.inputs[0] and n.inputs[0].name == EMBEDDING), None)
    if embed is None:
        raise unlike_ours("no embedding")
    last = find_layer(graph, count_layers(model) - 1)
    pick = next((node for node in last.output.consumers() if node.op_type in ("Slice", "Gather")), None)
    if pick is None:
        raise unlike_ours("nothing that picks the positions whose logits are wanted")
    return Ends(embed, pick, _norm(graph, FINAL_NORM).outputs[0])


def _norm(graph: ir.Graph, weight: str) -> ir.Node:
    """The norm with that weight, which it reads as float32."""
    stored = graph.initializers.get(weight)
    readers = list(stored.consumers()) if stored is not None else []
    readers += [reader for node in readers if node.op_type == "Cast" for reader in node.outputs[0].consumers()]
    norm = next((node for node in readers if node.op_type == "RMSNormalization"), None)
    if norm is None:
        raise unlike_ours(f"no norm that reads {weight}")
    return norm


def _other(add: ir.Node | None, value: ir.Value, index: int) -> ir.Value:
    """What an Add adds to the value."""
    if add is not None and add.op_type == "Add" and value in add.inputs:
        other = add.inputs[0] if add.inputs[1] is value else add.inputs[1]
        if other is not None:
            return other
    raise unlike_ours(f"no residual stream in layer {index}")


def uncast(value: ir.Value) -> ir.Value:
    """The value before it was cast, if it was."""
    node = value.producer()
    return value if node is None or node.op_type != "Cast" or node.inputs[0] is None else node.inputs[0]


def narrowest(value: ir.Value) -> str:
    """See `engines.inspector.LayerOutputs.types`."""
    import onnx_ir as ir

    handed_on = [value, *(node.outputs[0] for node in value.consumers() if node.op_type == "Cast")]
    types = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    return next((types[v.dtype] for v in handed_on if v.dtype in types), "float32")


def graph_input(model: ir.Model, name: str) -> ir.Value:
    for value in model.graph.inputs:
        if value.name == name:
            return value
    raise unlike_ours(f"no input {name}")


def first_dim(model: ir.Model, weight: str) -> int:
    """The first dimension of a weight, which may be an input."""
    value = model.graph.initializers.get(weight) or graph_input(model, weight)
    if value.shape is None or not isinstance(value.shape[0], int):
        raise unlike_ours(f"no shape of {weight}")
    return value.shape[0]


def unlike_ours(what: str) -> GraphError:
    return GraphError(
        f"the artifact's graph has {what}, so its inside cannot be looked at",
        "Validate it with the version of gptoss-export that its manifest names, or export again.",
    )

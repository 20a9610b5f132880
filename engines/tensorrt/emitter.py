"""Puts nodes into a graph, one before another, and names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Emitter:
    """Edits one graph. New nodes are put before `at`; `narrow` is the type that `narrow` casts to."""

    def __init__(self, graph: ir.Graph, narrow_type: ir.DataType) -> None:
        self._graph, self._type = graph, narrow_type
        self._names: dict[str, ir.Value] = {}
        self.at = next(iter(graph))

    def narrow(self, x: ir.Value | None) -> ir.Value:
        """x in the target's type, one cast for all that read it so."""
        assert x is not None
        return self.once(f"{x.name}.narrow", lambda: self.cast(x, self._type, f"{x.name}.narrow"))

    def wide(self, x: ir.Value | None, name: str) -> ir.Value:
        return self.cast(x, ir.DataType.FLOAT, name)

    def cast(self, x: ir.Value | None, to: ir.DataType, name: str) -> ir.Value:
        assert x is not None
        return x if x.dtype == to else self.emit("Cast", [x], name, {"to": int(to)}, to)

    def once(self, name: str, make: Callable[[], ir.Value]) -> ir.Value:
        if name not in self._names:
            self._names[name] = make()
        return self._names[name]

    def constant(self, name: str, value: int | float | Sequence[int], dtype: ir.DataType | None = None) -> ir.Value:
        def make() -> ir.Value:
            if dtype is None:
                tensor = ir.tensor(np.array(value, np.int64), name=name)
            else:
                tensor = ir.tensor(np.array(value, dtype.numpy()), name=name, dtype=dtype)
            made = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(value))
            )
            self._graph.initializers.add(made)
            return made

        return self.once(f"constant {name}", make)

    def emit(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Puts a node of one output before the one that is being lowered; both have the name."""
        node = ir.node(op, inputs, attributes, domain=domain, name=name)
        node.outputs[0].name = name
        if dtype is not None:
            node.outputs[0].dtype = dtype
        self._graph.insert_before(self.at, node)
        return node.outputs[0]

    def emit_many(self, op: str, inputs: Sequence[ir.Value], name: str, outputs: int) -> Sequence[ir.Value]:
        node = ir.node(op, inputs, name=name, num_outputs=outputs)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}.{i}"
        self._graph.insert_before(self.at, node)
        return node.outputs

    def replace(self, node: ir.Node, *outputs: ir.Value) -> None:
        for old, new in zip(node.outputs, outputs, strict=True):
            if old.is_graph_output():
                new.name = old.name
        ir.convenience.replace_all_uses_with(node.outputs, outputs, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)

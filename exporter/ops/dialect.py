"""The dialect: domain `com.gptoss`, version 1.

An op of the dialect is three things that say the same: a torch op (eager mathematics and a fake for tracing), an ONNX
schema, and a function body in standard ONNX operators. The body is the executable definition: a file that carries it
runs in any ONNX runtime, and an engine that has a kernel of that name uses the kernel instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, parser
from torch._ops import OpOverload

DOMAIN = "com.gptoss"
VERSION = 1
OPSET = 23
"""Version of the standard operators in graph and bodies: the first with RMSNormalization and RotaryEmbedding."""


@dataclass(frozen=True)
class Op:
    """One op of the dialect.

    torch_op: None for an op that only bodies and lowered graphs use. body: the function in ONNX's text syntax.
    constants: tensors that the body names without defining them; they are kept out of the text because its parser
    refuses subnormal floats and has no compact form for tables. calls: the ops of the dialect that the body uses.
    """

    name: str
    torch_op: OpOverload | None
    schema: onnx.defs.OpSchema
    body: str
    constants: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    calls: tuple[str, ...] = ()

    @cached_property
    def function(self) -> onnx.FunctionProto:
        """The model-local function that a graph with this op carries."""
        function = parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n{self.name} {self.body}'
        )
        constants = [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))
            for name, value in self.constants.items()
        ]
        nodes = [*constants, *function.node]
        del function.node[:]
        function.node.extend(nodes)
        function.doc_string = self.schema.doc or ""
        return function


def make_schema(
    name: str,
    doc: str,
    inputs: Mapping[str, str],
    outputs: Mapping[str, str],
    attributes: Mapping[str, onnx.defs.OpSchema.AttrType] | None = None,
) -> onnx.defs.OpSchema:
    """A schema with one concrete type a parameter: `inputs` and `outputs` map names to ONNX type strings."""
    return onnx.defs.OpSchema(
        name,
        DOMAIN,
        VERSION,
        doc=doc,
        inputs=[onnx.defs.OpSchema.FormalParameter(n, t) for n, t in inputs.items()],
        outputs=[onnx.defs.OpSchema.FormalParameter(n, t) for n, t in outputs.items()],
        attributes=[onnx.defs.OpSchema.Attribute(n, kind, required=True) for n, kind in (attributes or {}).items()],
    )


def with_calls(names: Iterable[str], ops: Iterable[Op]) -> list[Op]:
    """The ops of these names and all that their bodies call, in the order of `ops`."""
    by_name = {op.name: op for op in ops}
    needed: set[str] = set()
    todo = [name for name in names if name in by_name]
    while todo:
        name = todo.pop()
        if name not in needed:
            needed.add(name)
            todo.extend(by_name[name].calls)
    return [op for op in by_name.values() if op.name in needed]


FLOAT = onnx.defs.OpSchema.AttrType.FLOAT
INT = onnx.defs.OpSchema.AttrType.INT

"""Weights into the graph, by reference: every initializer becomes a byte range of a safetensors file.

Nothing is read. ONNX Runtime maps the files; onnx.load reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gptoss_export.exporter.checkpoint.tensors import TensorRef
from gptoss_export.exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx_ir as ir


def bind(model: ir.Model, folders: Mapping[str, Mapping[str, TensorRef]]) -> None:
    """Points every initializer without data at the tensor of its name, in a file of the folder that has it.

    folders: tensors by the folder that their files lie in, relative to the model's, "" for the model's own. Raises
    GraphError if a weight of the graph is in none of them, if one of theirs is not in the graph, or if type or shape
    differ.
    """
    import onnx_ir as ir

    types = {
        "BF16": (ir.DataType.BFLOAT16,),
        "F16": (ir.DataType.FLOAT16,),
        "F32": (ir.DataType.FLOAT,),
        "I8": (ir.DataType.INT8,),
        # A graph for an engine without unsigned bytes reads the same bytes as signed ones.
        "U8": (ir.DataType.UINT8, ir.DataType.INT8),
    }
    places = {name: (folder, tensor) for folder, tensors in folders.items() for name, tensor in tensors.items()}
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    if difference := weights.keys() ^ places.keys():
        name = min(difference)
        raise GraphError(
            f"the {'graph' if name in weights else 'checkpoint'} has the weight {name} and the other has not",
            "Report this with config.json; the graph was not traced for this checkpoint.",
        )
    for name, value in weights.items():
        folder, tensor = places[name]
        assert value.shape is not None
        if value.dtype not in types[tensor.dtype] or tuple(value.shape) != tensor.shape:
            raise GraphError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} in the file, {value.dtype} {value.shape} in the graph",
                "Report this with config.json; the graph was not traced for this checkpoint.",
            )
        value.const_value = ir.ExternalTensor(
            f"{folder}/{tensor.file.name}" if folder else tensor.file.name,
            tensor.offset,
            tensor.nbytes,
            value.dtype,
            shape=ir.Shape(tensor.shape),
            name=name,
        )

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


def bind(model: ir.Model, tensors: Mapping[str, TensorRef], weights_dir: str) -> None:
    """Points every initializer without data at the tensor of its name in `weights_dir`/<its file's name>.

    weights_dir is relative to the model's folder, "" for the folder itself. Raises GraphError if a weight of the graph
    is not in `tensors`, if one in `tensors` is not in the graph, or if type or shape differ.
    """
    import onnx_ir as ir

    types = {"BF16": ir.DataType.BFLOAT16, "U8": ir.DataType.UINT8}
    weights = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    if difference := weights.keys() ^ tensors.keys():
        name = min(difference)
        raise GraphError(
            f"the {'graph' if name in weights else 'checkpoint'} has the weight {name} and the other has not",
            "Report this with config.json; the graph was not traced for this checkpoint.",
        )
    for name, value in weights.items():
        tensor = tensors[name]
        assert value.shape is not None
        if value.dtype != types[tensor.dtype] or tuple(value.shape) != tensor.shape:
            raise GraphError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} in the file, {value.dtype} {value.shape} in the graph",
                "Report this with config.json; the graph was not traced for this checkpoint.",
            )
        value.const_value = ir.ExternalTensor(
            f"{weights_dir}/{tensor.file.name}" if weights_dir else tensor.file.name,
            tensor.offset,
            tensor.nbytes,
            types[tensor.dtype],
            shape=ir.Shape(tensor.shape),
            name=name,
        )

"""torch.export and torch.onnx on the meta device: the embedding, one layer of each kind, and the head.

Tracing costs seconds a layer and layers of a kind differ in nothing but their weights, so each kind is traced once and
`assemble` repeats it. Nothing here holds a weight: parameters live on the meta device and leave as initializers without
data that are named like the checkpoint's tensors.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from gptoss_export.exporter.checkpoint.config import LayerType, ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import GraphError

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor, nn


@dataclass(frozen=True)
class Pieces:
    """The traced parts. Inputs and outputs, in order:

    embed: input_ids, attention_mask -> hidden, cos, sin, query_positions, key_positions
    layers: hidden, cos, sin, query_positions, key_positions, past_key, past_value -> hidden, present_key, present_value
    head: hidden -> logits

    The name of an initializer without data is that of the checkpoint's tensor; a layer's lacks `model.layers.N.`.
    """

    embed: ir.Model
    layers: Mapping[LayerType, ir.Model]
    head: ir.Model


def trace(config: ModelConfig, layout: Layout) -> Pieces:
    """Traces the network of `config`, one layer of each kind in `config.layer_types`.

    Raises GraphError when torch cannot trace it.
    """
    import torch
    from torch.export import Dim

    from gptoss_export.exporter.model.gpt_oss import GptOss

    kinds: tuple[LayerType, ...] = tuple(dict.fromkeys(config.layer_types))
    with torch.device("meta"):
        model = GptOss(replace(config, num_layers=len(kinds), layer_types=kinds), layout)
        B, S, P = 2, 3, 5
        ids = torch.zeros(B, S, dtype=torch.int64)
        mask = torch.ones(B, P + S, dtype=torch.int64)
        hidden = torch.empty(B, S, config.hidden_size)
        # A tensor that is passed twice would be traced as one input.
        cos, sin = (torch.empty(B, S, config.head_dim // 2) for _ in range(2))
        key, value = (torch.empty(B, config.num_kv_heads, P, config.head_dim) for _ in range(2))
    batch, sequence, total, length = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    new, both, cached = {0: batch, 1: sequence}, {0: batch, 1: total}, {0: batch, 2: length}

    embed = _to_onnx(model, model.embed, (ids, mask), (new, both))
    layers: dict[LayerType, ir.Model] = {}
    for kind, layer in zip(kinds, model.model.layers, strict=True):
        layers[kind] = _to_onnx(
            layer,
            lambda x, cos, sin, q, k, key, value, layer=layer: layer(x, (cos, sin), q, k, (key, value)),
            (hidden, cos, sin, ids, mask, key, value),
            (new, new, new, new, both, cached, cached),
        )
    return Pieces(embed, layers, _to_onnx(model, model.head, (hidden,), (new,)))


def _to_onnx(
    owner: nn.Module,
    function: Callable[..., Any],
    args: tuple[Tensor, ...],
    dynamic_shapes: tuple[Mapping[int, Any], ...],
) -> ir.Model:
    """Traces one function of `owner`, whose parameters keep their names."""
    import torch
    from torch import nn

    from gptoss_export.exporter.ops import OPSET

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner = owner

        def forward(self, *inputs: Tensor) -> Any:
            return function(*inputs)

    try:
        with _quiet():
            exported = torch.export.export(Traced(), args, dynamic_shapes=(dynamic_shapes,), strict=False)
            program = torch.onnx.export(
                exported,
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                custom_translation_table=_translations(),
            )
    except Exception as error:  # torch raises dozens of types here, none of them documented
        raise GraphError(
            f"torch could not trace {type(owner).__name__}: {str(error).splitlines()[0]}",
            "Run again with --debug and report the trace together with config.json.",
        ) from error
    assert program is not None
    model = program.model
    for weight in list(model.graph.initializers.values()):
        assert weight.name is not None and weight.const_value is not None
        del model.graph.initializers[weight.name]
        weight.name = weight.name.removeprefix("owner.")
        if weight.const_value.raw.device.type == "meta":
            weight.const_value = None
        model.graph.initializers[weight.name] = weight
    return model


@cache
def _translations() -> dict[Callable[..., object], Callable[..., object]]:
    """For each torch op of the dialect, the function that puts its ONNX op into the graph that is being traced."""
    import onnx
    from onnxscript import values

    from gptoss_export.exporter.ops import DOMAIN, OPS, VERSION, Op

    opset = values.Opset(DOMAIN, VERSION)
    table: dict[Callable[..., object], Callable[..., object]] = {}
    for op in OPS:
        if not onnx.defs.has(op.name, DOMAIN):
            onnx.defs.register_schema(op.schema)
        if op.torch_op is None:
            continue
        parameters = [argument.name for argument in op.torch_op._schema.arguments]

        def translate(*args: object, op: Op = op, parameters: list[str] = parameters) -> object:
            inputs = len(op.schema.inputs)
            attributes = dict(zip(parameters[inputs:], args[inputs:], strict=True))
            return getattr(opset, op.name)(*args[:inputs], **attributes)

        table[op.torch_op] = translate
    return table


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch reports its progress on stdout, which belongs to results, and warns about packages nobody needs here."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)

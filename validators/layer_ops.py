"""What transformers' own decoder layer puts out, op by op, given what enters it: the yardstick of a bisection.

ops = layer_ops(checkpoint, 3, [trace.hidden(3, 0)], [trace.residual(3, 0)])
ops[0]["o_proj"]        # [n, H] float32, of the first sequence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.inspector import OPS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.validators.layer_hooks import watch_ops
from gptoss_export.validators.streamed_layers import Loader, pad, stream_layer, streamed_model

if TYPE_CHECKING:
    import torch

Rows = NDArray[np.float32]


def layer_ops(
    checkpoint: Checkpoint, index: int, hidden: Sequence[Rows], residual: Sequence[Rows]
) -> list[Mapping[str, Rows]]:
    """One mapping a sequence, by name of OPS, [n, width] float32: that layer's outputs, in float32.

    The attention half runs from `hidden`, the MoE half from `residual` ([n, H] float32 each, a pair a sequence
    that starts at position 0), whatever attention made of `hidden`. Memory is one layer's dense weights, one
    expert, and the layer's values. Raises ConfigError when transformers refuses the config, IndexError for a
    layer that is not there, ValueError when hidden and residual are not of the same shapes.
    """
    import torch
    from torch.nn import ModuleList

    if not 0 <= index < checkpoint.config.num_layers:
        raise IndexError(f"layer {index} of {checkpoint.config.num_layers}")
    if [rows.shape for rows in hidden] != [rows.shape for rows in residual]:
        raise ValueError("hidden and residual are not of the same shapes")
    load = Loader(checkpoint, "float32")
    model = streamed_model(checkpoint, load)
    layer = model.layers[index]
    # GptOssModel.forward as it stands, masks and RoPE included, over this one layer.
    model.layers = ModuleList([layer])
    model.config.layer_types = (model.config.layer_types or [])[index : index + 1]
    batch, stream = pad(hidden, load.dtype), pad(residual, load.dtype)
    seen: dict[str, torch.Tensor] = {}

    def see(name: str, value: torch.Tensor) -> None:
        seen[name] = batch.rows(value)

    stream_layer(load, index, layer)
    layer.get_submodule("post_attention_layernorm").register_forward_pre_hook(lambda _m, _a: (stream.values,))
    watch_ops(layer, see)
    with torch.inference_mode():
        model(inputs_embeds=batch.values, attention_mask=batch.mask, use_cache=False)
    parts = {name: torch.split(seen[name], list(batch.lengths)) for name in OPS}
    return [{name: parts[name][row].numpy() for name in OPS} for row in range(len(hidden))]

"""transformers' GptOss with its parameters left on disk: a layer is loaded when it runs, an expert when it is asked
for.

    load = Loader(checkpoint, "float32")
    model = streamed_model(checkpoint, load)
    stream_layer(load, 0, model.layers[0])      # filled by a hook before it runs, emptied by one after

Parameters stay on the meta device until their layer runs, and an expert is decoded, by transformers' own
function, when GptOssExperts indexes it, so that peak memory is one layer's dense weights, one expert, and the
activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.open import read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.validators.transformers_config import transformers_config

if TYPE_CHECKING:
    import torch
    from transformers import GptOssModel

Dtype = Literal["float32", "bfloat16", "float16"]
"""What transformers holds parameters and activations in."""


def streamed_model(checkpoint: Checkpoint, load: Loader) -> GptOssModel:
    """GptOssModel in eval mode, its final norm and RoPE's frequencies there, all else on the meta device.

    Raises ConfigError when transformers refuses the config.
    """
    import torch
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssModel, GptOssRotaryEmbedding

    config = transformers_config(checkpoint)
    with torch.device("meta"):
        model = GptOssModel(config)
    model.train(False)
    model.rotary_emb = GptOssRotaryEmbedding(config)
    model.norm.load_state_dict({"weight": load("model.norm.weight")}, assign=True)
    return model


class Loader:
    """Parameters by name, in the dtype that from_pretrained would give them."""

    def __init__(self, checkpoint: Checkpoint, dtype: Dtype) -> None:
        import torch
        from transformers import GptOssModel

        self.tensors = checkpoint.tensors
        self.dtype = torch_dtype(dtype)
        # As transformers has it: these modules stay in float32 when the model is asked for in float16 only.
        keep = GptOssModel._keep_in_fp32_modules or [] if self.dtype is torch.float16 else []
        self._in_float32 = frozenset(keep)

    def __call__(self, name: str) -> torch.Tensor:
        import torch

        kept = not self._in_float32.isdisjoint(name.split("."))
        return as_torch(torch.float32 if kept else self.dtype, read_tensor(self.tensors[name]))


def stream_layer(load: Loader, index: int, layer: torch.nn.Module, done: Callable[[], None] | None = None) -> None:
    """Has the layer's parameters loaded just before it runs and dropped just after; `done` is called then."""
    prefix = f"model.layers.{index}."
    experts = layer.get_submodule("mlp.experts")
    for name in ("gate_up_proj", "down_proj"):
        delattr(experts, name)
        setattr(experts, name, _ExpertSlices(load.tensors, f"{prefix}mlp.experts.{name}", load.dtype))

    def fill(*_: object) -> None:
        layer.load_state_dict({n: load(prefix + n) for n in layer.state_dict()}, assign=True)

    def drop(*_: object) -> None:
        layer.to("meta")
        if done is not None:
            done()

    layer.register_forward_pre_hook(fill)
    layer.register_forward_hook(drop)


class _ExpertSlices:
    """Stands in for GptOssExperts.gate_up_proj or down_proj: indexed by expert, it gives [K, rows] in dtype.

    gpt-oss' eager forward does nothing else with them, and only asks for experts that some token went to.
    """

    def __init__(self, tensors: Mapping[str, TensorRef], name: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._stored = [tensors[n] for n in (name, f"{name}_blocks", f"{name}_scales") if n in tensors]

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        e = int(expert)
        stored = [read_tensor(ref)[e] for ref in self._stored]
        if len(stored) == 1:
            return as_torch(self._dtype, stored[0])
        # Every row goes in as an expert of one row: the function then has nothing to transpose, and the
        # transposition that it owes is a view, which saves 40 % of the time.
        blocks, scales = (torch.from_numpy(np.array(part)).unsqueeze(1) for part in stored)
        decoded: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=self._dtype)
        return decoded.squeeze(-1).T


@dataclass(frozen=True)
class Batch:
    """Sequences of several lengths as one batch, padded on the right.

    values [B, S, H]; mask [B, S] int64, 1 for tokens and 0 for padding.
    """

    values: torch.Tensor
    mask: torch.Tensor
    lengths: tuple[int, ...]

    def rows(self, value: torch.Tensor) -> torch.Tensor:
        """Of a value [B, S, W] or [B * S, W] the rows of tokens, [sum of lengths, W], sequence after sequence."""
        return value.reshape(self.mask.numel(), -1)[self.mask.flatten().bool()]


def pad(sequences: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Batch:
    """Sequences [n, H] of float32 or bfloat16, with zeros after their ends."""
    import torch

    lengths = tuple(len(sequence) for sequence in sequences)
    values = torch.zeros(len(lengths), max(lengths), sequences[0].shape[1], dtype=dtype)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        values[row, : len(sequence)] = as_torch(dtype, sequence)
        mask[row, : len(sequence)] = 1
    return Batch(values, mask, lengths)


def torch_dtype(dtype: Dtype) -> torch.dtype:
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def as_torch(dtype: torch.dtype, stored: NDArray[np.generic]) -> torch.Tensor:
    """An array of float32, or of bfloat16 in whatever two-byte dtype it is held, converted to dtype."""
    import torch

    copied = np.array(stored)  # torch wants memory that it may write
    if copied.dtype == np.float32:
        return torch.from_numpy(copied).to(dtype)
    return torch.from_numpy(copied.view(np.uint16)).view(torch.bfloat16).to(dtype)

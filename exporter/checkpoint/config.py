"""What a gpt-oss config.json says, in one form, whichever of the three styles it was written in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerType = Literal["sliding_attention", "full_attention"]


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (https://arxiv.org/abs/2309.00071): how RoPE's frequencies are stretched to a longer context.

    `truncate` decides whether the correction range is rounded to whole dimensions; gpt-oss does not round.
    """

    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one gpt-oss network; everything that the graph depends on and nothing else."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_experts: int
    top_k: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None
    max_positions: int
    swiglu_alpha: float
    swiglu_limit: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    bos_token_id: int | None

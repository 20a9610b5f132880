"""gpt-oss, top to bottom: the network that is exported, and its specification.

    x = embedding[ids]
    a layer:  x += Attention(RMSNorm(x));  x += MoE(RMSNorm(x))
    logits = W RMSNorm(x)

The mathematics is openai/gpt-oss' `gpt_oss/torch/model.py`. Parameters have Hugging Face's names, shapes and stored
types, so that a checkpoint's tensor belongs to the parameter of its name; every activation is float32. B is the batch,
S the new positions, P the past ones, T = P + S.

Everything works on the meta device, which is where an export traces it: a 120b model costs nothing there.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptoss_export.exporter import ops  # noqa: F401  (registers the torch ops)
from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Layout

Past = tuple[Tensor, Tensor]
"""Keys and values of a layer, [B, kv_heads, P, D] float32 each; the keys are rotated."""


def parameter(*shape: int, dtype: torch.dtype = torch.bfloat16) -> nn.Parameter:
    """A weight as the checkpoint stores it; never trained here."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """RoPE's frequencies [D/2] float32, and the factor on cos and sin, after YaRN (arXiv 2309.00071, section 3).

    Dimensions that turn more than beta_fast times in the original context keep their frequency, those that turn less
    than beta_slow times are slowed down by `factor`, a ramp lies between.
    """
    D, theta, yarn = config.head_dim, config.rope_theta, config.yarn
    with torch.device("cpu"):
        base = theta ** (torch.arange(0, D, 2, dtype=torch.int64).float() / D)
        if yarn is None:
            return 1.0 / base, 1.0

        def dimension(turns: float) -> float:
            return D * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, D - 1)
        ramp = (torch.arange(D // 2, dtype=torch.float32) - low) / (max(high - low, 1e-3))
        keep = 1 - torch.clamp(ramp, 0, 1)
        frequencies = (1.0 / (yarn.factor * base)) * (1 - keep) + (1.0 / base) * keep
        return frequencies, 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


class RotaryTables(nn.Module):
    """Positions -> cos and sin [B, S, D/2] float32, both multiplied by YaRN's attention factor."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inv_freq, self.factor = inverse_frequencies(config)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.clamp(min=0)[..., None].float() * self.inv_freq.to(positions.device)
        return angles.cos() * self.factor, angles.sin() * self.factor


def key_positions(attention_mask: Tensor) -> Tensor:
    """attention_mask [B, T] int64 -> the position of each token in its text [B, T] int64, -1 for padding."""
    return torch.where(attention_mask != 0, attention_mask.cumsum(-1) - 1, -1)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = parameter(size), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.float(), self.eps)


class Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = parameter(outputs, inputs), parameter(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.gptoss.linear(x, self.weight, self.bias))


class Attention(nn.Module):
    """Grouped-query attention with sinks; `window` 0 sees everything before it."""

    def __init__(self, config: ModelConfig, window: int) -> None:
        super().__init__()
        H, D, heads, kv = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        self.q_proj, self.k_proj, self.v_proj = Linear(H, heads * D), Linear(H, kv * D), Linear(H, kv * D)
        self.o_proj = Linear(heads * D, H)
        self.sinks = parameter(heads)
        self.heads, self.kv, self.window, self.scale = heads, kv, window, D**-0.5

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], q_pos: Tensor, k_pos: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        q = torch.onnx.ops.rotary_embedding(self.q_proj(x), *rope, num_heads=self.heads)
        k = torch.onnx.ops.rotary_embedding(self.k_proj(x), *rope, num_heads=self.kv)
        attention, keys, values = torch.ops.gptoss.sink_attention(
            q, k, self.v_proj(x), *past, self.sinks, q_pos, k_pos, self.heads, self.kv, self.scale, self.window
        )  # fmt: skip
        return self.o_proj(attention), (keys, values)


class Router(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight, self.bias = (
            parameter(config.num_experts, config.hidden_size),
            parameter(config.num_experts),
        )
        self.top_k = config.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", torch.ops.gptoss.moe_router(x, self.weight, self.bias, self.top_k))


class Experts(nn.Module):
    """MXFP4 experts: rows are output features; of h's rows the even ones are gate, the odd ones up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_up_proj_blocks = parameter(E, 2 * I, H // 32, 16, dtype=torch.uint8)
        self.gate_up_proj_scales = parameter(E, 2 * I, H // 32, dtype=torch.uint8)
        self.gate_up_proj_bias = parameter(E, 2 * I)
        self.down_proj_blocks = parameter(E, H, I // 32, 16, dtype=torch.uint8)
        self.down_proj_scales = parameter(E, H, I // 32, dtype=torch.uint8)
        self.down_proj_bias = parameter(E, H)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.ops.gptoss.moe_experts(
            x, weights, experts,
            self.gate_up_proj_blocks, self.gate_up_proj_scales, self.gate_up_proj_bias,
            self.down_proj_blocks, self.down_proj_scales, self.down_proj_bias,
            self.alpha, self.limit,
        )  # fmt: skip
        return cast(Tensor, y)


class DenseExperts(nn.Module):
    """The experts of bfloat16 fine-tunes, which store them input-major."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.intermediate_size  # noqa: E741
        self.gate_up_proj, self.gate_up_proj_bias = parameter(E, H, 2 * I), parameter(E, 2 * I)
        self.down_proj, self.down_proj_bias = parameter(E, I, H), parameter(E, H)
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        y = torch.ops.gptoss.moe_experts_dense(
            x, weights, experts, self.gate_up_proj, self.gate_up_proj_bias, self.down_proj, self.down_proj_bias,
            self.alpha, self.limit,
        )  # fmt: skip
        return cast(Tensor, y)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.router = Router(config)
        self.experts = DenseExperts(config) if layout is Layout.HF_BF16 else Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.experts(x, *self.router(x)))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layout: Layout, index: int) -> None:
        super().__init__()
        sliding = config.layer_types[index] == "sliding_attention"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.sliding_window if sliding else 0)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, layout)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], q_pos: Tensor, k_pos: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        attention, present = self.self_attn(self.input_layernorm(x), rope, q_pos, k_pos, past)
        x = x + attention
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    def __init__(self, config: ModelConfig, layout: Layout) -> None:
        super().__init__()
        self.embed_tokens = nn.ParameterDict({"weight": parameter(config.vocab_size, config.hidden_size)})
        self.layers = nn.ModuleList(Layer(config, layout, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class GptOss(nn.Module):
    """The whole network. `embed`, a layer and `head` are also what an export traces, each on its own."""

    def __init__(self, config: ModelConfig, layout: Layout = Layout.HF_MXFP4) -> None:
        super().__init__()
        self.model = Decoder(config, layout)
        self.lm_head = nn.ParameterDict({"weight": parameter(config.vocab_size, config.hidden_size)})
        self.rope = RotaryTables(config)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """input_ids [B, S], attention_mask [B, T] -> x [B, S, H], cos, sin [B, S, D/2], positions [B, S], [B, T]."""
        k_pos = key_positions(attention_mask)
        q_pos = k_pos[:, attention_mask.shape[1] - input_ids.shape[1] :]
        x = F.embedding(input_ids, self.model.embed_tokens["weight"]).float()
        return x, *self.rope(q_pos), q_pos, k_pos

    def head(self, x: Tensor) -> Tensor:
        """x [B, S, H] -> logits [B, S, V] float32."""
        return cast(Tensor, torch.ops.gptoss.linear_no_bias(self.model.norm(x), self.lm_head["weight"]))

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[Past], num_logits_to_keep: int = 0
    ) -> tuple[Tensor, list[Past]]:
        """input_ids [B, S] int64, attention_mask [B, T] int64, a past for each layer -> logits, a present each.

        logits [B, S or num_logits_to_keep, V] float32: of the last positions only, 0 means of all.
        """
        x, cos, sin, q_pos, k_pos = self.embed(input_ids, attention_mask)
        presents = []
        for layer, layer_past in zip(self.model.layers, past, strict=True):
            x, present = layer(x, (cos, sin), q_pos, k_pos, layer_past)
            presents.append(present)
        return self.head(x[:, -num_logits_to_keep:]), presents

"""How many bytes of weights one token needs: the numerator of every claim about memory bandwidth."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.layouts import stored_tensors
from gptoss_export.exporter.checkpoint.tensors import Layout

_INT8_SHARE = 34 / 64
"""32 int8 and their bfloat16 scale, of 32 bfloat16."""


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of weights that decoding one row by one token reads once, biases and scales included.

    experts: top_k of each layer. attention: q, k, v, o and sinks. embedding: one row. norms: all of them.
    The KV cache and the activations are not weights and not counted.
    """

    experts: int
    router: int
    attention: int
    norms: int
    lm_head: int
    embedding: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def token_bytes(config: ModelConfig, layout: Layout, int8_from: int | None = None) -> TokenBytes:
    """Counts the tensors that a checkpoint of this shape and layout holds.

    int8_from: the first layer whose q, k, v and o the artifact holds in int8, as it then does lm_head; None for all of
    them as stored.
    """
    int8 = set() if int8_from is None else {f"model.layers.{n}." for n in range(int8_from, config.num_layers)}
    sums = dict.fromkeys((field.name for field in fields(TokenBytes)), 0.0)
    for tensor in stored_tensors(config, layout):
        name, nbytes = tensor.parts[0].name, float(tensor.nbytes)
        if ".mlp.experts." in name:
            sums["experts"] += nbytes * config.top_k / config.num_experts
        elif ".mlp.router." in name:
            sums["router"] += nbytes
        elif ".self_attn." in name:
            layer = name[: name.index("self_attn.")]
            sums["attention"] += nbytes * (_INT8_SHARE if layer in int8 and name.endswith("_proj.weight") else 1)
        elif name.startswith("lm_head."):
            sums["lm_head"] += nbytes * (1 if int8_from is None else _INT8_SHARE)
        elif name.startswith("model.embed_tokens."):
            sums["embedding"] += nbytes / config.vocab_size
        else:
            sums["norms"] += nbytes
    return TokenBytes(**{name: round(value) for name, value in sums.items()})

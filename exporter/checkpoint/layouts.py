"""What tensors a gpt-oss of a given shape has, in each of the layouts in which its weights are published.

One table serves reading, checking and writing: canonical (Hugging Face) names on one side, on the other the
tensor as it is stored. V vocabulary, H hidden, I expert intermediate, E experts, Q and K rows of q and k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from gptoss_export.exporter.checkpoint.config import MXFP4_GROUP, ModelConfig
from gptoss_export.exporter.checkpoint.tensors import Layout

ITEMSIZE = {"BF16": 2, "U8": 1}


@dataclass(frozen=True)
class Part:
    """A canonical tensor inside a stored one: whole rows of it, so its bytes are contiguous.

    start: its first byte, counted from the first byte of the stored tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file has it, and the canonical tensors that it is made of."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


def stored_tensors(config: ModelConfig, layout: Layout) -> Iterator[StoredTensor]:
    """Every tensor that a checkpoint must hold, no more and no less, in the order of the network."""
    V, H = config.vocab_size, config.hidden_size
    names = _ORIGINAL if layout is Layout.ORIGINAL else {}
    yield _one("model.embed_tokens.weight", (V, H), names=names)
    for n in range(config.num_layers):
        for tensor in _layer(config, layout):
            yield _numbered(tensor, n, "block" if layout is Layout.ORIGINAL else "model.layers")
    yield _one("model.norm.weight", (H,), names=names)
    yield _one("lm_head.weight", (V, H), names=names)


def detect_layout(names: Iterable[str]) -> Layout | None:
    """The layout that the stored names speak for, by their experts; None when they are no gpt-oss's."""
    last = {name.rpartition(".experts.")[2] for name in names if ".experts." in name}
    if last & {"gate_up_proj_blocks", "gate_up_proj_scales", "down_proj_blocks", "down_proj_scales"}:
        return Layout.HF_MXFP4
    if last & {"gate_up_proj", "down_proj"}:
        return Layout.HF_BF16
    return Layout.ORIGINAL if any(".mlp.mlp1_weight" in n or ".mlp.mlp2_weight" in n for n in names) else None


def _layer(config: ModelConfig, layout: Layout) -> Iterator[StoredTensor]:
    H, E = config.hidden_size, config.num_experts
    Q, K = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    names = _ORIGINAL if layout is Layout.ORIGINAL else {}
    yield _one("input_layernorm.weight", (H,), names=names)
    qkv = (("q", Q), ("k", K), ("v", K))
    for kind, tail in (("weight", (H,)), ("bias", ())):
        parts = [(f"self_attn.{letter}_proj.{kind}", (rows, *tail)) for letter, rows in qkv]
        if layout is Layout.ORIGINAL:
            yield _stack(f"attn.qkv.{kind}", (Q + 2 * K, *tail), parts)
        else:
            yield from (_one(name, shape) for name, shape in parts)
    yield _one("self_attn.o_proj.weight", (H, Q), names=names)
    yield _one("self_attn.o_proj.bias", (H,), names=names)
    yield _one("self_attn.sinks", (config.num_heads,), names=names)
    yield _one("post_attention_layernorm.weight", (H,), names=names)
    yield _one("mlp.router.weight", (E, H), names=names)
    yield _one("mlp.router.bias", (E,), names=names)
    yield from _experts("mlp.experts.gate_up_proj", E, 2 * config.intermediate_size, H, layout)
    yield from _experts("mlp.experts.down_proj", E, H, config.intermediate_size, layout)


def _experts(name: str, E: int, rows: int, columns: int, layout: Layout) -> Iterator[StoredTensor]:
    """One projection of all experts, rows being output features; bf16 fine-tunes keep it input-major."""
    names = _ORIGINAL if layout is Layout.ORIGINAL else {}
    if layout is Layout.HF_BF16:
        yield _one(name, (E, columns, rows))
    else:
        groups = columns // MXFP4_GROUP
        yield _one(f"{name}_blocks", (E, rows, groups, MXFP4_GROUP // 2), "U8", names)
        yield _one(f"{name}_scales", (E, rows, groups), "U8", names)
    yield _one(f"{name}_bias", (E, rows), names=names)


# Of tensors that OpenAI's layout stores whole; within a layer the names follow `block.N.`.
_ORIGINAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "self_attn.sinks": "attn.sinks",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
}


def _one(name: str, shape: tuple[int, ...], dtype: str = "BF16", names: dict[str, str] | None = None) -> StoredTensor:
    stored = names[name] if names else name
    return StoredTensor(stored, dtype, shape, (Part(name, shape, 0),))


def _stack(stored: str, shape: tuple[int, ...], members: list[tuple[str, tuple[int, ...]]]) -> StoredTensor:
    parts, start = [], 0
    for name, member in members:
        parts.append(Part(name, member, start))
        start += math.prod(member) * ITEMSIZE["BF16"]
    return StoredTensor(stored, "BF16", shape, tuple(parts))


def _numbered(tensor: StoredTensor, n: int, prefix: str) -> StoredTensor:
    parts = tuple(Part(f"model.layers.{n}.{p.name}", p.shape, p.start) for p in tensor.parts)
    return StoredTensor(f"{prefix}.{n}.{tensor.name}", tensor.dtype, tensor.shape, parts)

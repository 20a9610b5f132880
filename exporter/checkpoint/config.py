"""What a gpt-oss config.json says, in one form, whichever of the three styles it was written in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptoss_export.exporter.checkpoint.fields import Fields
from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.errors import AmbiguousRopeError, ConfigError

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


# Far above gpt-oss-120b in every direction, low enough that no product of them is out of hand.
MAX_VOCAB = 1 << 22
MAX_WIDTH = 1 << 16
MAX_LAYERS = 1024
MAX_EXPERTS = 4096
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_POSITIONS = 1 << 30

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
RMS_NORM_EPS = 1e-5

# One MXFP4 scale covers this many values along a row.
MXFP4_GROUP = 32


def parse_config(raw: Mapping[str, object], eos_from_generation: Mapping[str, object] | None = None) -> ModelConfig:
    """Reads config.json, in any of its three styles, into the one form that the rest of the program knows.

    raw: config.json. Styles: Hugging Face with `rope_scaling` and `rope_theta` (transformers 4), with
    `rope_parameters` (transformers 5), and OpenAI's own keys (`num_experts`, `rope_scaling_factor`, ...).
    eos_from_generation: generation_config.json; its special token ids win over those in config.json.

    Keys that are absent mean what they mean to transformers (or to openai/gpt-oss, for its own style), save
    where two meanings are in use. Raises ConfigError, AmbiguousRopeError, AbsurdSizeError.
    """
    fields = Fields(raw, "config.json")
    if fields.has("model_type"):
        return _huggingface(fields, Fields(eos_from_generation or {}, "generation_config.json"))
    if fields.has("num_experts") and fields.has("rope_scaling_factor"):
        return _original(fields, Fields(eos_from_generation or {}, "generation_config.json"))
    raise fields.error("neither `model_type` nor the keys of OpenAI's own style (`num_experts`, ...) are there")


def _huggingface(fields: Fields, generation: Fields) -> ModelConfig:
    """https://github.com/huggingface/transformers, models/gpt_oss/configuration_gpt_oss.py (5.23)."""
    for key, expected in (("model_type", "gpt_oss"), ("hidden_act", "silu")):
        if (value := fields.text(key, expected)) != expected:
            raise fields.error(f"{key} is {shown(value)}, not {expected!r}: this is not a gpt-oss network")
    if fields.flag("tie_word_embeddings"):
        raise fields.error("tie_word_embeddings is true, and no gpt-oss shares embedding and lm_head")
    if fields.flag("attention_bias") is False:
        raise fields.error("attention_bias is false, and every gpt-oss has biases on q, k, v and o")
    quantization = fields.table("quantization_config")
    if quantization and (method := quantization.text("quant_method")) != "mxfp4":
        raise ConfigError(
            f"{quantization.where}: quant_method is {shown(method)}; only mxfp4 and plain bf16 can be read",
            "Give the checkpoint that this one was quantised from.",
        )
    num_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    layer_types = _layer_types(fields, num_layers)
    max_positions = fields.integer("max_position_embeddings", MAX_POSITIONS)
    rope_theta, yarn = _huggingface_rope(fields)
    slides = fields.has("sliding_window") or "sliding_attention" in layer_types
    return _checked(
        fields,
        generation,
        num_layers=num_layers,
        num_experts=fields.integer(
            "num_experts" if not fields.has("num_local_experts") and fields.has("num_experts") else "num_local_experts",
            MAX_EXPERTS,
        ),
        top_k=fields.integer("num_experts_per_tok", MAX_EXPERTS),
        sliding_window=fields.integer("sliding_window", MAX_POSITIONS) if slides else max_positions,
        layer_types=layer_types,
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, RMS_NORM_EPS),
        rope_theta=rope_theta,
        yarn=yarn,
        max_positions=max_positions,
    )


def _original(fields: Fields, generation: Fields) -> ModelConfig:
    """https://github.com/openai/gpt-oss, gpt_oss/torch/model.py: even layers slide, YaRN is never rounded."""
    num_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
    context = fields.integer("initial_context_length", MAX_POSITIONS)
    factor = fields.number("rope_scaling_factor", 0.0, MAX_POSITIONS)
    yarn = None
    if factor > 1.0:
        fast, slow = fields.number("rope_ntk_beta", 0.0, 1e6), fields.number("rope_ntk_alpha", 0.0, 1e6)
        yarn = _yarn(fields, factor, fast, slow, context, truncate=False)
    return _checked(
        fields,
        generation,
        num_layers=num_layers,
        num_experts=fields.integer("num_experts", MAX_EXPERTS),
        top_k=fields.integer("experts_per_token", MAX_EXPERTS),
        sliding_window=fields.integer("sliding_window", MAX_POSITIONS),
        layer_types=alternating(num_layers),
        rms_norm_eps=RMS_NORM_EPS,
        rope_theta=fields.number("rope_theta", 1.0, 1e12),
        yarn=yarn,
        max_positions=int(context * max(factor, 1.0)),
    )


def _checked(
    fields: Fields,
    generation: Fields,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    sliding_window: int,
    layer_types: tuple[LayerType, ...],
    rms_norm_eps: float,
    rope_theta: float,
    yarn: YarnConfig | None,
    max_positions: int,
) -> ModelConfig:
    """Adds the fields that all styles share, and checks what must hold between fields."""
    vocab_size = fields.integer("vocab_size", MAX_VOCAB)
    hidden_size = fields.integer("hidden_size", MAX_WIDTH)
    intermediate_size = fields.integer("intermediate_size", MAX_WIDTH)
    num_heads = fields.integer("num_attention_heads", MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", MAX_HEADS)
    head_dim = fields.integer("head_dim", MAX_HEAD_DIM)
    for key, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % MXFP4_GROUP:
            raise fields.error(f"{key} is {size}, not a multiple of {MXFP4_GROUP} as MXFP4 needs")
    if num_heads % num_kv_heads:
        raise fields.error(f"{num_heads} query heads cannot share {num_kv_heads} key/value heads evenly")
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}, and RoPE needs an even one")
    if top_k > num_experts:
        raise fields.error(f"{top_k} experts per token, of {num_experts} experts")
    if max_positions > MAX_POSITIONS:
        raise fields.error(f"{max_positions} positions, more than {MAX_POSITIONS}")

    def special(key: str) -> tuple[int, ...]:
        return generation.token_ids(key, vocab_size) or fields.token_ids(key, vocab_size)

    def single(key: str) -> int | None:
        ids = special(key)
        if len(ids) > 1:
            raise fields.error(f"{key} holds {len(ids)} tokens, not one")
        return ids[0] if ids else None

    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        sliding_window=sliding_window,
        layer_types=layer_types,
        rms_norm_eps=rms_norm_eps,
        rope_theta=rope_theta,
        yarn=yarn,
        max_positions=max_positions,
        swiglu_alpha=fields.number("swiglu_alpha", 0.0, 1e3, SWIGLU_ALPHA),
        swiglu_limit=fields.number("swiglu_limit", 0.0, 1e6, SWIGLU_LIMIT),
        eos_token_ids=special("eos_token_id"),
        pad_token_id=single("pad_token_id"),
        bos_token_id=single("bos_token_id"),
    )


def alternating(num_layers: int) -> tuple[LayerType, ...]:
    """The released pattern: layers 0, 2, 4, ... slide, the others see everything."""
    return tuple("full_attention" if i % 2 else "sliding_attention" for i in range(num_layers))


def _layer_types(fields: Fields, num_layers: int) -> tuple[LayerType, ...]:
    if not fields.has("layer_types"):
        return alternating(num_layers)
    value = fields.raw["layer_types"]
    if not isinstance(value, list):
        raise fields.error(f"layer_types is {shown(value)}, not a list")
    if len(value) != num_layers:
        raise fields.error(f"layer_types has {len(value)} entries for {num_layers} layers")
    types: list[LayerType] = []
    for i, kind in enumerate(value):
        if kind not in ("sliding_attention", "full_attention"):
            raise fields.error(f"layer_types[{i}] is {shown(kind)}, not 'sliding_attention' or 'full_attention'")
        types.append(kind)
    return tuple(types)


def _huggingface_rope(fields: Fields) -> tuple[float, YarnConfig | None]:
    """RoPE's theta and scaling; where both styles are in one file they must agree."""
    tables = [table for key in ("rope_scaling", "rope_parameters") if (table := fields.table(key))]
    if not tables:
        raise AmbiguousRopeError(
            f"{fields.where}: neither rope_scaling nor rope_parameters is there, and versions of "
            "transformers differ in what they then assume",
            "Add the rope_scaling of the model that this one descends from; for plain RoPE, "
            '"rope_scaling": {"rope_type": "default"}.',
        )
    readings = [_rope_table(fields, table) for table in tables]
    if readings[0] != readings[-1]:
        raise fields.error("rope_scaling and rope_parameters say different things")
    return readings[0]


def _rope_table(fields: Fields, table: Fields) -> tuple[float, YarnConfig | None]:
    both = [source for source in (table, fields) if source.has("rope_theta")]
    if not both:
        raise fields.error("rope_theta is missing")
    thetas = {source.number("rope_theta", 1.0, 1e12) for source in both}
    if len(thetas) > 1:
        raise fields.error(f"rope_theta is {max(thetas):g} in one place and {min(thetas):g} in another")
    for source in (fields, table):
        if source.number("partial_rotary_factor", 0.0, 1.0, 1.0) != 1.0:
            raise source.error("partial_rotary_factor is not 1, and gpt-oss rotates whole heads")
    rope_type = table.text("rope_type", table.text("type") if table.has("type") else None)
    if rope_type == "default":
        return thetas.pop(), None
    if rope_type != "yarn":
        raise table.error(f"rope_type is {shown(rope_type)}; gpt-oss uses 'yarn', or 'default' for none")
    factor = table.number("factor", 0.0, 1e6)
    if factor < 1.0:
        raise table.error(f"factor is {factor:g}, less than 1")
    concentration = 0.1 * math.log(factor) + 1.0
    if not math.isclose(table.number("attention_factor", 0.0, 1e6, concentration), concentration, rel_tol=1e-6):
        raise table.error(f"attention_factor is not 0.1 ln(factor) + 1 = {concentration:.6g}")
    if table.has("mscale") and table.has("mscale_all_dim"):
        raise table.error("mscale and mscale_all_dim are another network's")
    context = table.integer("original_max_position_embeddings", MAX_POSITIONS)
    if fields.has("original_max_position_embeddings") and (
        fields.integer("original_max_position_embeddings", MAX_POSITIONS) != context
    ):
        raise fields.error("original_max_position_embeddings is not the one inside the RoPE parameters")
    truncate = table.flag("truncate")
    if truncate is None:
        raise AmbiguousRopeError(
            f"{table.where}: YaRN without `truncate`: transformers then rounds, gpt-oss does not",
            'Add "truncate": false to it if the model descends from the released gpt-oss, "truncate": true '
            "if it was trained with a rounded correction range.",
        )
    fast, slow = table.number("beta_fast", 0.0, 1e6, 32.0), table.number("beta_slow", 0.0, 1e6, 1.0)
    return thetas.pop(), _yarn(table, factor, fast, slow, context, truncate)


def _yarn(fields: Fields, factor: float, fast: float, slow: float, context: int, truncate: bool) -> YarnConfig:
    if not slow < fast:
        raise fields.error(f"YaRN's fast boundary ({fast:g} rotations) is not above its slow one ({slow:g})")
    return YarnConfig(factor=factor, beta_fast=fast, beta_slow=slow, original_context=context, truncate=truncate)

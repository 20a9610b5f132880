"""The checkpoint's config as transformers understands it."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

from gptoss_export.exporter.checkpoint.config import ModelConfig
from gptoss_export.exporter.checkpoint.files import one_line
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GptOssConfig


def transformers_config(checkpoint: Checkpoint) -> GptOssConfig:
    """The config for transformers' GptOss, with eager attention and eager experts.

    For Hugging Face layouts it is built from config.json as it stands, so that an error of our own reader
    cannot hide in both sides of the comparison. The OpenAI layout has keys that transformers does not know;
    there our reading is used. Raises ConfigError when transformers refuses it.
    """
    from transformers import GptOssConfig

    raw: Mapping[str, object]
    if "model_type" in checkpoint.raw_config:
        # A copy: transformers writes into the tables that it is given.
        raw = {k: deepcopy(v) for k, v in checkpoint.raw_config.items() if k != "quantization_config"}
    else:
        raw = _keys_for_transformers(checkpoint.config)
    # These would make forward collect the states of every layer.
    raw = {**raw, "output_hidden_states": False, "output_attentions": False, "output_router_logits": False}
    try:
        return GptOssConfig.from_dict(raw, attn_implementation="eager", experts_implementation="eager")
    except Exception as error:  # its strict dataclasses raise types of their own
        line = one_line(error, 400)
        raise ConfigError(
            f"transformers refuses this config.json: {line}",
            "Compare config.json with the one that the model was released with.",
        ) from error


def _keys_for_transformers(config: ModelConfig) -> dict[str, object]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        rope |= {
            "rope_type": "yarn",
            "factor": config.yarn.factor,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "original_max_position_embeddings": config.yarn.original_context,
            "truncate": config.yarn.truncate,
        }
    return {
        "num_hidden_layers": config.num_layers,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.sliding_window,
        "layer_types": list(config.layer_types),
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_positions,
        "swiglu_alpha": config.swiglu_alpha,
        "swiglu_limit": config.swiglu_limit,
        "pad_token_id": config.pad_token_id,
    }

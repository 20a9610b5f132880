"""genai_config.json: with it onnxruntime-genai runs the artifact's folder as it is, from Python, C++, C# or Java."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gptoss_export.exporter.checkpoint.config import ModelConfig

GENAI_FILE = "genai_config.json"


def write_genai_config(config: ModelConfig, model_file: str, folder: Path, *, shared_cache: bool) -> str:
    """Writes the file into `folder`, if the checkpoint says where a text ends, and says what was done.

    onnxruntime-genai needs an end-of-text token, and a guessed one would cut texts or never end them. Decoding is
    greedy unless a caller asks for something else. shared_cache: whether the model updates its cache in place.
    """
    eos = list(config.eos_token_ids)
    if not eos:
        return f"{GENAI_FILE}: not written, because the checkpoint names no end-of-text token"
    model = {
        "type": "gptoss",
        "vocab_size": config.vocab_size,
        "context_length": config.max_positions,
        "bos_token_id": config.bos_token_id if config.bos_token_id is not None else eos[0],
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id if config.pad_token_id is not None else eos[0],
        "decoder": {
            "filename": model_file,
            "hidden_size": config.hidden_size,
            "head_size": config.head_dim,
            "num_attention_heads": config.num_heads,
            "num_hidden_layers": config.num_layers,
            "num_key_value_heads": config.num_kv_heads,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        "do_sample": False,
        "max_length": config.max_positions,
        "num_beams": 1,
        "past_present_share_buffer": shared_cache,
    }
    (folder / GENAI_FILE).write_text(genai_json({"model": model, "search": search}), encoding="utf-8")
    return f"{GENAI_FILE}: onnxruntime-genai runs this folder"


def genai_json(config: Mapping[str, object]) -> str:
    """The file's text: the same for the same content."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"

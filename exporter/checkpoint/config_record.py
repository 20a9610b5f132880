"""A ModelConfig out of a manifest, where `dataclasses.asdict` put it: types and ranges checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gptoss_export.exporter.checkpoint import config as limits
from gptoss_export.exporter.checkpoint.config import ModelConfig, YarnConfig
from gptoss_export.exporter.checkpoint.files import shown

_MOST = {
    "vocab_size": limits.MAX_VOCAB,
    "hidden_size": limits.MAX_WIDTH,
    "intermediate_size": limits.MAX_WIDTH,
    "num_layers": limits.MAX_LAYERS,
    "num_experts": limits.MAX_EXPERTS,
    "top_k": limits.MAX_EXPERTS,
    "num_heads": limits.MAX_HEADS,
    "num_kv_heads": limits.MAX_HEADS,
    "head_dim": limits.MAX_HEAD_DIM,
    "sliding_window": limits.MAX_POSITIONS,
    "max_positions": limits.MAX_POSITIONS,
    "original_context": limits.MAX_POSITIONS,
}
_TOKENS = ("eos_token_ids", "pad_token_id", "bos_token_id")


def config_from_record(raw: Mapping[str, object]) -> ModelConfig:
    """Raises ValueError, in a few words that name the field, for anything that `parse_config` could not have made."""
    yarn = raw.get("yarn")
    if yarn is not None and not isinstance(yarn, Mapping):
        raise ValueError(f"yarn is {shown(yarn)}, not an object")
    made = ModelConfig(
        **_values(ModelConfig, raw), yarn=None if yarn is None else YarnConfig(**_values(YarnConfig, yarn))
    )
    if len(made.layer_types) != made.num_layers:
        raise ValueError(f"layer_types has {len(made.layer_types)} entries for {made.num_layers} layers")
    named = [*made.eos_token_ids, *(token for token in (made.pad_token_id, made.bos_token_id) if token is not None)]
    if any(token >= made.vocab_size for token in named):
        raise ValueError(f"the token id {max(named)} is outside of the vocabulary of {made.vocab_size}")
    return made


def _values(kind: type, raw: Mapping[str, object]) -> dict[str, Any]:
    return {f.name: _value(f.name, str(f.type), raw.get(f.name)) for f in fields(kind) if f.name != "yarn"}


def _value(name: str, hint: str, value: object) -> object:
    if hint.startswith("tuple"):
        if not isinstance(value, list):
            raise ValueError(f"{name} is {shown(value)}, not a list")
        return tuple(_layer_type(item) if name == "layer_types" else _integer(name, item) for item in value)
    if hint == "int | None":
        return None if value is None else _integer(name, value)
    if hint == "int":
        return _integer(name, value)
    if hint == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}, not true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1e12:
        raise ValueError(f"{name} is {shown(value)}, not a number that it can be")
    return float(value)


def _integer(name: str, value: object) -> int:
    low, high = (0, limits.MAX_VOCAB - 1) if name in _TOKENS else (1, _MOST[name])
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}, not an integer from {low} to {high}")
    return value


def _layer_type(value: object) -> str:
    if not isinstance(value, str) or value not in ("sliding_attention", "full_attention"):
        raise ValueError(f"layer_types holds {shown(value)}")
    return value

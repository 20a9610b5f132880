"""config.json in its three styles, and every way in which it can be wrong."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_export.exporter.checkpoint.config import ModelConfig, YarnConfig, parse_config
from gptoss_export.exporter.errors import AbsurdSizeError, AmbiguousRopeError, CheckpointError, ConfigError

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
TRANSFORMERS_4 = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "eos_token_id": 200002,
    "pad_token_id": 199999,
    "hidden_act": "silu",
    "num_experts_per_tok": 4,
    "num_local_experts": 32,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": YARN,
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
TRANSFORMERS_5 = {k: v for k, v in TRANSFORMERS_4.items() if k not in ("rope_scaling", "rope_theta")} | {
    "rope_parameters": YARN | {"rope_theta": 150000.0},
    "swiglu_alpha": 1.702,
}
OPENAI = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
GPT_OSS_20B = ModelConfig(
    vocab_size=201088,
    hidden_size=2880,
    intermediate_size=2880,
    num_layers=24,
    num_experts=32,
    top_k=4,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    sliding_window=128,
    layer_types=("sliding_attention", "full_attention") * 12,
    rms_norm_eps=1e-5,
    rope_theta=150000.0,
    yarn=YarnConfig(factor=32.0, beta_fast=32.0, beta_slow=1.0, original_context=4096, truncate=False),
    max_positions=131072,
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    eos_token_ids=(200002,),
    pad_token_id=199999,
    bos_token_id=None,
)
STYLES = {"transformers-4": TRANSFORMERS_4, "transformers-5": TRANSFORMERS_5, "openai": OPENAI}


def without(raw, *keys):
    return {k: v for k, v in raw.items() if k not in keys}


def with_yarn(**changes):
    return TRANSFORMERS_4 | {"rope_scaling": YARN | changes}


def test_three_styles_one_meaning():
    assert parse_config(TRANSFORMERS_4) == GPT_OSS_20B
    assert parse_config(TRANSFORMERS_5) == GPT_OSS_20B
    assert parse_config(OPENAI) == replace(GPT_OSS_20B, eos_token_ids=(), pad_token_id=None)


def test_transformers_reads_the_same(tiny_dir: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tiny_dir)
    ours = parse_config(json.loads((tiny_dir / "config.json").read_text()))
    saved = parse_config(json.loads(theirs.to_json_string()))  # the style of transformers 5
    assert saved == ours
    assert ours.layer_types == tuple(theirs.layer_types)
    assert (ours.swiglu_alpha, ours.swiglu_limit) == (theirs.swiglu_alpha, theirs.swiglu_limit)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    optional = ["layer_types", "rms_norm_eps", "swiglu_limit", "tie_word_embeddings", "attention_bias", "hidden_act"]
    assert parse_config(without(TRANSFORMERS_4, *optional)) == GPT_OSS_20B
    odd = without(TRANSFORMERS_4, *optional) | {"num_hidden_layers": 5}
    assert parse_config(odd).layer_types == tuple(transformers.GptOssConfig(**deepcopy(odd)).layer_types)


def test_layer_types_are_read_not_assumed():
    types = ["full_attention"] * 23 + ["sliding_attention"]
    assert parse_config(TRANSFORMERS_4 | {"layer_types": types}).layer_types == tuple(types)


def test_a_window_is_needed_only_where_a_layer_slides():
    with pytest.raises(ConfigError, match="sliding_window"):
        parse_config(TRANSFORMERS_4 | {"sliding_window": None})
    full = TRANSFORMERS_4 | {"sliding_window": None, "layer_types": ["full_attention"] * 24}
    assert parse_config(full).sliding_window == 131072


def test_plain_rope():
    raw = TRANSFORMERS_4 | {"rope_scaling": {"rope_type": "default"}}
    assert parse_config(raw) == replace(GPT_OSS_20B, yarn=None)
    plain = OPENAI | {"rope_scaling_factor": 1.0}
    assert (parse_config(plain).yarn, parse_config(plain).max_positions) == (None, 4096)


def test_swiglu_constants_are_read():
    config = parse_config(TRANSFORMERS_5 | {"swiglu_alpha": 1.5, "swiglu_limit": 6})
    assert (config.swiglu_alpha, config.swiglu_limit) == (1.5, 6.0)


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("style", ["transformers-4", "transformers-5"])
def test_truncate_is_taken_as_given(style, truncate):
    key = "rope_scaling" if style == "transformers-4" else "rope_parameters"
    raw = STYLES[style] | {key: STYLES[style][key] | {"truncate": truncate}}
    assert parse_config(raw).yarn.truncate is truncate


@pytest.mark.parametrize(
    "raw",
    [
        TRANSFORMERS_4 | {"rope_scaling": without(YARN, "truncate")},
        with_yarn(truncate=None),
        TRANSFORMERS_5 | {"rope_parameters": without(TRANSFORMERS_5["rope_parameters"], "truncate")},
        without(TRANSFORMERS_4, "rope_scaling"),
        TRANSFORMERS_4 | {"rope_scaling": None},
        TRANSFORMERS_4 | {"rope_scaling": {}},
    ],
)
def test_ambiguous_rope_is_asked_about(raw):
    with pytest.raises(AmbiguousRopeError) as e:
        parse_config(raw)
    assert "Add" in e.value.next_step


@pytest.mark.parametrize(
    ("generation", "eos"),
    [
        (None, (200002,)),
        ({}, (200002,)),
        ({"eos_token_id": None}, (200002,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [200002, 199999, 200012, 199999]}, (200002, 199999, 200012)),
    ],
)
def test_generation_config_wins_for_eos(generation, eos):
    assert parse_config(TRANSFORMERS_4, generation).eos_token_ids == eos


def test_generation_config_gives_bos_and_pad():
    config = parse_config(TRANSFORMERS_4, {"bos_token_id": 199998, "pad_token_id": 3})
    assert (config.bos_token_id, config.pad_token_id) == (199998, 3)


BROKEN = {
    "another network": ({"model_type": "llama"}, "model_type"),
    "model_type no string": ({"model_type": 3}, "model_type"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    "flag no bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    "no attention bias": ({"attention_bias": False}, "attention_bias"),
    "other quantisation": ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method"),
    "quantisation no object": ({"quantization_config": "mxfp4"}, "quantization_config"),
    "missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "bool is no int": ({"num_hidden_layers": True}, "num_hidden_layers"),
    "float is no int": ({"num_hidden_layers": 24.0}, "num_hidden_layers"),
    "text is no int": ({"vocab_size": "201088"}, "vocab_size"),
    "zero": ({"num_local_experts": 0}, "num_local_experts"),
    "negative": ({"sliding_window": -1}, "sliding_window"),
    "hidden not of 32": ({"hidden_size": 2879}, "hidden_size"),
    "intermediate not of 32": ({"intermediate_size": 48}, "intermediate_size"),
    "heads not shared evenly": ({"num_key_value_heads": 7}, "heads"),
    "odd head_dim": ({"head_dim": 63}, "head_dim"),
    "too many experts a token": ({"num_experts_per_tok": 33}, "experts"),
    "layer_types too short": ({"layer_types": ["full_attention"]}, "layer_types"),
    "layer_types unknown": ({"layer_types": ["chunked_attention"] * 24}, "layer_types"),
    "layer_types nested": ({"layer_types": [[]] * 24}, "layer_types"),
    "layer_types no list": ({"layer_types": "full_attention"}, "layer_types"),
    "eps zero": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "eps no number": ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    "eps nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "limit negative": ({"swiglu_limit": -7.0}, "swiglu_limit"),
    "eos outside": ({"eos_token_id": 201088}, "eos_token_id"),
    "eos negative": ({"eos_token_id": [-1]}, "eos_token_id"),
    "eos no int": ({"eos_token_id": ["<|return|>"]}, "eos_token_id"),
    "eos bool": ({"eos_token_id": True}, "eos_token_id"),
    "two pads": ({"pad_token_id": [1, 2]}, "pad_token_id"),
    "no theta": ({"rope_theta": None}, "rope_theta"),
    "theta of one": ({"rope_theta": 1}, "rope_theta"),
    "rope no object": ({"rope_scaling": "yarn"}, "rope_scaling"),
    "rope without type": ({"rope_scaling": without(YARN, "rope_type")}, "rope_type"),
    "rope of another kind": ({"rope_scaling": YARN | {"rope_type": "llama3"}}, "rope_type"),
    "rope by layer type": ({"rope_scaling": {"full_attention": YARN}}, "rope_type"),
    "factor below one": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
    "no context": ({"rope_scaling": without(YARN, "original_max_position_embeddings")}, "original_max"),
    "two contexts": ({"original_max_position_embeddings": 2048}, "original_max"),
    "betas swapped": ({"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 32.0}}, "boundary"),
    "truncate no bool": ({"rope_scaling": YARN | {"truncate": 0}}, "truncate"),
    "attention_factor": ({"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor"),
    "mscale": ({"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "two ropes that differ": ({"rope_parameters": YARN | {"factor": 16.0}}, "different"),
    "two thetas that differ": ({"rope_scaling": YARN | {"rope_theta": 10000.0}}, "rope_theta"),
}


@pytest.mark.parametrize(("change", "named"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_fields_are_named(change, named):
    with pytest.raises(ConfigError, match=named) as e:
        parse_config(TRANSFORMERS_4 | change)
    assert "\n" not in e.value.what and e.value.next_step


@pytest.mark.parametrize("key", sorted(set(OPENAI) - {"swiglu_limit"}))
def test_openai_style_needs_its_keys(key):
    with pytest.raises(ConfigError):
        parse_config(without(OPENAI, key))


def test_style_is_recognised():
    with pytest.raises(ConfigError, match="model_type"):
        parse_config({"hidden_size": 2880})


def test_transformers_spells_attention_factor_out():
    raw = with_yarn(attention_factor=1.3465735902799727, mscale=None, type="yarn")
    assert parse_config(raw) == GPT_OSS_20B


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_local_experts",
        "num_attention_heads",
        "head_dim",
        "max_position_embeddings",
    ],
)
@pytest.mark.parametrize("size", [1 << 31, 10**19])
def test_absurd_sizes(key, size):
    with pytest.raises(AbsurdSizeError, match=key):
        parse_config(TRANSFORMERS_4 | {key: size})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([4, 32, 64, 128]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*YARN, "quant_method"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@given(
    style=st.sampled_from(sorted(STYLES)),
    changes=st.dictionaries(
        st.sampled_from(sorted({*TRANSFORMERS_4, *TRANSFORMERS_5, *OPENAI})), json_values, max_size=3
    ),
    generation=st.none() | st.dictionaries(st.sampled_from(["eos_token_id", "pad_token_id"]), json_values, max_size=2),
)
def test_any_json_gives_a_config_or_a_typed_error(style, changes, generation):
    try:
        config = parse_config(STYLES[style] | changes, generation)
    except CheckpointError as e:
        assert e.exit_code in (10, 11, 28)
    else:
        assert len(config.layer_types) == config.num_layers
        assert config.num_heads % config.num_kv_heads == 0
        assert all(0 <= t < config.vocab_size for t in config.eos_token_ids)

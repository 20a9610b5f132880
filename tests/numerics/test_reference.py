"""The reference is transformers' GptOss: alone, padded, in every layout, and one layer at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts

from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import ConfigError, PromptError
from gptoss_export.validators.probes import Probe, default_probes
from gptoss_export.validators.reference import check_probes, run_reference
from gptoss_export.validators.transformers_config import transformers_config

MOST = 2e-5
"""The order of summation, which depends on the number of threads: 1.15e-5 with one, less with two."""


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


@pytest.fixture(scope="module")
def probes(checkpoint: Checkpoint) -> tuple[Probe, ...]:
    return default_probes(checkpoint, "quick")


@pytest.fixture(scope="module")
def plain(load_plain: Callable[[torch.dtype], GptOssForCausalLM]) -> GptOssForCausalLM:
    """The whole model in RAM, loaded as transformers loads it."""
    return load_plain(torch.float32)


def plain_logits(model: GptOssForCausalLM, probes: Sequence[Probe]) -> list[np.ndarray]:
    """Logits of one batch padded on the right."""
    longest = max(len(probe.ids) for probe in probes)
    ids = torch.tensor([probe.ids + (0,) * (longest - len(probe.ids)) for probe in probes])
    mask = torch.tensor([[1] * len(p.ids) + [0] * (longest - len(p.ids)) for p in probes])
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask).logits.numpy()
    return [logits[row, : len(probe.ids)] for row, probe in enumerate(probes)]


def assert_is_the_model(checkpoint: Checkpoint, model: GptOssForCausalLM, probes: Sequence[Probe]) -> None:
    reference = run_reference(checkpoint, probes)
    for row, expected in enumerate(plain_logits(model, probes)):
        measured = reference.logits(row, 0, len(probes[row].ids))
        assert measured.shape == expected.shape
        assert measured.dtype == np.float32
        assert np.abs(expected).max() > 5, "the model must say something"
        assert np.abs(measured - expected).max() <= MOST


def test_padded_together(checkpoint: Checkpoint, plain: GptOssForCausalLM, probes: tuple[Probe, ...]) -> None:
    assert_is_the_model(checkpoint, plain, probes)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_alone(checkpoint: Checkpoint, plain: GptOssForCausalLM, probes: tuple[Probe, ...], index: int) -> None:
    assert_is_the_model(checkpoint, plain, probes[index : index + 1])


def test_beyond_yarn_s_original_context(checkpoint: Checkpoint, plain: GptOssForCausalLM) -> None:
    ids = tuple((i * i + 7 * i) % 2000 for i in range(600))
    assert_is_the_model(checkpoint, plain, [Probe("long", ids)])


def test_any_range_of_positions_is_the_same_logits(checkpoint: Checkpoint, probes: tuple[Probe, ...]) -> None:
    """Across blocks of positions, in any order, and after the blocks kept have been dropped."""
    ids = (probes[2].ids * 8)[:300]
    reference = run_reference(checkpoint, [Probe("a", ids), probes[1]])
    whole = reference.logits(0, 0, 300)
    for start, stop in ((0, 1), (63, 65), (60, 200), (299, 300), (128, 192), (0, 300)):
        np.testing.assert_array_equal(reference.logits(0, start, stop), whole[start:stop])
        reference.logits(1, 0, 2)
    for start, stop in ((-1, 2), (5, 5), (299, 301)):
        with pytest.raises(IndexError):
            reference.logits(0, start, stop)


def test_one_layer_at_a_time(
    checkpoint: Checkpoint, probes: tuple[Probe, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a layer runs, no other has parameters; and an expert that no token went to is never decoded."""
    layers: list[GptOssDecoderLayer] = []
    init, forward, experts_forward = (
        GptOssDecoderLayer.__init__,
        GptOssDecoderLayer.forward,
        GptOssExperts.forward,
    )
    resident, decoded, hit = [], [], []

    def remembering_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        layers.append(self)

    def counting_forward(self, *args, **kwargs):
        resident.append([i for i, m in enumerate(layers) if not m.input_layernorm.weight.is_meta])
        return forward(self, *args, **kwargs)

    def counting_experts(self, x, router_indices=None, routing_weights=None):
        hit.append(len(router_indices.unique()))
        slices = type(self.gate_up_proj)
        count = [0]
        get = slices.__getitem__

        def counting_get(table, expert):
            count[0] += 1
            weight = get(table, expert)
            assert weight.dtype == torch.float32
            return weight

        with monkeypatch.context() as patch:
            patch.setattr(slices, "__getitem__", counting_get)
            out = experts_forward(self, x, router_indices, routing_weights)
        decoded.append(count[0])
        return out

    monkeypatch.setattr(GptOssDecoderLayer, "__init__", remembering_init)
    monkeypatch.setattr(GptOssDecoderLayer, "forward", counting_forward)
    monkeypatch.setattr(GptOssExperts, "forward", counting_experts)
    run_reference(checkpoint, probes[:1])
    assert resident == [[0], [1], [2], [3]]
    assert hit == [4, 4, 4, 4]
    assert decoded == [8, 8, 8, 8]
    assert all(parameter.is_meta for layer in layers for parameter in layer.parameters())


def stored(tiny_dir: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(tiny_dir.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def test_the_bf16_layout(tiny_dir: Path, tmp_path: Path, plain: GptOssForCausalLM, probes: tuple[Probe, ...]) -> None:
    """A fine-tune without MXFP4: what transformers decoded, saved as it saves it."""
    model = copy.deepcopy(plain).to(torch.bfloat16)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    raw = json.loads((tiny_dir / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_is_the_model(open_checkpoint(tmp_path), plain, probes)


def test_the_original_layout(
    tiny_dir: Path, tmp_path: Path, plain: GptOssForCausalLM, probes: tuple[Probe, ...]
) -> None:
    """OpenAI's names, stacked q, k, v, and OpenAI's config keys, which transformers cannot read itself."""
    hf = stored(tiny_dir)
    out = {
        "embedding.weight": hf["model.embed_tokens.weight"],
        "norm.scale": hf["model.norm.weight"],
        "unembedding.weight": hf["lm_head.weight"],
    }
    for n in range(4):
        a, b = f"model.layers.{n}.", f"block.{n}."
        out[b + "attn.norm.scale"] = hf[a + "input_layernorm.weight"]
        out[b + "mlp.norm.scale"] = hf[a + "post_attention_layernorm.weight"]
        out[b + "attn.sinks"] = hf[a + "self_attn.sinks"]
        for kind in ("weight", "bias"):
            qkv = [hf[f"{a}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            out[f"{b}attn.qkv.{kind}"] = torch.cat(qkv)
            out[f"{b}attn.out.{kind}"] = hf[f"{a}self_attn.o_proj.{kind}"]
            out[f"{b}mlp.gate.{kind}"] = hf[f"{a}mlp.router.{kind}"]
        for old, new in (("gate_up", "mlp1"), ("down", "mlp2")):
            for part in ("blocks", "scales"):
                out[f"{b}mlp.{new}_weight.{part}"] = hf[f"{a}mlp.experts.{old}_proj_{part}"]
            out[f"{b}mlp.{new}_bias"] = hf[f"{a}mlp.experts.{old}_proj_bias"]
    save_file(out, tmp_path / "model.safetensors")
    config = {
        "num_hidden_layers": 4,
        "num_experts": 16,
        "experts_per_token": 4,
        "vocab_size": 2048,
        "hidden_size": 192,
        "intermediate_size": 192,
        "swiglu_limit": 7.0,
        "head_dim": 32,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "initial_context_length": 512,
        "rope_theta": 150000,
        "rope_scaling_factor": 8.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_is_the_model(open_checkpoint(tmp_path), plain, probes)


def test_the_config_is_read_by_transformers_not_by_us(
    checkpoint: Checkpoint, plain: GptOssForCausalLM, probes: tuple[Probe, ...]
) -> None:
    """Were our own reading of the window wrong, the reference would still be right."""
    misread = replace(checkpoint, config=replace(checkpoint.config, sliding_window=3, swiglu_alpha=1.0))
    assert_is_the_model(misread, plain, probes)


def test_reading_the_config_changes_nothing_and_is_eager(checkpoint: Checkpoint) -> None:
    before = copy.deepcopy(checkpoint.raw_config)
    hostile = {**before, "attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    config = transformers_config(replace(checkpoint, raw_config={**hostile, "output_hidden_states": True}))
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "eager")
    assert not config.output_hidden_states
    assert config.rope_parameters["truncate"] is False
    assert checkpoint.raw_config == before


def test_a_config_that_transformers_refuses(checkpoint: Checkpoint) -> None:
    raw = {**checkpoint.raw_config, "rms_norm_eps": "small"}
    with pytest.raises(ConfigError, match="transformers refuses"):
        transformers_config(replace(checkpoint, raw_config=raw))


@pytest.mark.parametrize("ids", [(), (2048,), (-1,)])
def test_tokens_that_cannot_be_run(checkpoint: Checkpoint, ids: tuple[int, ...]) -> None:
    with pytest.raises(PromptError):
        run_reference(checkpoint, [Probe("bad", ids)])


def test_probes_that_attention_has_no_room_for_are_refused(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_export.validators.reference.MOST_SCORE_BYTES", 20 * 2 * 8 * 30**2)
    check_probes([Probe("a", (1,) * 30), Probe("b", (1,))], tiny.config)
    for probes in ([Probe("a", (1,) * 31), Probe("b", (1,))], [Probe(name, (1,) * 30) for name in "abc"]):
        with pytest.raises(PromptError, match=r"would take .* is the most"):
            check_probes(probes, tiny.config)

"""The specification in eager torch against transformers: all three layouts, whole, with a past and padded."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gptoss_export.exporter.checkpoint.open import open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.model.gpt_oss import GptOss, Past, inverse_frequencies


def load(checkpoint: Checkpoint) -> GptOss:
    model = GptOss(checkpoint.config, checkpoint.layout)
    state = {}
    for name, ref in checkpoint.tensors.items():
        stored = np.array(read_tensor(ref))
        state[name] = (
            torch.from_numpy(stored)
            if ref.dtype == "U8"
            else torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
        )
    model.load_state_dict(state)  # strict: names, shapes and types are those of the checkpoint
    return model


def empty_past(checkpoint: Checkpoint, rows: int) -> list[Past]:
    c = checkpoint.config
    return [(torch.zeros(rows, c.num_kv_heads, 0, c.head_dim),) * 2 for _ in range(c.num_layers)]


@pytest.mark.parametrize("layout", Layout)
def test_is_transformers_network(
    layout: Layout, tiny_layouts: dict[Layout, Path], tiny_reference: tuple[np.ndarray, np.ndarray]
) -> None:
    checkpoint = open_checkpoint(tiny_layouts[layout])
    assert checkpoint.layout is layout
    ids, expected = tiny_reference
    model = load(checkpoint)
    tokens = torch.from_numpy(ids)
    with torch.no_grad():
        logits, past = model(tokens[:, :40], torch.ones(1, 40, dtype=torch.int64), empty_past(checkpoint, 1))
        rest, _ = model(tokens[:, 40:], torch.ones(1, 100, dtype=torch.int64), past)
        last, _ = model(tokens, torch.ones(1, 100, dtype=torch.int64), empty_past(checkpoint, 1), 3)
    np.testing.assert_allclose(torch.cat([logits, rest], 1).numpy(), expected, rtol=0, atol=5e-5)
    np.testing.assert_allclose(last.numpy(), expected[:, -3:], rtol=0, atol=5e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny: Checkpoint, tiny_reference: tuple[np.ndarray, np.ndarray], side: str) -> None:
    ids, expected = tiny_reference
    real = slice(20, 60) if side == "left" else slice(0, 40)
    tokens, mask = torch.zeros(1, 60, dtype=torch.int64), torch.zeros(1, 60, dtype=torch.int64)
    tokens[:, real], mask[:, real] = torch.from_numpy(ids[:, :40]), 1
    model = load(tiny)
    with torch.no_grad():
        logits, past = model(tokens, mask, empty_past(tiny, 1))
        step, _ = model(torch.from_numpy(ids[:, 40:41]), torch.cat([mask, torch.ones_like(mask[:, :1])], 1), past)
    np.testing.assert_allclose(logits[:, real].numpy(), expected[:, :40], rtol=0, atol=5e-5)
    np.testing.assert_allclose(step.numpy(), expected[:, 40:41], rtol=0, atol=5e-5)


def test_a_120b_costs_nothing_on_the_meta_device(tiny: Checkpoint) -> None:
    big = replace(
        tiny.config,
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_layers=36,
        num_experts=128,
        num_heads=64,
        num_kv_heads=8,
        head_dim=64,
        layer_types=("sliding_attention", "full_attention") * 18,
    )
    with torch.device("meta"):
        model = GptOss(big)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())
    assert 65.2e9 < stored < 65.3e9  # the released checkpoint's bytes


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize(("factor", "context", "head_dim"), [(32.0, 4096, 64), (8.0, 512, 32), (1.0, 4096, 64)])
def test_yarn_is_transformers(tiny: Checkpoint, truncate: bool, factor: float, context: int, head_dim: int) -> None:
    assert tiny.config.yarn is not None
    yarn = replace(tiny.config.yarn, factor=factor, original_context=context, truncate=truncate)
    ours, ours_factor = inverse_frequencies(replace(tiny.config, yarn=yarn, head_dim=head_dim))
    config = GptOssConfig(
        head_dim=head_dim,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": tiny.config.rope_theta,
            "factor": factor,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "original_max_position_embeddings": context,
            "truncate": truncate,
        },
    )
    theirs, theirs_factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    assert torch.equal(ours, theirs)
    assert ours_factor == theirs_factor


def test_no_yarn_is_plain_rope(tiny: Checkpoint) -> None:
    frequencies, factor = inverse_frequencies(replace(tiny.config, yarn=None))
    expected = tiny.config.rope_theta ** (-np.arange(0, tiny.config.head_dim, 2) / tiny.config.head_dim)
    np.testing.assert_allclose(frequencies.numpy(), expected, rtol=1e-6)
    assert factor == 1.0

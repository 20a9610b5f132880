"""The noise floor: transformers in 16 bits, streamed, is transformers in 16 bits; and what that costs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GptOssForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssExperts

from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.planning.request import Effort
from gptoss_export.validators import floor as floor_module
from gptoss_export.validators.floor import FloorDtype, FloorRecord, measure_floor, run_floor
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.metrics import Accumulator
from gptoss_export.validators.probes import Probe
from gptoss_export.validators.reference import Reference, run_reference

DTYPES: tuple[FloorDtype, ...] = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def checkpoint(tiny_dir: Path) -> Checkpoint:
    return open_checkpoint(tiny_dir)


@pytest.fixture(scope="module")
def reference(run_of: Callable[[Effort], Reference]) -> Reference:
    return run_of("quick")


@pytest.fixture(scope="module")
def floors(checkpoint: Checkpoint, reference: Reference) -> dict[str, FloorRecord]:
    return {dtype: measure_floor(checkpoint, reference, dtype) for dtype in DTYPES}


def plain_logits(model: GptOssForCausalLM, reference: Reference) -> list[np.ndarray]:
    """Over one batch padded on the right."""
    lengths = [len(p.ids) for p in reference.probes]
    ids = torch.tensor([[*p.ids, *[0] * (max(lengths) - len(p.ids))] for p in reference.probes])
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    with torch.inference_mode():
        logits = model(ids, attention_mask=mask).logits
    assert logits.dtype == model.dtype
    return [logits[row, :n].float().numpy() for row, n in enumerate(lengths)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_transformers_computes_in_that_type(
    dtype: FloorDtype,
    load_plain: Callable[[torch.dtype], GptOssForCausalLM],
    checkpoint: Checkpoint,
    reference: Reference,
    floors: dict[str, FloorRecord],
) -> None:
    streamed = run_reference(checkpoint, reference.probes, dtype=dtype)
    apart, plain = Accumulator(), Accumulator()
    for row, logits in enumerate(plain_logits(load_plain(getattr(torch, dtype)), reference)):
        ours = streamed.logits(row, 0, len(logits))
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, torch.from_numpy(ours).to(getattr(torch, dtype)).float().numpy())
        apart.add(logits, ours)
        plain.add(reference.logits(row, 0, len(logits)), logits)
    floor = floors[dtype].metrics
    assert apart.metrics().kl_mean < 0.2 * floor.kl_mean
    assert plain.metrics().kl_mean == pytest.approx(floor.kl_mean, rel=0.2)


def test_what_rounding_costs(floors: dict[str, FloorRecord], reference: Reference) -> None:
    fp16, bf16 = floors["float16"].metrics, floors["bfloat16"].metrics
    for dtype, m in (("float16", fp16), ("bfloat16", bf16)):
        assert floors[dtype].dtype == dtype
        assert m.positions == sum(len(p.ids) for p in reference.probes)
        assert m.non_finite == 0
        assert m.text_positions == m.positions - len(reference.probes)
        assert floors[dtype].token_layers == 4 * m.positions
    assert floors["float16"].diverged <= floors["bfloat16"].diverged <= 0.02 * floors["bfloat16"].token_layers
    assert 1e-6 < fp16.kl_mean < 3e-5
    assert 1e-4 < bf16.kl_mean < 5e-3
    assert fp16.logit_diff_max < bf16.logit_diff_max
    gates = GATES["trt-fp16"].resolve(floors["float16"])
    assert gates.max_kl_mean == 3 * floors["float16"].bulk_kl_mean
    assert floors["float16"].bulk_kl_mean <= fp16.kl_mean * (1 + 1e-9)
    assert gates.max_text_kl_mean == max(1e-2, 3 * fp16.kl_mean)
    assert GATES["trt-bf16"].resolve(floors["bfloat16"]).max_kl_mean == 3 * floors["bfloat16"].bulk_kl_mean


def test_routing_beyond_ties_is_counted(
    checkpoint: Checkpoint, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rounded run that sends every token elsewhere in one layer of four, and is else the reference itself."""

    def run(*_: object, **__: object) -> Reference:
        rounded = copy.copy(reference)
        monkeypatch.setattr(
            rounded, "router_logits", lambda n, p: reference.router_logits(n, p) * (-1 if n == 2 else 1)
        )
        return rounded

    monkeypatch.setattr(floor_module, "run_reference", run)
    found = run_floor(checkpoint, reference, "bfloat16")
    assert found.record.diverged == found.record.metrics.positions == found.record.token_layers // 4
    assert found.record.metrics.kl_max == 0
    assert found.rounded.router_logits(2, 0)[0, 0] == -reference.router_logits(2, 0)[0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_layer_in_the_types_that_transformers_would_have(
    dtype: FloorDtype, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms stay in float32 in float16 only; experts, one at a time, are never wider than dtype."""
    kind, seen, layers = getattr(torch, dtype), [], []
    init, forward, experts = GptOssDecoderLayer.__init__, GptOssDecoderLayer.forward, GptOssExperts.forward

    def remembering_init(self, *args, **kwargs):
        init(self, *args, **kwargs)
        layers.append(self)

    def checking_forward(self, hidden_states, *args, **kwargs):
        assert hidden_states.dtype == kind
        assert [m for m in layers if not m.input_layernorm.weight.is_meta] == [self]
        for name, parameter in self.named_parameters():
            kept = dtype == "float16" and "norm" in name
            assert parameter.dtype == (torch.float32 if kept else kind), name
        return forward(self, hidden_states, *args, **kwargs)

    def checking_experts(self, *args, **kwargs):
        seen.append((self.gate_up_proj[torch.tensor(0)].dtype, self.down_proj[torch.tensor(0)].dtype))
        return experts(self, *args, **kwargs)

    monkeypatch.setattr(GptOssDecoderLayer, "__init__", remembering_init)
    monkeypatch.setattr(GptOssDecoderLayer, "forward", checking_forward)
    monkeypatch.setattr(GptOssExperts, "forward", checking_experts)
    run = run_reference(checkpoint, [Probe("three", (1, 2, 3))], dtype=dtype)
    assert seen == [(kind, kind)] * 4
    assert run.dtype == dtype
    assert f"GptOss, {dtype}, eager" in run.description


def test_a_model_that_overflows_in_float16_is_no_excuse(tiny_dir: Path, tmp_path: Path) -> None:
    """As the 120b does, whose residual stream passes 65,504."""
    tensors = {k: v for file in tiny_dir.glob("*.safetensors") for k, v in load_file(file).items()}
    tensors["model.layers.2.self_attn.o_proj.bias"] += 70_000
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tiny_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    large = open_checkpoint(tmp_path)
    reference = run_reference(large, [Probe("three", (1, 2, 3))])
    assert np.isfinite(reference.logits(0, 0, 3)).all()
    floor = measure_floor(large, reference, "float16")
    assert floor.metrics.non_finite == 3 * 2048
    assert GATES["trt-fp16"].resolve(floor) == GATES["trt-fp16"].absolute

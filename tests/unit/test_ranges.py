"""Ranges of weights against a plain decoding of every value, and what a layer's record says of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from gptoss_export.engines.inspector import LayerOutputs
from gptoss_export.exporter.checkpoint.mxfp4 import FP4_VALUES
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout, TensorRef
from gptoss_export.exporter.errors import TruncatedFileError
from gptoss_export.validators import weight_ranges as module
from gptoss_export.validators.extent import LIMITS, SMALLEST_NORMAL, Extent, extent
from gptoss_export.validators.ranges import RangeMeter, RangeRecord, type_of
from gptoss_export.validators.trace import Peak
from gptoss_export.validators.weight_ranges import weight_ranges

TYPES = tuple(LIMITS)


def plain(values: np.ndarray, held: str) -> Extent:
    """Of float64 values, one rule after the other."""
    size = np.abs(values.astype(np.float64))
    finite = size[np.isfinite(size)]
    return Extent(
        float(finite.max(initial=0.0)),
        sum(1 for v in size.ravel() if not v < LIMITS[held]),
        sum(1 for v in size.ravel() if 0 < v < SMALLEST_NORMAL[held]),
    )


def checkpoint_of(tiny: Checkpoint, folder: Path, arrays: Mapping[str, np.ndarray]) -> Checkpoint:
    """One layer that holds these arrays only; each array's name follows `model.layers.0.`."""
    tensors, file, offset = {}, folder / "weights.bin", 0
    with file.open("wb") as out:
        for short, array in arrays.items():
            name = f"model.layers.0.{short}"
            dtype = "U8" if array.dtype == np.uint8 else "BF16"
            tensors[name] = TensorRef(name, name, file, dtype, array.shape, offset, array.nbytes)
            offset += out.write(array.tobytes())
    return replace(tiny, config=replace(tiny.config, num_layers=1), tensors=tensors)


def scan(tiny: Checkpoint, folder: Path, arrays: Mapping[str, np.ndarray]) -> Mapping[str, Extent]:
    ((found,),) = weight_ranges(checkpoint_of(tiny, folder, arrays))
    return found.extents


@pytest.mark.parametrize("mapped", [1, 500, 8 << 20])
@pytest.mark.parametrize(
    ("lowest", "highest"),
    [(0, 255), (0, 4), (100, 116), (113, 114), (110, 111), (118, 122), (138, 143), (250, 255), (120, 121)],
)
def test_mxfp4_as_decoded(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowest: int, highest: int, mapped: int
) -> None:
    monkeypatch.setattr(module, "_MAPPED_BYTES", mapped)
    monkeypatch.setattr(module, "_GROUPS_AT_ONCE", 7)
    rng = np.random.default_rng(lowest)
    blocks = rng.integers(0, 256, (3, 4, 5, 16), np.uint8)
    blocks[rng.random(blocks.shape) < 0.5] &= 0x99  # small codes, so that the largest scale need not hold the largest
    scales = rng.integers(lowest, highest, (3, 4, 5), np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 4, 5, 32)
    values = FP4_VALUES[codes].astype(np.float64) * 2.0 ** (scales.astype(np.float64)[..., None] - 127)
    found = scan(tiny, tmp_path, {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales})
    assert found == {held: plain(values, held) for held in TYPES}


def test_the_largest_value_need_not_have_the_largest_scale(tiny: Checkpoint, tmp_path: Path) -> None:
    blocks = np.zeros((1, 1, 3, 16), np.uint8)
    blocks[0, 0, 0, 3], blocks[0, 0, 1, 15], blocks[0, 0, 2, 0] = 0x10, 0x0F, 0x06  # 0.5, -6 and 4
    scales = np.array([[[129, 127, 126]]], np.uint8)
    found = scan(tiny, tmp_path, {"mlp.experts.x_blocks": blocks, "mlp.experts.x_scales": scales})
    assert found["float16"] == Extent(6.0, 0, 0)


def test_a_scale_that_is_no_number_makes_every_value_none(tiny: Checkpoint, tmp_path: Path) -> None:
    blocks, scales = np.full((1, 1, 2, 16), 0x22, np.uint8), np.array([[[255, 127]]], np.uint8)
    found = scan(tiny, tmp_path, {"mlp.experts.x_blocks": blocks, "mlp.experts.x_scales": scales})
    assert found == dict.fromkeys(TYPES, Extent(1.0, 32, 0))


@pytest.mark.parametrize("mapped", [1, 1000, 8 << 20])
def test_every_bfloat16(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: int) -> None:
    monkeypatch.setattr(module, "_MAPPED_BYTES", mapped)
    monkeypatch.setattr(module, "_BF16_AT_ONCE", 777)
    every = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(64, 1024)
    found = scan(tiny, tmp_path, {"self_attn.q_proj.weight": every})
    with np.errstate(invalid="ignore"):  # signalling NaNs
        assert found == {held: plain(every.astype(np.float64), held) for held in TYPES}
    # Of either sign: 127 NaNs and infinity, then the largest number itself, then all from 65536 = 0x4780 on.
    assert found["float32"].saturated == 2 * 128
    assert found["bfloat16"].saturated == 2 * (128 + 1)
    assert found["float16"].saturated == 2 * (0x8000 - 0x4780)
    assert found["float32"].subnormal == found["bfloat16"].subnormal == 2 * 127


@pytest.mark.parametrize("values", [[0.0, -0.0], [-3.0, 2.0], [1e-40], [math.nan, 0.25]])
def test_few_bfloat16(tiny: Checkpoint, tmp_path: Path, values: list[float]) -> None:
    array = np.array(values, ml_dtypes.bfloat16)
    assert scan(tiny, tmp_path, {"self_attn.sinks": array}) == {
        held: plain(array.astype(np.float64), held) for held in TYPES
    }


def test_all_layouts_of_a_network_have_the_same_ranges(tiny_layouts: dict[Layout, Path]) -> None:
    """In bfloat16 the experts' codes are numbers, and nothing of that may be seen here."""
    found = [weight_ranges(open_checkpoint(folder)) for folder in tiny_layouts.values()]
    assert [sorted((w.name, w.extents["float16"].largest) for w in layer) for layer in found[0]] == [
        sorted((w.name, w.extents["float16"].largest) for w in layer) for layer in found[1]
    ]
    for other in found[1:]:
        for layer, expected in zip(other, found[0], strict=True):
            assert {w.name: w.extents for w in layer} == {w.name: w.extents for w in expected}
    names = [w.name for w in found[0][3]]
    assert len(names) == len(set(names)) == 17
    assert "model.layers.3.mlp.experts.gate_up_proj" in names


def test_a_file_that_was_cut_short(tiny: Checkpoint, tmp_path: Path) -> None:
    cut = checkpoint_of(tiny, tmp_path, {"self_attn.q_proj.weight": np.ones((64, 64), ml_dtypes.bfloat16)})
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(TruncatedFileError):
        weight_ranges(cut)


@pytest.mark.parametrize("held", TYPES)
def test_the_extent_of_activations(held: str) -> None:
    limit, least = np.float32(LIMITS[held]), np.float32(SMALLEST_NORMAL[held])
    values = np.array([[0, -0.0, 1, least, -least / 2], [-3, 2, least / 4, -least, 0.5]], np.float32)
    assert extent(values, held) == Extent(3.0, 0, 2)
    beyond = np.array([limit, -limit, np.inf, -np.inf, np.nan, 7], np.float32)
    assert extent(np.concatenate([values.ravel(), beyond]), held) == Extent(float(limit), 5, 2)
    assert extent(beyond[2:5], held) == Extent(0.0, 3, 0)
    assert extent(np.empty((0, 4), np.float32), held) == Extent()


# Records.

TYPES_16 = {
    "input_layernorm": "float16",
    "q_proj": "float16",
    "attention": "float16",
    "o_proj": "float32",
    "post_attention_layernorm": "float16",
    "experts": "float32",
}


def outputs(types: Mapping[str, str], **changed: float) -> LayerOutputs:
    """Two positions where every operation gave 1, and those that are named another value once."""

    def array(name: str) -> np.ndarray:
        values = np.ones((2, 4), np.float32)
        values[1, 2] = changed.get(name, 1.0)
        return values

    chosen = np.zeros((2, 1), np.int64)
    ops = {name: array(name) for name in types}
    return LayerOutputs(array("residual"), array("output"), np.ones((2, 1), np.float32), chosen, ops, types)


def records(
    tiny: Checkpoint,
    folder: Path,
    types: Mapping[str, str],
    *runs: Mapping[str, float],
    weights: Mapping[str, Sequence[float]] | None = None,
    peaks: Mapping[str, Peak] | None = None,
) -> dict[str, RangeRecord]:
    meter = RangeMeter({name: [peak] for name, peak in (peaks or {}).items()})
    for run in runs:
        meter.add(0, outputs(types, **run))
    arrays = {name: np.array(values, ml_dtypes.bfloat16) for name, values in (weights or {"none": [0.5]}).items()}
    found = meter.records(checkpoint_of(tiny, folder, arrays))
    assert [record.layer for record in found] == [0] * len(found)
    assert len({record.type for record in found}) == len(found)
    return {record.type: record for record in found}


def test_a_record_of_each_type_that_a_layer_holds(tiny: Checkpoint, tmp_path: Path) -> None:
    found = records(tiny, tmp_path, TYPES_16, {"q_proj": -300.0, "o_proj": 70000.0}, {"attention": 40.0})
    assert list(found) == ["float16", "float32"]
    half, single = found.values()
    assert (half.activation, half.activation_op, half.saturated) == (300.0, "q_proj", 0)
    assert half.headroom_bits == math.log2(65504 / 300)
    assert (single.activation, single.activation_op) == (70000.0, "o_proj")
    assert (single.weight, single.weight_name) == (0.5, "model.layers.0.none")


@pytest.mark.parametrize(
    ("run", "activation", "headroom", "saturated", "subnormal"),
    [
        ({"attention": 32752.0}, 32752.0, 1.0, 0, 0),
        ({"attention": -65504.0}, 65504.0, 0.0, 1, 0),
        ({"attention": 131008.0}, 131008.0, -1.0, 1, 0),
        ({"attention": math.inf}, 1.0, math.log2(65504), 1, 0),
        ({"attention": math.nan, "q_proj": -math.inf}, 1.0, math.log2(65504), 2, 0),
        ({"attention": 1e-5}, 1.0, math.log2(65504), 0, 1),
        ({"output": math.inf}, 1.0, math.log2(65504), 0, 0),
    ],
)
def test_float16_at_its_limits(
    tiny: Checkpoint,
    tmp_path: Path,
    run: Mapping[str, float],
    activation: float,
    headroom: float,
    saturated: int,
    subnormal: int,
) -> None:
    found = records(tiny, tmp_path, TYPES_16, run)
    half = found["float16"]
    assert (half.activation, half.saturated, half.subnormal) == (activation, saturated, subnormal)
    assert half.headroom_bits == pytest.approx(headroom, abs=1e-12)
    assert found["float32"].saturated == int("output" in run)


def test_all_runs_count(tiny: Checkpoint, tmp_path: Path) -> None:
    runs = [{"attention": math.nan}, {"attention": 5.0}, {"attention": math.inf}]
    half = records(tiny, tmp_path, TYPES_16, *runs)["float16"]
    assert (half.activation, half.saturated) == (5.0, 2)


def test_what_the_reference_saw_inside_the_experts(tiny: Checkpoint, tmp_path: Path) -> None:
    peaks = {
        "experts.gate_up": Peak(900.0, 0),
        "experts.activation": Peak(80000.0, 0),
        "experts.down": Peak(3.0, 2),
        "experts": Peak(1e30, 9),  # shown by the artifact itself
        "hidden": Peak(1e30, 9),
    }
    half = records(tiny, tmp_path, TYPES_16, {}, peaks=peaks)["float16"]
    assert (half.activation, half.activation_op, half.saturated) == (80000.0, "experts.activation", 3)
    assert half.headroom_bits is not None and half.headroom_bits < 0
    wide = dict.fromkeys(TYPES_16, "float32")
    (single,) = records(tiny, tmp_path, wide, {}, peaks=peaks).values()
    assert (single.type, single.activation, single.saturated) == ("float32", 80000.0, 2)


def test_weights_count_in_the_type_that_they_are_held_in(tiny: Checkpoint, tmp_path: Path) -> None:
    weights = {
        "input_layernorm.weight": [90112.0, 1e-6],
        "self_attn.q_proj.weight": [400.0, 1e-6, 1e-5],
        "self_attn.o_proj.bias": [1e-6],
        "mlp.experts.down_proj_bias": [1e-7, 2.0],
    }
    found = records(tiny, tmp_path, TYPES_16, {}, weights=weights)
    half, single = found["float16"], found["float32"]
    assert (half.weight, half.weight_name) == (400.0, "model.layers.0.self_attn.q_proj.weight")
    assert half.headroom_bits == math.log2(65504 / 400)
    assert (half.subnormal, half.saturated) == (3, 0)
    assert (single.weight, single.weight_name) == (90112.0, "model.layers.0.input_layernorm.weight")
    assert single.subnormal == 0


def test_weights_beyond_the_limit_are_saturated(tiny: Checkpoint, tmp_path: Path) -> None:
    weights = {"self_attn.q_proj.weight": [1e5, -math.inf, math.nan]}
    half = records(tiny, tmp_path, TYPES_16, {}, weights=weights)["float16"]
    assert half.saturated == 3
    assert half.headroom_bits is not None and half.headroom_bits < 0
    assert math.isfinite(half.weight)


def test_a_layer_of_zeros_has_no_headroom(tiny: Checkpoint, tmp_path: Path) -> None:
    meter = RangeMeter({})
    nothing = np.zeros((1, 4), np.float32)
    meter.add(0, LayerOutputs(nothing, nothing, nothing, np.zeros((1, 4), np.int64), {}, {}))
    (record,) = meter.records(checkpoint_of(tiny, tmp_path, {"none": np.zeros(3, ml_dtypes.bfloat16)}))
    assert (record.activation, record.weight, record.headroom_bits) == (0.0, 0.0, None)


def test_only_layers_that_were_looked_at(tiny: Checkpoint) -> None:
    meter = RangeMeter({})
    for layer in (2, 0):
        meter.add(layer, outputs(dict.fromkeys(TYPES_16, "float32")))
    found = meter.records(tiny)
    assert [record.layer for record in found] == [0, 2]
    assert all(f"model.layers.{record.layer}." in record.weight_name for record in found)


@pytest.mark.parametrize(
    ("weight", "held"),
    [
        ("model.layers.1.self_attn.q_proj.weight", "float16"),
        ("model.layers.1.self_attn.v_proj.bias", "float16"),  # by its input: the graph shows no v_proj
        ("model.layers.1.self_attn.o_proj.weight", "float32"),
        ("model.layers.1.self_attn.sinks", "float16"),
        ("model.layers.1.mlp.experts.gate_up_proj", "float16"),
        ("model.layers.1.mlp.experts.down_proj_bias", "float16"),
        ("model.layers.1.mlp.router.weight", "float32"),
        ("model.layers.1.input_layernorm.weight", "float32"),
        ("model.layers.1.post_attention_layernorm.weight", "float32"),
    ],
)
def test_what_a_weight_is_held_in(weight: str, held: str) -> None:
    assert type_of(weight, TYPES_16) == held
    assert type_of(weight, {}) == "float32"

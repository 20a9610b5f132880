"""Dense weights in the target's type: exact where they can be, and nothing that the type cannot hold gets in."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from gptoss_export.engines.tensorrt import dense as module
from gptoss_export.engines.tensorrt.dense import Range, audit_dense, dense_tensors, is_dense, plan_dense, write_dense
from gptoss_export.engines.tensorrt.precision import LOWEST, Precision
from gptoss_export.exporter.checkpoint.open import read_tensor
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import WeightRangeError

BF16 = np.dtype(ml_dtypes.bfloat16)
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
SINKS = "model.layers.0.self_attn.sinks"
ALL_FINITE = np.array([bits for bits in range(1 << 16) if bits & 0x7F80 != 0x7F80], np.uint16).view(BF16)


def checkpoint(tiny: Checkpoint, folder: Path, **tensors: np.ndarray) -> Checkpoint:
    """One that holds these bfloat16 tensors and no others, each in a file of its own; `_` stands for a dot."""
    names = {"weight": WEIGHT, "bias": BIAS, "sinks": SINKS, "lm_head": "lm_head.weight"}
    refs = {}
    folder.mkdir(exist_ok=True)
    for key, values in tensors.items():
        file = folder / f"{key}.bin"
        file.write_bytes(b"\0" * 6 + values.astype(BF16).tobytes())
        refs[names[key]] = TensorRef(names[key], names[key], file, "BF16", values.shape, 6, 2 * values.size)
    return replace(tiny, tensors=refs)


def written(source: Checkpoint, precision: Precision, folder: Path) -> tuple[dict[str, np.ndarray], Range]:
    file = plan_dense(source, precision, folder / "out")
    assert file is not None
    audit = write_dense(source, precision, file)
    return load_file(file.path), audit


def refusal(source: Checkpoint, precision: Precision, folder: Path) -> WeightRangeError:
    with pytest.raises(WeightRangeError) as caught:
        written(source, precision, folder)
    assert caught.value.exit_code == 35
    too_large = "cannot hold" in caught.value.what
    assert ("trt-bf16" if too_large else "Download") in caught.value.next_step
    return caught.value


def test_bfloat16_reads_the_checkpoint(tiny: Checkpoint, tmp_path: Path) -> None:
    assert plan_dense(tiny, Precision.BF16, tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "nbytes"), [(Precision.FP16, 2), (Precision.FP32, 4)])
def test_the_plan_is_attention_and_the_head(
    precision: Precision, nbytes: int, tiny: Checkpoint, tmp_path: Path
) -> None:
    file = plan_dense(tiny, precision, tmp_path)
    assert file is not None
    assert file.path == tmp_path / "dense" / f"{precision.value}.safetensors"
    layers = range(tiny.config.num_layers)
    parts = [f"self_attn.{part}_proj.{kind}" for part in "qkvo" for kind in ("weight", "bias")]
    assert file.tensors.keys() == {"lm_head.weight", *(f"model.layers.{n}.{part}" for n in layers for part in parts)}
    for name, ref in file.tensors.items():
        source = tiny.tensors[name]
        assert (ref.shape, ref.dtype) == (source.shape, precision.stored_type)
        assert ref.nbytes == nbytes * source.nbytes // 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.experts.gate_up_proj_blocks",
        "model.layers.1.mlp.experts.down_proj_bias",
        SINKS,
    ],
)
def test_what_is_read_as_stored(name: str) -> None:
    assert not is_dense(name)


def test_float32_has_the_bits_of_the_checkpoint(tiny: Checkpoint, tmp_path: Path) -> None:
    found, audit = written(tiny, Precision.FP32, tmp_path)
    for ref in dense_tensors(tiny):
        bits = read_tensor(ref).view(np.uint16).astype(np.uint32) << 16
        assert np.array_equal(found[ref.name].view(np.uint32), bits)
    assert audit.rounded == 0


def test_float32_holds_every_finite_bfloat16(tiny: Checkpoint, tmp_path: Path) -> None:
    found, audit = written(checkpoint(tiny, tmp_path / "in", bias=ALL_FINITE), Precision.FP32, tmp_path)
    assert np.array_equal(found[BIAS].view(np.uint32), ALL_FINITE.view(np.uint16).astype(np.uint32) << 16)
    assert audit == Range(float(ALL_FINITE.astype(np.float64).max()), BIAS, 0, ALL_FINITE.size)


def test_float16_is_the_nearest_for_every_bfloat16_that_it_reaches(tiny: Checkpoint, tmp_path: Path) -> None:
    """Against the definition: all 63,488 finite float16 in float64, the nearer one, the even one of two."""
    values = ALL_FINITE[np.abs(ALL_FINITE.astype(np.float64)) < 65520]
    found, audit = written(checkpoint(tiny, tmp_path / "in", bias=values), Precision.FP16, tmp_path)
    halves = np.arange(0x7C00, dtype=np.uint16)
    grid, wanted = halves.view(np.float16).astype(np.float64), np.abs(values.astype(np.float64))
    above = np.clip(np.searchsorted(grid, wanted), 1, len(grid) - 1)
    low, high = wanted - grid[above - 1], grid[above] - wanted
    chosen = np.where((high < low) | ((high == low) & (above % 2 == 0)), above, above - 1)
    assert np.array_equal(found[BIAS].view(np.uint16) & 0x7FFF, halves[chosen])
    assert np.array_equal(np.signbit(found[BIAS]), np.signbit(values.astype(np.float64)))
    assert audit.rounded == int((grid[chosen] != wanted).sum()) > 0
    assert audit.largest == 65280


def test_float16_is_exact_from_its_smallest_normal_number_on(tiny: Checkpoint, tmp_path: Path) -> None:
    magnitudes = np.abs(ALL_FINITE.astype(np.float64))
    values = ALL_FINITE[(magnitudes >= 2.0**-14) & (magnitudes < 65520)]
    found, audit = written(checkpoint(tiny, tmp_path / "in", bias=values), Precision.FP16, tmp_path)
    assert np.array_equal(found[BIAS].astype(np.float64), values.astype(np.float64))
    assert audit.rounded == 0


def test_halves_go_to_even(tiny: Checkpoint, tmp_path: Path) -> None:
    step = 2.0**-24
    values = step * np.array([0.5, 1.5, 2.5, 3.5, 0.50390625, -0.5, -2.5])
    found, audit = written(checkpoint(tiny, tmp_path / "in", bias=values), Precision.FP16, tmp_path)
    assert np.array_equal(found[BIAS].astype(np.float64), step * np.array([0, 2, 2, 4, 1, -0.0, -2]))
    assert (audit.rounded, audit.weights) == (7, 7)


def test_the_small_checkpoint_in_float16(tiny: Checkpoint, tmp_path: Path) -> None:
    found, audit = written(tiny, Precision.FP16, tmp_path)
    rounded, magnitudes = 0, {}
    for ref in dense_tensors(tiny):
        values = read_tensor(ref).astype(np.float64)
        rounded += int((found[ref.name].astype(np.float64) != values).sum())
        magnitudes[ref.name] = np.abs(values).max()
        assert np.abs(found[ref.name] - values).max() <= 2.0**-25
    sinks = [ref for name, ref in tiny.tensors.items() if name.endswith(".sinks")]
    magnitudes |= {ref.name: np.abs(read_tensor(ref).astype(np.float64)).max() for ref in sinks}
    weights = sum(ref.nbytes // 2 for ref in (*dense_tensors(tiny), *sinks))
    name = max(magnitudes, key=lambda name: magnitudes[name])
    assert audit == Range(magnitudes[name], name, rounded, weights)
    assert f"({name})" in str(audit)


@pytest.mark.parametrize("value", [65280.0, -65280.0])
def test_the_largest_bfloat16_that_float16_holds(value: float, tiny: Checkpoint, tmp_path: Path) -> None:
    values = np.array([[0.0, value]])
    found, audit = written(checkpoint(tiny, tmp_path / "in", weight=values), Precision.FP16, tmp_path)
    assert np.array_equal(found[WEIGHT].astype(np.float64), values)
    assert (audit.largest, audit.largest_name) == (65280, WEIGHT)


@pytest.mark.parametrize(("bits", "held"), [(65504.0, True), (65519.996, True), (65520.0, False), (65536.0, False)])
def test_the_limit_is_where_float16_rounds_to_infinity(bits: float, held: bool) -> None:
    """No bfloat16 lies between 65280 and 65536, so the rule is asked itself."""
    ref = TensorRef("w", "w", Path("w"), "BF16", (1, 1), 0, 2)
    values = np.array([[bits]], np.float32)
    audit = module._Audit(Precision.FP16)
    if held:
        assert audit.convert(ref, 0, values)[0, 0] == 65504
    else:
        with np.errstate(over="ignore"):
            assert np.isinf(values.astype(np.float16))
        with pytest.raises(WeightRangeError, match=r"^w: the weight in row 0, column 0 is 655"):
            audit.convert(ref, 0, values)


@pytest.mark.parametrize("value", [65536.0, -1e5, np.inf, -np.inf, np.nan])
def test_what_float16_cannot_hold_is_named(value: float, tiny: Checkpoint, tmp_path: Path) -> None:
    values = np.ones((5, 4))
    values[3, 2] = values[4, 0] = value
    error = refusal(checkpoint(tiny, tmp_path / "in", weight=values), Precision.FP16, tmp_path)
    assert f"{WEIGHT}: the weight in row 3, column 2 is {float(BF16.type(value)):g}" in error.what
    assert ("float16 cannot hold (largest 65504)" in error.what) == np.isfinite(value)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_float32_does_not_take(value: float, tiny: Checkpoint, tmp_path: Path) -> None:
    error = refusal(checkpoint(tiny, tmp_path / "in", bias=np.array([1.0, value])), Precision.FP32, tmp_path)
    assert f"{BIAS}: the weight in row 1 is {value:g}" in error.what


@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_sinks_are_looked_at_although_the_graph_converts_them(value: float, tiny: Checkpoint, tmp_path: Path) -> None:
    source = checkpoint(tiny, tmp_path / "in", bias=np.ones(2), sinks=np.array([0.0, 0.0, value]))
    assert f"{SINKS}: the weight in row 2 is" in refusal(source, Precision.FP16, tmp_path).what


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_bfloat16_is_looked_at_where_it_lies(value: float, tiny: Checkpoint, tmp_path: Path) -> None:
    audit_dense(checkpoint(tiny, tmp_path / "good", weight=np.full((5, 4), 1e30)))
    values = np.ones((5, 4))
    values[1, 3] = value
    with pytest.raises(WeightRangeError, match=f"row 1, column 3 is {value:g}"):
        audit_dense(checkpoint(tiny, tmp_path / "bad", weight=values))


def test_rows_are_counted_over_pieces(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 10)
    values = np.arange(44.0).reshape(11, 4)
    found, audit = written(checkpoint(tiny, tmp_path / "in", weight=values), Precision.FP16, tmp_path)
    assert np.array_equal(found[WEIGHT], values)
    assert audit == Range(43.0, WEIGHT, 0, 44)
    values[9, 1] = 1e6
    error = refusal(checkpoint(tiny, tmp_path / "in", weight=values), Precision.FP16, tmp_path / "again")
    assert "row 9, column 1" in error.what


def test_the_pieces_do_not_show_in_the_file(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(folder: Path) -> bytes:
        file = plan_dense(tiny, Precision.FP16, folder)
        assert file is not None
        write_dense(tiny, Precision.FP16, file)
        return file.path.read_bytes()

    large = once(tmp_path / "a")
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 1000)
    assert once(tmp_path / "b") == large


def test_memory_is_that_of_a_few_rows(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_WEIGHTS", 1 << 14)
    source = checkpoint(tiny, tmp_path / "in", lm_head=np.ones((4096, 512)))
    file = plan_dense(source, Precision.FP32, tmp_path / "out")
    assert file is not None
    tracemalloc.start()
    try:
        write_dense(source, Precision.FP32, file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert file.nbytes > 8 << 20
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("precision", "kind"),
    [(Precision.FP16, np.float16), (Precision.BF16, ml_dtypes.bfloat16), (Precision.FP32, np.float32)],
)
def test_masked_is_the_lowest_finite_number_of_the_type(precision: Precision, kind: type) -> None:
    assert float(kind(LOWEST[precision])) == LOWEST[precision]
    assert LOWEST[precision] == float(ml_dtypes.finfo(kind).min)

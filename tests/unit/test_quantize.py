"""int8 weights: every number is the one that the rule says, and the file is the same however it was written."""

from __future__ import annotations

import errno
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gptoss_export.engines.ort import quantize as quantize_module
from gptoss_export.engines.ort.build import int8_bytes
from gptoss_export.engines.ort.lower_int8 import lower_int8
from gptoss_export.engines.ort.quantize import (
    Matrix,
    first_int8_layer,
    int8_matrices,
    plan_file,
    quantize,
    write_file,
)
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.safetensors_header import read_header
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout, TensorRef
from gptoss_export.exporter.errors import DiskSpaceError, GraphError, NonFiniteWeightError

BF16 = ml_dtypes.bfloat16
LARGEST = 0x7F7F
"""Bits of the largest finite bfloat16."""


def stored(folder: Path, name: str, values: np.ndarray) -> TensorRef:
    """bfloat16 values at an odd offset of a file of their own."""
    file = folder / f"{name}.bin"
    file.write_bytes(b"\0" * 7 + values.astype(BF16).tobytes())
    return TensorRef(name, name, file, "BF16", values.shape, 7, 2 * values.size)


def written(folder: Path, *matrices: Matrix) -> dict[str, np.ndarray]:
    file = plan_file(matrices, folder / "out" / "linear.safetensors")
    write_file(matrices, file)
    found = load_file(file.path)
    assert {name for name in found if not name.startswith("padding.")} == file.tensors.keys()
    return found


def check_block(weights: np.ndarray, q: np.ndarray, scale: np.ndarray) -> None:
    """The rule in float64, where products of a bfloat16 with 127 or an int8 are exact."""
    w, s = weights.astype(np.float64), float(scale)
    largest = np.abs(w).max()
    if largest == 0:
        assert s == 0 and not q.any()
        return
    below = (scale.view(np.uint16) - 1).view(BF16)
    assert 127 * float(below) < largest <= 127 * s, "the smallest bfloat16 that is enough"
    assert np.array_equal(q, np.rint(w / s))
    assert np.abs(q.astype(int)).max() <= 127
    assert (np.abs(w - q * s) <= s / 2).all()
    assert np.isfinite((q * scale.astype(np.float32)).astype(np.float32)).all()


@given(st.lists(st.tuples(st.integers(0, LARGEST), st.booleans()), min_size=32, max_size=32))
def test_any_block(values: list[tuple[int, bool]]) -> None:
    weights = np.array([bits | negative << 15 for bits, negative in values], np.uint16).view(BF16)
    q, scales = quantize(weights[None])
    check_block(weights, q[0], scales[0, 0])


@pytest.mark.parametrize("exponent", [-133, -126, -20, 0, 120])
def test_many_blocks(exponent: int) -> None:
    rng = np.random.default_rng(0)
    weights = np.ldexp(rng.standard_normal((50, 3, 32)), exponent).astype(BF16)
    q, scales = quantize(weights.reshape(50, 96))
    assert (q.shape, q.dtype, scales.shape, scales.dtype) == ((50, 96), np.int8, (50, 3), BF16)
    for at in np.ndindex(50, 3):
        check_block(weights[at], q.reshape(50, 3, 32)[at], scales[at])


def test_halves_go_to_even() -> None:
    block = np.array([127, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, *[0] * 24], BF16)
    q, scales = quantize(block[None])
    assert float(scales[0, 0]) == 1
    assert q[0, :8].tolist() == [127, 0, 2, 2, 4, 0, -2, -2]


def test_the_rounded_scale_is_the_divisor() -> None:
    """128 / 127 becomes 1.015625, the next bfloat16, of which 100 is 98.46; of 128 / 127 it is 99.2."""
    q, scales = quantize(np.array([128, 100, *[1] * 30], BF16)[None])
    assert float(scales[0, 0]) == 1.015625
    assert q[0, :3].tolist() == [126, 98, 1]


@pytest.mark.parametrize("bits", [0x7F7F, 0xFF7F, 0x0001, 0x8001, 0x0080])
def test_the_ends_of_the_range(bits: int) -> None:
    block = np.zeros(32, np.uint16)
    block[5] = bits
    q, scales = quantize(block.view(BF16)[None])
    check_block(block.view(BF16), q[0], scales[0, 0])


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("row", [0, 63, 99])
def test_what_has_no_int8_is_named(value: float, row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "_CHUNK_WEIGHTS", 10 * 64)
    weights = np.ones((100, 64))
    weights[row, 33] = value
    matrix = Matrix("m", (stored(tmp_path, "good", np.ones((3, 64))), stored(tmp_path, "bad", weights)), ())
    with pytest.raises(NonFiniteWeightError, match=rf"bad: the weight in row {row}, column 33 is -?(inf|nan)"):
        write_file((matrix,), plan_file((matrix,), tmp_path / "out"))


@pytest.mark.parametrize("shape", [(64, 64), (1, 32), (3, 32), (33, 96), (7, 160)])
def test_tensors_begin_at_multiples_of_64(shape: tuple[int, int], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(shape) for _ in range(3)]
    weights = tuple(stored(tmp_path, f"w{i}", v) for i, v in enumerate(values))
    biases = tuple(stored(tmp_path, f"b{i}", v[:, 0]) for i, v in enumerate(values))
    stack, single = Matrix("stack", weights, biases), Matrix("single", weights[:1], biases[:1])
    found = written(tmp_path, stack, single)
    header = read_header(tmp_path / "out" / "linear.safetensors")
    assert all(entry.offset % 64 == 0 for name, entry in header.items() if not name.startswith("padding."))
    whole = np.concatenate(values).astype(BF16)
    q, scales = quantize(whole)
    assert np.array_equal(found["stack.weight_int8"], q)
    assert np.array_equal(found["stack.weight_scales"], scales)
    assert np.array_equal(found["stack.bias"], whole[:, 0])
    assert np.array_equal(found["single.weight_int8"], q[: shape[0]])
    assert single.bias_name == "b0" and "single.bias" not in found


def test_chunks_change_no_byte(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = set()
    for chunk in (1, 1000, 1 << 20):
        monkeypatch.setattr(quantize_module, "_CHUNK_WEIGHTS", chunk)
        file = plan_file(int8_matrices(tiny), tmp_path / f"{chunk}")
        write_file(int8_matrices(tiny), file)
        assert file.path.stat().st_size == file.nbytes == int8_bytes(tiny)
        contents.add(file.path.read_bytes())
    assert len(contents) == 1


def test_every_layout_gives_the_same_file(tiny_layouts: dict[Layout, Path], tmp_path: Path) -> None:
    contents = set()
    for layout, folder in tiny_layouts.items():
        matrices = int8_matrices(open_checkpoint(folder))
        write_file(matrices, plan_file(matrices, tmp_path / layout.value))
        contents.add((tmp_path / layout.value).read_bytes())
    assert len(contents) == 1


def test_what_is_quantised(tiny: Checkpoint) -> None:
    matrices = int8_matrices(tiny)
    per_layer = [(f"model.layers.{n}.self_attn.{name}", shape) for n in (2, 3) for name, shape in SHAPES]
    assert [(m.name, (m.rows, m.columns)) for m in matrices] == [*per_layer, ("lm_head", (2048, 192))]
    left = tiny.tensors.keys() - {name for m in matrices for name in m.replaced}
    assert "model.embed_tokens.weight" in left and "model.layers.2.self_attn.o_proj.bias" in left
    parts = {name for name in left if re.search(r"\.[qkv]_proj\.", name)}
    assert len(parts) == 12 and all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in parts)
    assert "lm_head.weight" not in left and "model.layers.3.self_attn.o_proj.weight" not in left


def test_a_third_of_the_layers_stays_as_stored() -> None:
    assert [first_int8_layer(n) for n in (1, 2, 3, 4, 24, 36)] == [1, 1, 1, 2, 8, 12]


SHAPES = [("qkv_proj", (384, 192)), ("o_proj", (192, 256))]


def test_rows_of_no_whole_number_of_blocks_stay_as_stored(tiny: Checkpoint) -> None:
    odd = {
        name: replace(ref, shape=(ref.shape[0], 200)) if "o_proj.weight" in name else ref
        for name, ref in tiny.tensors.items()
    }
    assert not any("o_proj" in m.name for m in int8_matrices(replace(tiny, tensors=odd)))


def test_a_full_disk(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    for name in ("posix_fallocate", "pwrite"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(DiskSpaceError, match=r"linear\.safetensors"):
                write_file(int8_matrices(tiny), plan_file(int8_matrices(tiny), tmp_path / name / "linear.safetensors"))


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "_CHUNK_WEIGHTS", 1 << 16)
    rng = np.random.default_rng(2)
    matrix = Matrix("m", (stored(tmp_path, "w", rng.standard_normal((4096, 512))),), ())
    file = plan_file((matrix,), tmp_path / "out")
    tracemalloc.start()
    try:
        write_file((matrix,), file)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def lowered(graph: ir.Model, checkpoint: Checkpoint) -> ir.Model:
    return lower_int8(graph.clone(), int8_matrices(checkpoint))


def test_the_graph_reads_int8_and_nothing_else_changes(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    model = lowered(tiny_graph, tiny)
    count: Callable[[str], int] = lambda op: sum(node.op_type == op for node in model.graph)  # noqa: E731
    assert (count("LinearInt8"), count("LinearInt8NoBias"), count("Split")) == (4, 1, 2)
    assert (count("Linear"), count("LinearNoBias")) == (8, 0)
    before = {v.name: (v.shape, v.dtype) for node in tiny_graph.graph for v in node.outputs}
    after = {v.name: (v.shape, v.dtype) for node in model.graph for v in node.outputs}
    stacked = {f"model.layers.{n}.self_attn.qkv_proj" for n in (2, 3)}
    assert after.keys() - before.keys() == stacked and before.keys() <= after.keys()
    assert all(after[name] == before[name] for name in before)
    assert [v.name for v in model.graph.outputs] == [v.name for v in tiny_graph.graph.outputs]
    assert {op for _, op, _ in model.functions} >= {"LinearInt8", "LinearInt8NoBias"}
    embedding = model.graph.initializers["model.embed_tokens.weight"]
    assert [node.op_type for node, _ in embedding.uses()] == ["Gather"]


def test_a_weight_that_something_else_reads_is_refused(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    """As if the embedding were tied to lm_head: taking the weight away would take the embedding's."""
    model = tiny_graph.clone()
    graph = model.graph
    ((gather, at),) = graph.initializers["model.embed_tokens.weight"].uses()
    gather.replace_input_with(at, graph.initializers["lm_head.weight"])
    with pytest.raises(GraphError, match="lm_head is not read by one Linear"):
        lower_int8(model, int8_matrices(tiny))


def test_q_k_and_v_of_different_inputs_are_refused(tiny: Checkpoint, tiny_graph: ir.Model) -> None:
    model = tiny_graph.clone()
    v = next(node for node in model.graph if node.name == "model.layers.2.self_attn.v_proj")
    other = next(node for node in model.graph if node.name == "model.layers.3.self_attn.v_proj")
    v.replace_input_with(0, other.inputs[0])
    with pytest.raises(GraphError, match=r"layers\.2\.self_attn\.qkv_proj has parts with different inputs"):
        lower_int8(model, int8_matrices(tiny))


def test_the_header_is_plain_json_in_a_fixed_order(tiny: Checkpoint, tmp_path: Path) -> None:
    file = plan_file(int8_matrices(tiny), tmp_path / "x")
    assert len(file.header) % 64 == 0
    fields = json.loads(file.header[8:])
    first = "model.layers.2.self_attn.qkv_proj"
    assert list(fields)[:3] == [f"{first}.weight_int8", f"{first}.weight_scales", f"{first}.bias"]
    assert (fields["lm_head.weight_int8"]["dtype"], fields["lm_head.weight_int8"]["shape"]) == ("I8", [2048, 192])

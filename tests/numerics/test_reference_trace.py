"""The trace is what transformers' own model shows to hooks of ours, and a layer alone is that layer in the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GptOssForCausalLM

from gptoss_export.engines.inspector import OPS
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import AccessError, DiskSpaceError
from gptoss_export.validators import trace as trace_module
from gptoss_export.validators.layer_hooks import EXPERT_PARTS
from gptoss_export.validators.layer_ops import layer_ops
from gptoss_export.validators.probes import Probe, default_probes
from gptoss_export.validators.reference import Reference, run_reference
from gptoss_export.validators.trace import Peak, Trace, TraceShape, TraceWriter

CLOSE = 2e-5
MODULES = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "experts": "mlp.experts",
}


@pytest.fixture(scope="module")
def probes(tiny: Checkpoint) -> tuple[Probe, ...]:
    return default_probes(tiny, "quick")


@pytest.fixture(scope="module")
def reference(tiny: Checkpoint, probes: tuple[Probe, ...]) -> Reference:
    return run_reference(tiny, probes)


@pytest.fixture(scope="module")
def plain(load_plain: Callable[[torch.dtype], GptOssForCausalLM]) -> GptOssForCausalLM:
    return load_plain(torch.float32)


@pytest.fixture(scope="module")
def shown(plain: GptOssForCausalLM, probes: tuple[Probe, ...]) -> list[list[dict[str, np.ndarray]]]:
    """By layer and probe, each probe alone and unpadded: everything by name; layer 4 has only what the norm gets."""
    found: list[list[dict[str, np.ndarray]]] = [[{} for _ in probes] for _ in range(5)]
    row = 0

    def keep(layer: int, name: str) -> Callable[[torch.Tensor], None]:
        def write(value: torch.Tensor) -> None:
            found[layer][row][name] = value.reshape(len(probes[row].ids), -1).numpy().copy()

        return write

    def before(module: torch.nn.Module, write: Callable[[torch.Tensor], None]) -> None:
        handles.append(module.register_forward_pre_hook(lambda _m, args: write(args[0])))

    def after(module: torch.nn.Module, write: Callable[[torch.Tensor], None]) -> None:
        handles.append(
            module.register_forward_hook(lambda _m, _a, out: write(out[0] if isinstance(out, tuple) else out))
        )

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for n, layer in enumerate(plain.model.layers):
        before(layer, keep(n, "hidden"))
        before(layer.post_attention_layernorm, keep(n, "residual"))
        before(layer.self_attn.o_proj, keep(n, "attention"))
        after(layer.mlp.router, keep(n, "router"))
        for name, path in MODULES.items():
            after(layer.get_submodule(path), keep(n, name))
    before(plain.model.norm, keep(4, "hidden"))
    for index, probe in enumerate(probes):
        row = index
        with torch.inference_mode():
            plain(torch.tensor([probe.ids]))
    for handle in handles:
        handle.remove()
    return found


def test_streams_and_router_logits(
    reference: Reference, shown: list[list[dict[str, np.ndarray]]], probes: tuple[Probe, ...]
) -> None:
    trace = reference.trace
    for row in range(len(probes)):
        for n in range(4):
            for name, read in (("residual", trace.residual), ("router", trace.router_logits)):
                np.testing.assert_allclose(read(n, row), shown[n][row][name], atol=CLOSE, rtol=0)
            np.testing.assert_array_equal(reference.router_logits(n, row), trace.router_logits(n, row))
        for n in range(5):
            np.testing.assert_allclose(trace.hidden(n, row), shown[n][row]["hidden"], atol=CLOSE, rtol=0)
            assert trace.hidden(n, row).dtype == np.float32
    assert np.abs(trace.hidden(4, 2)).max() > 5, "the streams must say something"


def test_what_is_not_there(reference: Reference, tiny: Checkpoint) -> None:
    for layer, probe in ((5, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(IndexError):
            reference.trace.hidden(layer, probe)
    with pytest.raises(IndexError):
        reference.trace.residual(4, 0)
    rounded = run_reference(tiny, [Probe("three", (1, 2, 3))], dtype="bfloat16")
    assert rounded.router_logits(3, 0).shape == (3, 16)
    assert rounded.trace.peaks.keys() == {"router"}
    with pytest.raises(LookupError, match="routing alone"):
        rounded.trace.hidden(0, 0)


def test_router_logits_of_a_rounded_run_are_of_that_type(tiny: Checkpoint) -> None:
    logits = run_reference(tiny, [Probe("three", (1, 2, 3))], dtype="bfloat16").router_logits(0, 0)
    np.testing.assert_array_equal(logits, torch.from_numpy(logits.copy()).bfloat16().float().numpy())
    exact = run_reference(tiny, [Probe("three", (1, 2, 3))]).router_logits(0, 0)
    assert 0 < np.abs(logits - exact).max() < 0.2


def test_peaks_are_of_every_op_without_padding(
    reference: Reference, shown: list[list[dict[str, np.ndarray]]], probes: tuple[Probe, ...]
) -> None:
    peaks = reference.trace.peaks
    assert peaks.keys() == {*OPS, *EXPERT_PARTS, "hidden", "residual"}
    for name in (*OPS, "residual", "hidden"):
        layers = 5 if name == "hidden" else 4
        assert len(peaks[name]) == layers
        for n in range(layers):
            largest = max(float(np.abs(shown[n][row][name]).max()) for row in range(len(probes)))
            assert peaks[name][n].largest == pytest.approx(largest, abs=CLOSE)
            assert peaks[name][n].non_finite == 0


def test_peaks_inside_of_the_experts(
    reference: Reference, plain: GptOssForCausalLM, shown: list[list[dict[str, np.ndarray]]], probes: tuple[Probe, ...]
) -> None:
    """Against every token's experts by hand, from the decoded weights of the whole model."""
    for n in range(4):
        experts = plain.model.layers[n].mlp.experts
        largest = dict.fromkeys(EXPERT_PARTS, 0.0)
        for row in range(len(probes)):
            x = torch.from_numpy(shown[n][row]["post_attention_layernorm"])
            for token, logits in zip(x, shown[n][row]["router"], strict=True):
                for e in np.argsort(-logits)[:4]:
                    with torch.inference_mode():
                        gate_up = token @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
                        gate, up = gate_up[0::2].clamp(max=7.0), gate_up[1::2].clamp(-7.0, 7.0)
                        activation = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                        down = activation @ experts.down_proj[e] + experts.down_proj_bias[e]
                    for name, value in zip(EXPERT_PARTS, (gate_up, activation, down), strict=True):
                        largest[name] = max(largest[name], float(value.abs().max()))
        for name in EXPERT_PARTS:
            assert reference.trace.peaks[name][n].largest == pytest.approx(largest[name], rel=1e-4)


def test_what_is_not_finite_is_counted(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from gptoss_export.validators.streamed_layers import Loader

    load = Loader.__call__

    def poisoned(self: Loader, name: str) -> torch.Tensor:
        value = load(self, name)
        if name == "model.layers.1.self_attn.o_proj.bias":
            value[3], value[5] = float("inf"), float("nan")
        return value

    monkeypatch.setattr(Loader, "__call__", poisoned)
    peaks = run_reference(tiny, [Probe("three", (1, 2, 3)), Probe("one", (7,))]).trace.peaks
    assert [peak.non_finite for peak in peaks["o_proj"]][:2] == [0, 8]
    assert 0 < peaks["o_proj"][1].largest < 100
    assert peaks["hidden"][2].non_finite == 4 * 192
    assert peaks["hidden"][2].largest == 0.0
    assert peaks["experts.down"][1].non_finite > 0


@pytest.mark.parametrize("index", range(4))
def test_a_layer_alone_is_that_layer_in_the_model(
    index: int, reference: Reference, tiny: Checkpoint, shown: list[list[dict[str, np.ndarray]]]
) -> None:
    trace, rows = reference.trace, range(3)
    hidden, residual = ([read(index, row) for row in rows] for read in (trace.hidden, trace.residual))
    ops = layer_ops(tiny, index, hidden, residual)
    for row in rows:
        assert list(ops[row]) == list(OPS)
        for name in OPS:
            np.testing.assert_allclose(ops[row][name], shown[index][row][name], atol=CLOSE, rtol=0)


def test_a_layer_alone_is_bit_for_bit_what_the_whole_run_recorded(tiny: Checkpoint, probes: tuple[Probe, ...]) -> None:
    """So neither the hooks nor the recording, which differ, have any part in the numbers. One probe, because what
    stands in padding differs, and with it the rows that an expert multiplies at a time."""
    trace = run_reference(tiny, probes[2:]).trace
    for n in range(4):
        [ops] = layer_ops(tiny, n, [trace.hidden(n, 0)], [trace.residual(n, 0)])
        np.testing.assert_array_equal(trace.hidden(n, 0) + ops["o_proj"], trace.residual(n, 0))
        np.testing.assert_array_equal(trace.residual(n, 0) + ops["experts"], trace.hidden(n + 1, 0))
        np.testing.assert_array_equal(ops["router"], trace.router_logits(n, 0))
        for name in OPS:
            assert trace.peaks[name][n].largest == float(np.abs(ops[name]).max())


def test_the_halves_of_a_layer_alone_run_from_their_own_streams(reference: Reference, tiny: Checkpoint) -> None:
    hidden, residual = [reference.trace.hidden(2, 1)], [reference.trace.residual(2, 1)]
    [before] = layer_ops(tiny, 2, hidden, residual)
    [after] = layer_ops(tiny, 2, hidden, [residual[0] + np.float32(0.5)])
    changed = {name for name in OPS if not np.array_equal(before[name], after[name])}
    assert changed == {"post_attention_layernorm", "router", "experts"}
    [after] = layer_ops(tiny, 2, [hidden[0] * np.float32(1.5) + np.float32(0.5)], residual)
    changed = {name for name in OPS if not np.array_equal(before[name], after[name])}
    assert changed == {"input_layernorm", "q_proj", "k_proj", "v_proj", "attention", "o_proj"}


def test_a_layer_alone_refuses_what_does_not_fit(tiny: Checkpoint) -> None:
    rows = np.zeros((3, 192), np.float32)
    for index in (-1, 4):
        with pytest.raises(IndexError):
            layer_ops(tiny, index, [rows], [rows])
    with pytest.raises(ValueError, match="shapes"):
        layer_ops(tiny, 0, [rows], [rows[:2]])


def test_a_trace_outlives_its_folder_and_leaves_nothing(
    tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run = run_reference(tiny, [Probe("three", (1, 2, 3))])
    assert list(tmp_path.iterdir()) == []
    assert run.logits(0, 0, 3).shape == (3, 2048)
    assert run.trace.hidden(4, 0).shape == (3, 192)


def test_no_place_for_a_trace(tiny: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(AccessError, match="cannot be written"):
        run_reference(tiny, [Probe("three", (1, 2, 3))])


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write as a full disk does."""
    for name in ("final", "router_logits"):
        (tmp_path / f"{name}.npy").symlink_to("/dev/full")
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: opened(path, mode.replace("x", "w")))
    with pytest.raises(DiskSpaceError, match="no space left"):
        writer = TraceWriter(tmp_path, TraceShape((4000,), 1, 32, 4), "routing")
        writer.append("final", np.ones((4000, 32), np.float32))


def write(folder: Path) -> TraceShape:
    shape = TraceShape((2, 3), 2, 4, 3)
    writer = TraceWriter(folder, shape, "states")
    values = np.random.default_rng(0)
    for name, (layers, positions, width) in shape.arrays("states").items():
        for _ in range(layers):
            writer.append(name, values.standard_normal((positions, width)).astype(np.float32))
    writer.finish({"hidden": (Peak(1.5, 0), Peak(2.0, 7), Peak(0.0, 3))})
    return shape


def test_a_folder_of_npy_files(tmp_path: Path) -> None:
    """Which numpy alone reads, layers and probes in their places."""
    shape = write(tmp_path)
    trace = Trace(tmp_path, shape, "states")
    for name, read in (("hidden", trace.hidden), ("residual", trace.residual), ("router_logits", trace.router_logits)):
        stored = np.load(tmp_path / f"{name}.npy", allow_pickle=False)
        assert stored.shape == shape.arrays("states")[name]
        for layer in range(2):
            np.testing.assert_array_equal(read(layer, 0), stored[layer, :2])
            np.testing.assert_array_equal(read(layer, 1), stored[layer, 2:])
    assert trace.peaks == {"hidden": (Peak(1.5, 0), Peak(2.0, 7), Peak(0.0, 3))}
    assert shape.nbytes("states") == sum(np.load(file).nbytes for file in tmp_path.glob("*.npy"))
    with pytest.raises(ValueError, match="read-only"):
        trace.hidden(0, 0)[0, 0] = 1.0


def test_a_layer_too_few(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path, TraceShape((2,), 2, 4, 3), "routing")
    writer.append("final", np.zeros((2, 4), np.float32))
    writer.append("router_logits", np.zeros((2, 3), np.float32))
    with pytest.raises(AssertionError):
        writer.finish({})
    writer.close()


@pytest.mark.parametrize("damage", ["short", "long", "shape", "type", "pickle", "version"])
def test_files_that_are_not_of_this_shape(damage: str, tmp_path: Path) -> None:
    shape = write(tmp_path)
    path = tmp_path / "residual.npy"
    stored = np.load(path)
    if damage == "short":
        path.write_bytes(path.read_bytes()[:-4])
    elif damage == "long":
        path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    elif damage == "shape":
        np.save(path, stored.reshape(5, 2, 4))
    elif damage == "type":
        np.save(path, stored.astype(np.int32))
    elif damage == "pickle":
        np.save(path, stored.astype(object), allow_pickle=True)
    else:
        with path.open("wb") as file:
            np.lib.format.write_array(file, stored, version=(2, 0))
    with pytest.raises(ValueError, match=r"residual\.npy"):
        Trace(tmp_path, shape, "states")


def test_errors_that_are_none_of_the_disk_pass(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError), trace_module.disk_errors():
        raise ConnectionResetError

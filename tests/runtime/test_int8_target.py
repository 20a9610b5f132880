"""ort-cpu-int8: what the artifact reads, that it computes with exactly these weights, and every way to place them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from gptoss_export.engines.ort import build
from gptoss_export.engines.ort.build import build_ort_cpu_int8
from gptoss_export.engines.ort.library import kernel_library
from gptoss_export.engines.ort.run import open_ort_runner
from gptoss_export.engines.runner import Runner
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import read_manifest, verify_files
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, Layout
from gptoss_export.exporter.commands.bench import count_weights
from gptoss_export.exporter.ops import DOMAIN
from gptoss_export.validators.report import read_report

if TYPE_CHECKING:
    import torch
    from transformers import GptOssForCausalLM

TARGET = "ort-cpu-int8"
FILE = "int8/linear.safetensors"


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(["-q", *map(str, args)])
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def release(tiny_dir: Path, known_graph: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the command makes it, with parity in full."""
    out = tmp_path_factory.mktemp("int8") / "release"
    export = ["-q", "--target", TARGET, "--model", str(tiny_dir), "--output", str(out), "--parity", "full"]
    assert cli.main(export) == 0
    return out


@pytest.fixture(scope="module")
def rounded(
    load_plain: Callable[[torch.dtype], GptOssForCausalLM],
    tiny_builds: dict[str, Path],
    tiny_reference: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [1, 100] and the logits of transformers with the int8 file's weights in float32."""
    import torch
    from safetensors.numpy import load_file

    tensors = load_file(tiny_builds[TARGET] / FILE)
    model = load_plain(torch.float32)

    def weight(name: str) -> torch.Tensor:
        q, scales = tensors[f"{name}.weight_int8"], tensors[f"{name}.weight_scales"].astype(np.float32)
        return torch.from_numpy(q * np.repeat(scales, 32, axis=1))

    with torch.no_grad():
        for n, layer in list(enumerate(model.model.layers))[2:]:
            stacked = weight(f"model.layers.{n}.self_attn.qkv_proj")
            attention = layer.self_attn
            parts = zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), stacked.split([256, 64, 64]), strict=True
            )
            for projection, rows in parts:
                projection.weight.copy_(rows)
            attention.o_proj.weight.copy_(weight(f"model.layers.{n}.self_attn.o_proj"))
        model.lm_head.weight.copy_(weight("lm_head"))
        ids = tiny_reference[0]
        return ids, model(torch.from_numpy(ids)).logits.numpy()


def largest_difference(runner: Runner, rounded: tuple[np.ndarray, np.ndarray]) -> float:
    """Over a prompt and single steps after it."""
    ids, expected = rounded
    step = runner.forward(ids[:, :90], keep=0)
    parts: list[Any] = [step.logits]
    for i in range(90, 100):
        step = runner.forward(ids[:, i : i + 1], cache=step.cache)
        parts.append(step.logits)
    return float(np.abs(np.concatenate(parts, axis=1) - expected).max())


def test_parity_in_full_passes_and_the_manifest_says_what_was_done(release: Path) -> None:
    manifest = read_manifest(release)
    assert (manifest.target, manifest.parity.verdict, manifest.parity.effort) == (TARGET, "pass", "full")
    verify_files(release, manifest)
    assert manifest.files[FILE].nbytes == (release / FILE).stat().st_size
    assert FILE not in manifest.checkpoint
    assert any(note.startswith(FILE) for note in manifest.notes)


def test_a_checkpoint_with_bf16_experts_passes_too(
    tiny_layouts: dict[Layout, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They have no kernel, so that one way of asking differs from another in the last bits of float32."""
    out = tmp_path / "release"
    code, told = run(capsys, "--target", TARGET, "--model", tiny_layouts[Layout.HF_BF16], "--output", out)
    assert code == 0, told
    report = read_report(out)
    differences = [c.logit_diff_max for c in report.evidence.consistency if c.logit_diff_max is not None]
    assert 1e-5 < max(differences) < 5e-4


def test_weights_are_still_the_whole_checkpoint(release: Path, tiny: Checkpoint) -> None:
    for file in tiny.weight_files:
        assert (release / "weights" / file.name).read_bytes() == file.read_bytes()


def test_the_model_reads_in_bf16_the_embedding_the_routers_and_the_first_third_of_attention(release: Path) -> None:
    model = onnx.load(release / "model.onnx", load_external_data=False)
    weights = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}
    matrices = {
        t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.BFLOAT16 and len(t.dims) == 2
    }
    stored = {name for name in matrices if weights[name]["location"].startswith("weights/")}
    routers_and_biases = {name for name in stored if ".mlp." in name}
    attention = {f"model.layers.{n}.self_attn.{part}_proj.weight" for n in (0, 1) for part in "qkvo"}
    assert stored - routers_and_biases == {"model.embed_tokens.weight"} | attention
    ours = {name for name, place in weights.items() if place["location"] == FILE}
    kinds = ("qkv_proj.weight_int8", "qkv_proj.weight_scales", "qkv_proj.bias", "o_proj.weight_int8")
    layers = {f"model.layers.{n}.self_attn.{kind}" for n in (2, 3) for kind in (*kinds, "o_proj.weight_scales")}
    assert ours == layers | {"lm_head.weight_int8", "lm_head.weight_scales"}
    assert all(int(weights[name]["offset"]) % 64 == 0 for name in ours)
    ops = {node.op_type for node in model.graph.node if node.domain == DOMAIN}
    assert ops >= {"LinearInt8", "LinearInt8NoBias", "Linear", "LinearQKV"} and "LinearNoBias" not in ops
    onnx.checker.check_model(release / "model.onnx", full_check=True)


def test_it_computes_with_exactly_the_weights_of_the_file(
    tiny_builds: dict[str, Path], rounded: tuple[np.ndarray, np.ndarray]
) -> None:
    runner = TARGETS[TARGET].open_runner(tiny_builds[TARGET], 2)
    assert largest_difference(runner, rounded) < 2e-3


def test_the_kernels_win_over_the_bodies(tiny_builds: dict[str, Path], tmp_path: Path) -> None:
    """No weight is decoded into float32 where the library is."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(kernel_library()))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
    ort.InferenceSession(tiny_builds[TARGET] / "model.onnx", options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    ops = [node.op_type for node in nodes]
    assert (ops.count("LinearInt8"), ops.count("LinearInt8NoBias"), ops.count("DequantizeLinear")) == (4, 1, 0)


def test_without_the_library_it_computes_the_same_in_float32(
    tiny: Checkpoint,
    tiny_graph: ir.Model,
    tiny_builds: dict[str, Path],
    rounded: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An artifact that comes to a host without the library, and one that was built on such a host."""
    moved = open_ort_runner(tiny_builds[TARGET], "CPUExecutionProvider", 2, kernels=False)
    assert largest_difference(moved, rounded) < 1e-4
    monkeypatch.setattr(build, "kernels_work", lambda: "not in this test")
    shutil.copytree(tiny.root, tmp_path / "weights")
    info = build_ort_cpu_int8(tiny_graph, tiny, tmp_path, "weights")
    assert info.notes[0] == "kernels: none, not in this test"
    assert any(note.startswith("linear layers and experts: function bodies") for note in info.notes)
    built = open_ort_runner(tmp_path, "CPUExecutionProvider", 2, kernels=False)
    assert largest_difference(built, rounded) < 1e-4


def test_two_builds_are_the_same_bytes(
    tiny: Checkpoint, tiny_graph: ir.Model, tiny_builds: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny.root, tmp_path / "weights")
    assert build_ort_cpu_int8(tiny_graph, tiny, tmp_path, "weights").engine.startswith("onnxruntime ")
    for name in (FILE, "model.onnx", "genai_config.json"):
        assert (tmp_path / name).read_bytes() == (tiny_builds[TARGET] / name).read_bytes()


def test_scales_are_scales_of_32_weights(tiny_builds: dict[str, Path], tiny: Checkpoint) -> None:
    """The file against the checkpoint: no weight is off by more than half a step, and no step larger than needed."""
    from safetensors.numpy import load_file

    from gptoss_export.exporter.checkpoint.read import read_tensor

    tensors = load_file(tiny_builds[TARGET] / FILE)
    for name in ("lm_head", "model.layers.2.self_attn.o_proj"):
        weights = read_tensor(tiny.tensors[f"{name}.weight"]).astype(np.float64)
        steps = np.repeat(tensors[f"{name}.weight_scales"].astype(np.float64), 32, axis=1)
        error = np.abs(tensors[f"{name}.weight_int8"] * steps - weights)
        assert (error <= steps / 2).all()
        largest = np.repeat(np.abs(weights).reshape(len(weights), -1, 32).max(-1), 32, axis=1)
        assert (steps <= largest / 127 * (1 + 2.0**-7)).all()
    assert tensors["lm_head.weight_scales"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("mode", ["hardlink", "in-place"])
def test_the_other_ways_to_place_weights(
    mode: str, tiny_dir: Path, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_dir, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    out = source if mode == "in-place" else tmp_path / "release"
    args = ["--target", TARGET, "--model", source, "--output", out, "--weights", mode, "--parity", "off"]
    assert run(capsys, *args)[0] == 0
    assert (out / FILE).read_bytes() == (release / FILE).read_bytes()
    assert all((source / name).read_bytes() == content for name, content in before.items())
    shard = "model-00000-of-00002.safetensors"
    assert (out / read_manifest(out).weights_dir / shard).samefile(source / shard)
    code, err = run(capsys, "validate", out)
    assert code == 0, err
    assert read_manifest(out).parity.verdict == "pass"
    assert run(capsys, *args)[0] == 40
    assert run(capsys, *args, "--force")[0] == 0


def test_a_checkpoint_whose_folder_has_the_name_of_ours(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "int8"
    shutil.copytree(tiny_dir, source)
    names = sorted(path.name for path in source.iterdir())
    args = ["--target", TARGET, "--model", source, "--output", tmp_path, "--weights", "in-place", "--parity", "off"]
    code, err = run(capsys, *args)
    assert code == 41 and "named int8" in err
    assert sorted(path.name for path in source.iterdir()) == names
    assert list(tmp_path.iterdir()) == [source]


def test_a_weight_that_is_not_finite_stops_the_export(
    tiny_dir: Path, tiny: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_dir, source)
    ref = tiny.tensors["model.layers.2.self_attn.k_proj.weight"]
    file = source / ref.file.name
    data = bytearray(file.read_bytes())
    data[ref.offset + 2 * 192 : ref.offset + 2 * 192 + 2] = b"\x80\x7f"
    file.write_bytes(data)
    code, err = run(capsys, "--target", TARGET, "--model", source, "--output", tmp_path / "out", "--parity", "off")
    assert code == 29
    assert "model.layers.2.self_attn.k_proj.weight: the weight in row 1, column 0 is inf" in err
    assert list(tmp_path.iterdir()) == [source]


def test_bytes_of_a_token_are_those_of_the_files(release: Path, tiny: Checkpoint) -> None:
    counted = count_weights(read_manifest(release))
    assert counted is not None
    assert counted.lm_head == 2048 * 192 * 34 // 32
    in_bf16 = 2 * (192 * 384 + 384 + 256 * 192)  # a layer of the first third
    stored_in_weights = 4 * 2 * 8 + 4 * 2 * 192 + 2 * in_bf16  # sinks and the biases of o beside
    in_file = counted.lm_head + counted.attention - stored_in_weights
    with (release / FILE).open("rb") as f:
        header = 8 + int.from_bytes(f.read(8), "little")
    assert (release / FILE).stat().st_size == header + in_file

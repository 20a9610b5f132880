"""Random checkpoints: the right files, the same bytes for a seed, sane values, small memory."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptoss_export.exporter.checkpoint import synth, synth_values
from gptoss_export.exporter.checkpoint.open import check_scales, open_checkpoint, read_tensor
from gptoss_export.exporter.checkpoint.synth import PRESETS, SynthShape, raw_config, synthesize
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.errors import AbsurdSizeError, ConfigError, DiskSpaceError, OutputExistsError

SMALL = SynthShape(
    vocab_size=300,
    hidden_size=96,
    intermediate_size=64,
    num_layers=2,
    num_experts=6,
    top_k=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
)


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.mark.parametrize("layout", Layout)
def test_opens_as_what_was_asked_for(tmp_path: Path, layout):
    synthesize(tmp_path / "x", SMALL, layout=layout)
    checkpoint = open_checkpoint(tmp_path / "x")
    check_scales(checkpoint)
    c = checkpoint.config
    assert checkpoint.layout is layout
    assert (c.vocab_size, c.num_layers, c.num_experts, c.top_k, c.head_dim) == (300, 2, 6, 2, 16)
    assert (c.yarn.factor, c.yarn.truncate, c.max_positions, c.sliding_window) == (32.0, False, 131072, 128)
    assert c.layer_types == ("sliding_attention", "full_attention")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_safetensors_reads_it(tmp_path: Path):
    from safetensors.numpy import load_file

    synthesize(tmp_path / "x", SMALL)
    loaded = load_file(tmp_path / "x" / "model.safetensors")
    for name, ref in open_checkpoint(tmp_path / "x").tensors.items():
        assert read_tensor(ref).tobytes() == loaded[name].tobytes()
        assert ref.offset % 2 == 0


@pytest.mark.parametrize("layout", Layout)
def test_bytes_depend_on_the_seed_only(tmp_path: Path, monkeypatch, layout):
    synthesize(tmp_path / "a", SMALL, layout=layout, seed=7)
    synthesize(tmp_path / "other", SMALL, layout=layout, seed=8)
    monkeypatch.setattr(synth.os, "cpu_count", lambda: 1)
    synthesize(tmp_path / "b", SMALL, layout=layout, seed=7)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "other")


def test_a_stream_can_be_entered_anywhere(monkeypatch):
    monkeypatch.setattr(synth_values, "BLOCK_BYTES", 64)
    weights = synth_values.RandomWeights(SMALL, 3)
    whole = weights._stream("lm_head.weight", 0, 1000)
    for start, end in ((0, 64), (0, 65), (63, 64), (64, 200), (100, 1000), (998, 1000)):
        assert (weights._stream("lm_head.weight", start, end) == whole[start:end]).all()
    assert len(np.unique(whole.reshape(-1, 8), axis=0)) == 125


def test_layouts_and_shardings_are_one_network(tmp_path: Path):
    from gptoss_export.exporter.checkpoint.mxfp4 import decode

    for layout in Layout:
        synthesize(tmp_path / layout.value, SMALL, layout=layout, seed=1)
    synthesize(tmp_path / "sharded", SMALL, seed=1, shard_bytes=20_000)
    mxfp4, bf16, original, sharded = (
        {n: np.array(read_tensor(r)) for n, r in open_checkpoint(tmp_path / name).tensors.items()}
        for name in (Layout.HF_MXFP4.value, Layout.HF_BF16.value, Layout.ORIGINAL.value, "sharded")
    )
    for name, tensor in mxfp4.items():
        assert original[name].tobytes() == sharded[name].tobytes() == tensor.tobytes()
    for name, tensor in bf16.items():
        if name in mxfp4:
            assert mxfp4[name].tobytes() == tensor.tobytes()
        else:
            dense = decode(mxfp4[f"{name}_blocks"], mxfp4[f"{name}_scales"]).transpose(0, 2, 1)
            assert (tensor.astype(np.float32) == dense).all()


def test_shards(tmp_path: Path):
    synthesize(tmp_path / "x", SMALL, shard_bytes=60_000)
    checkpoint = open_checkpoint(tmp_path / "x")
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    count = len(checkpoint.weight_files)
    assert [f.name for f in checkpoint.weight_files] == [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(count)
    ]
    assert index["metadata"]["total_size"] == sum(r.nbytes for r in checkpoint.tensors.values())
    for file in checkpoint.weight_files:
        sizes = [r.nbytes for r in checkpoint.tensors.values() if r.file == file]
        assert sum(sizes) <= 60_000 or len(sizes) == 1


def test_values_are_sane(tmp_path: Path):
    """Unit gain of every matrix, and a distribution that is no worse than a normal one."""
    shape = replace(SMALL, hidden_size=2880 // 5, intermediate_size=352, vocab_size=2000, num_experts=2, num_layers=1)
    for layout in (Layout.HF_MXFP4, Layout.HF_BF16):
        synthesize(tmp_path / layout.value, shape, layout=layout)
    tensors = {
        name: read_tensor(ref).astype(np.float32)
        for name, ref in open_checkpoint(tmp_path / "huggingface-bf16").tensors.items()
    }
    for name, t in tensors.items():
        assert np.isfinite(t).all()
        if t.ndim == 1 and "norm" in name:
            assert t.min() > 0.95 and t.max() < 1.06
        elif name.endswith(("weight", "_proj")):
            fan_in = t.shape[1]
            gain = float(t.std()) * (1.0 if "embed" in name else fan_in**0.5)
            assert 0.7 < gain < 1.42, name
            assert abs(float(t.mean())) < 0.05 * float(t.std()), name
    for name in ("self_attn.q_proj.weight", "self_attn.o_proj.weight"):
        t = tensors[f"model.layers.0.{name}"].astype(np.float64)
        assert (t**4).mean() / (t**2).mean() ** 2 < 3
    released = open_checkpoint(tmp_path / "huggingface-mxfp4").tensors
    scales = read_tensor(released["model.layers.0.mlp.experts.down_proj_scales"])
    assert set(np.unique(scales)) == {scales.min(), scales.min() + 1}
    codes = np.bincount(read_tensor(released["model.layers.0.mlp.experts.down_proj_blocks"]).ravel(), minlength=256)
    assert codes.min() > 0.8 * codes.mean()


def test_activations_stay_sane_through_many_layers(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = replace(SMALL, num_layers=24)
    synthesize(tmp_path / "x", shape, layout=Layout.HF_BF16)
    config = GptOssConfig(**raw_config(shape, Layout.HF_BF16))
    model = GptOssForCausalLM.from_pretrained(tmp_path / "x", config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(torch.arange(40)[None], output_hidden_states=True)
    deviations = [float(h.std()) for h in out.hidden_states]
    assert min(deviations) > 0.3 and max(deviations) < 20
    assert 0.3 < float(out.logits.std()) < 5


def test_progress_ends_at_the_total(tmp_path: Path):
    calls = []
    synthesize(tmp_path / "x", SMALL, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == sum(r.nbytes for r in open_checkpoint(tmp_path / "x").tensors.values())


def test_presets():
    assert (PRESETS["20b"].num_layers, PRESETS["20b"].num_experts) == (24, 32)
    assert (PRESETS["120b"].num_layers, PRESETS["120b"].num_experts) == (36, 128)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden_size": 100}, ConfigError),
        ({"top_k": 7}, ConfigError),
        ({"num_layers": 0}, ConfigError),
        ({"vocab_size": 1 << 40}, AbsurdSizeError),
    ],
)
@pytest.mark.parametrize("layout", Layout)
def test_impossible_shapes(tmp_path: Path, change, error, layout):
    with pytest.raises(error):
        synthesize(tmp_path / "x", replace(SMALL, **change), layout=layout)
    assert not list(tmp_path.iterdir())


def test_negative_seed(tmp_path: Path):
    with pytest.raises(ConfigError, match="seed"):
        synthesize(tmp_path / "x", SMALL, seed=-1)


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("x", "file", "dangling"):
        with pytest.raises(OutputExistsError):
            synthesize(tmp_path / name, SMALL)
    assert (tmp_path / "x" / "precious").exists()
    (tmp_path / "empty").mkdir()
    synthesize(tmp_path / "empty", SMALL)


def test_interrupted(tmp_path: Path):
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(tmp_path / "x", SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


def test_disk_too_small(tmp_path: Path, monkeypatch):
    huge = replace(PRESETS["120b"], num_experts=4096, num_layers=1024)
    with pytest.raises(DiskSpaceError, match="GB"):
        synthesize(tmp_path / "x", huge)

    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DiskSpaceError):
        synthesize(tmp_path / "x", SMALL, progress=full)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_tensors(tmp_path: Path):
    code = (
        "import sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from gptoss_export.exporter.checkpoint.synth import PRESETS, synthesize\n"
        "shape = replace(PRESETS['20b'], vocab_size=30000, num_layers=1, num_experts=1, top_k=1)\n"
        "synthesize(Path(sys.argv[1]), shape)\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert (tmp_path / "x" / "model.safetensors").stat().st_size > 400e6
    assert int(run.stdout) < 200_000  # kB

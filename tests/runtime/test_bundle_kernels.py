"""--bundle-kernels: the library in the artifact is the installed one, and others run the artifact with that file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptoss_export.engines.ort import library as library_module
from gptoss_export.engines.ort.bundle import bundle_kernels
from gptoss_export.engines.ort.library import LIBRARY_FILE, kernel_library
from gptoss_export.engines.targets import TARGETS
from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import read_manifest, verify_files

PROMPT = (340, 1145, 466)

# Each prints the files of our library that the process has mapped, and the tokens that follow the prompt.
ONNXRUNTIME = """
import json, sys
import numpy as np
import onnxruntime as ort

folder, prompt = sys.argv[1], json.loads(sys.argv[2])
options = ort.SessionOptions()
options.register_custom_ops_library(f"{folder}/libgptoss_ort_ops.so")
session = ort.InferenceSession(f"{folder}/model.onnx", options, providers=["CPUExecutionProvider"])
ids = list(prompt)
caches = [i.name for i in session.get_inputs() if i.name.startswith("past_key_values.")]
for _ in range(8):
    feeds = {name: np.zeros((1, 2, len(ids), 32), np.float32) for name in caches}
    feeds |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
    ids.append(int(session.run(["logits"], feeds)[0][0, -1].argmax()))
tokens = ids[len(prompt):]
"""
GENAI = """
import json, sys
import numpy as np
import onnxruntime_genai as og

folder, prompt = sys.argv[1], json.loads(sys.argv[2])
model = og.Model(folder)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + 8)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array(prompt, np.int32))
tokens = []
while not generator.is_done():
    generator.generate_next_token()
    tokens.append(int(generator.get_next_tokens()[0]))
"""
TELL = """
with open("/proc/self/maps") as f:
    mapped = sorted({line.split()[-1] for line in f if "libgptoss_ort_ops" in line})
print(json.dumps({"mapped": mapped, "tokens": tokens}))
"""


@pytest.fixture(scope="module")
def release(tiny_dir: Path, known_graph: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both targets that have kernels."""
    out = tmp_path_factory.mktemp("bundle") / "release"
    targets = ["--target", "ort-cpu", "--target", "ort-cpu-int8"]
    args = [*targets, "--model", str(tiny_dir), "--output", str(out), "--parity", "off", "--bundle-kernels"]
    assert cli.main(["-q", *args]) == 0
    return out


@pytest.fixture(scope="module")
def installed() -> Path:
    path = kernel_library()
    assert path is not None
    return path


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-int8"])
def test_the_artifact_has_the_installed_library_and_says_so(target: str, release: Path, installed: Path) -> None:
    folder = release / target
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert (folder / LIBRARY_FILE).read_bytes() == installed.read_bytes()
    assert manifest.files[LIBRARY_FILE].nbytes == installed.stat().st_size
    assert any(note.startswith(f"{LIBRARY_FILE}: bundled") for note in manifest.notes)
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY_FILE


@pytest.mark.parametrize("user", [ONNXRUNTIME, GENAI], ids=["onnxruntime", "genai"])
@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-int8"])
def test_others_run_it_with_that_file(target: str, user: str, release: Path, tmp_path: Path) -> None:
    """In a process of its own, from another folder: the library that is mapped is the artifact's, and no other."""
    folder = release / target
    done = subprocess.run(
        [sys.executable, "-c", user + TELL, folder, json.dumps(PROMPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mapped"] == [str((folder / LIBRARY_FILE).resolve())]
    runner = TARGETS[target].open_runner(folder, 1)
    step = runner.forward(np.array([PROMPT]))
    ours: list[int] = []
    for _ in range(8):
        ours.append(int(step.logits[0, -1].argmax()))
        step = runner.forward(np.array([[ours[-1]]]), cache=step.cache)
    assert found["tokens"] == ours


def test_our_own_runner_loads_the_installed_library_only(release: Path, installed: Path) -> None:
    code = """
import json, sys
from pathlib import Path
from gptoss_export.engines.targets import TARGETS
runner, tokens = TARGETS["ort-cpu"].open_runner(Path(sys.argv[1]), 1), []
"""
    done = subprocess.run(
        [sys.executable, "-c", code + TELL, release / "ort-cpu"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["mapped"] == [str(installed.resolve())]


def test_without_being_asked_nothing_is_bundled(tiny_builds: dict[str, Path]) -> None:
    for folder in tiny_builds.values():
        assert not (folder / LIBRARY_FILE).exists()
        assert "custom_ops_library" not in (folder / "genai_config.json").read_text()


def test_an_artifact_without_genai_config_gets_the_library_all_the_same(installed: Path, tmp_path: Path) -> None:
    bundle_kernels(installed, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LIBRARY_FILE]


@pytest.mark.parametrize("targets", [("onnx",), ("ort-cpu", "onnx")])
def test_a_target_without_kernels_is_an_error_before_anything_is_written(
    targets: tuple[str, ...], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [arg for target in targets for arg in ("--target", target)]
    code = cli.main([*named, "--model", str(tiny_dir), "--output", str(tmp_path / "release"), "--bundle-kernels"])
    err = capsys.readouterr().err
    assert code == 30
    assert "target onnx runs without kernels of ours" in err and "leave --bundle-kernels out" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("why", ["installed without", "refuses"])
def test_no_library_is_an_error_before_anything_is_written(
    why: str,
    tiny_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not installed, and one that this onnxruntime does not take."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(library_module, "kernel_library", lambda: broken if why == "refuses" else None)
    monkeypatch.setattr(library_module, "kernels_work", library_module.kernels_work.__wrapped__)
    out = tmp_path / "release"
    code = cli.main(["--target", "ort-cpu", "--model", str(tiny_dir), "--output", str(out), "--bundle-kernels"])
    err = capsys.readouterr().err
    assert code == 30
    assert why in err and "C++ compiler" in err.splitlines()[-1]
    assert not out.exists()

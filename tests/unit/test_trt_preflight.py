"""What is checked before an engine is deserialised: every mismatch one line that says what to do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptoss_export.engines.tensorrt import cuda, preflight, run
from gptoss_export.engines.tensorrt.cuda import DeviceInfo, device_missing
from gptoss_export.engines.tensorrt.execution import load_engine
from gptoss_export.engines.tensorrt.metadata import EngineInput, EngineMetadata, write_metadata
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.engines.tensorrt.preflight import (
    check_device,
    check_files,
    check_memory,
    load_package,
    rebuild_command,
    stored_bytes,
)
from gptoss_export.engines.tensorrt.run import open_trt_runner
from gptoss_export.exporter.artifact import MANIFEST_NAME
from gptoss_export.exporter.errors import (
    EngineMismatchError,
    GptossExportError,
    IntegrityError,
    ManifestError,
    OutOfMemoryError,
    TargetUnavailableError,
)
from gptoss_export.exporter.weights import hash_files

ADA = DeviceInfo("NVIDIA L4", (8, 9), 24 << 30)
ENGINE = b"an engine"
METADATA = EngineMetadata(
    flavor="rtx",
    version="1.7.1.116",
    compute_capabilities=("8.0+",),
    dtype="bf16",
    engine_weights="external",
    max_batch=EngineOptions.max_batch,
    max_prompt=EngineOptions.max_prompt,
    max_context=EngineOptions.max_context,
    max_logits=EngineOptions.max_logits,
    plugin=True,
    engine_sha256=hashlib.sha256(ENGINE).hexdigest(),
    inputs={"w": EngineInput("weights/a", "U8", (10,), 5, 10)},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "engine.plan").write_bytes(ENGINE)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(15))
    write_metadata(METADATA, tmp_path)
    return tmp_path


def one_line(error: GptossExportError) -> None:
    assert "\n" not in error.what + error.next_step
    assert error.next_step


def device(info: DeviceInfo = ADA, free: int = 20 << 30) -> SimpleNamespace:
    return SimpleNamespace(info=info, free_bytes=lambda: free)


def test_a_good_artifact_passes(folder: Path) -> None:
    check_files(folder, METADATA)
    check_device(METADATA, ADA)
    check_memory(stored_bytes(METADATA, folder), device())
    assert stored_bytes(METADATA, folder) == 10 + len(ENGINE)


@pytest.mark.parametrize("name", ["engine.plan", "engine.json", "weights/a"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing") as caught:
        check_files(folder, METADATA)
    one_line(caught.value)


def test_another_engine_is_refused(folder: Path) -> None:
    (folder / "engine.plan").write_bytes(ENGINE[:-1] + b"!")
    with pytest.raises(IntegrityError, match=r"is not the engine that engine\.json describes") as caught:
        check_files(folder, METADATA)
    one_line(caught.value)


def test_weights_that_are_too_short_are_refused(folder: Path) -> None:
    (folder / "weights" / "a").write_bytes(bytes(14))
    with pytest.raises(IntegrityError, match="ends before w does, at byte 15"):
        check_files(folder, METADATA)


@pytest.mark.parametrize("name", ["engine.plan", "engine.json"])
def test_the_manifest_has_the_last_word(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    records = hash_files({n: folder / n for n in ("engine.plan", "engine.json")})
    monkeypatch.setattr(preflight, "read_manifest", lambda _: SimpleNamespace(files=records))
    (folder / MANIFEST_NAME).write_text("{}")
    check_files(folder, METADATA)
    records[name] = replace(records[name], sha256="1" * 64)
    with pytest.raises(IntegrityError, match=f"{name} is not the file that the manifest names") as caught:
        check_files(folder, METADATA)
    one_line(caught.value)
    del records[name]
    with pytest.raises(IntegrityError, match=name):
        check_files(folder, METADATA)


def test_a_manifest_that_is_none_is_refused(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps({"schema_version": 7}))
    with pytest.raises(ManifestError):
        check_files(folder, METADATA)


def test_another_gpu_is_one_line_with_the_command() -> None:
    with pytest.raises(EngineMismatchError) as caught:
        check_device(METADATA, DeviceInfo("Tesla T4", (7, 5), 16 << 30))
    assert caught.value.what == "the engine is for compute capability 8.0 and later, and Tesla T4 has 7.5"
    assert "gptoss-export --target trt-bf16 --trt-flavor rtx --model" in caught.value.next_step
    one_line(caught.value)


def test_the_command_makes_the_same_engine_again() -> None:
    assert rebuild_command(METADATA) == (
        "gptoss-export --target trt-bf16 --trt-flavor rtx --model <checkpoint> --output <new>"
    )
    other = replace(METADATA, dtype="fp32", max_batch=77, max_context=99, engine_weights="embedded", plugin=False)
    assert rebuild_command(other) == (
        "gptoss-export --target trt-fp32 --trt-flavor rtx --max-batch 77 --max-context 99 --engine-weights embedded "
        "--trt-experts function --model <checkpoint> --output <new>"
    )


def test_too_little_memory_is_one_line_with_figures() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(21 << 30, device())
    assert caught.value.what == (
        "the engine needs 21.0 GiB of device memory, and NVIDIA L4 has 20.0 GiB free of 24.0 GiB"
    )
    one_line(caught.value)


def package(version: str) -> SimpleNamespace:
    return SimpleNamespace(load=lambda: SimpleNamespace(__version__=version))


def test_the_package_has_to_be_of_the_engine_s_version(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(preflight, "find_flavor", lambda name: asked.append(name) or package("1.8.0.1"))
    with pytest.raises(EngineMismatchError) as caught:
        load_package(METADATA)
    assert caught.value.what == "the engine is of TensorRT for RTX 1.7.1.116, and this host has 1.8.0.1"
    assert caught.value.next_step.startswith("pip install tensorrt-rtx-cu13==1.7.1.116, or rebuild it here: ")
    one_line(caught.value)
    assert load_package(replace(METADATA, version="1.8.0.1")).__version__ == "1.8.0.1"
    with pytest.raises(EngineMismatchError, match=r"of TensorRT 10\.16\.0\.72"):
        load_package(replace(METADATA, flavor="tensorrt", version="10.16.0.72"))
    assert asked == ["rtx", "rtx", "tensorrt"]


def test_opening_checks_everything_before_the_engine_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(run, "TensorRTRunner", lambda *a, **k: loaded.append((a, k)))
    monkeypatch.setattr(run, "Device", lambda: device())
    monkeypatch.setattr(preflight, "find_flavor", lambda name: package("1.7.1.116"))
    open_trt_runner(folder, 4, cuda_graphs=False)
    assert loaded.pop()[1] == {"cuda_graphs": False}

    def fails(error: type[GptossExportError]) -> None:
        with pytest.raises(error):
            open_trt_runner(folder)
        assert not loaded

    with monkeypatch.context() as other:
        other.setattr(preflight, "find_flavor", lambda name: package("1.7.1.117"))
        fails(EngineMismatchError)
    with monkeypatch.context() as other:
        other.setattr(run, "Device", lambda: device(DeviceInfo("Tesla T4", (7, 5), 16 << 30)))
        fails(EngineMismatchError)
    with monkeypatch.context() as other:
        other.setattr(run, "Device", lambda: device(free=12))
        fails(OutOfMemoryError)
    (folder / "engine.plan").write_bytes(b"another")
    fails(IntegrityError)
    (folder / "engine.json").unlink()
    fails(IntegrityError)


def test_a_host_without_cuda_bindings_or_device_is_told_in_words(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(cuda, "gpu_problem", lambda: "no NVIDIA driver")
    monkeypatch.setattr(cuda, "find_spec", lambda name: object())
    assert device_missing() == "no NVIDIA driver"
    with pytest.raises(TargetUnavailableError, match="no NVIDIA driver") as caught:
        open_trt_runner(folder)
    one_line(caught.value)
    monkeypatch.setattr(cuda, "gpu_problem", lambda: None)
    assert device_missing() is None

    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'cuda'")

    for find in (absent, lambda name: None):
        monkeypatch.setattr(cuda, "find_spec", find)
        assert device_missing() == "cuda-bindings is not installed"


def test_the_real_package_says_why_it_does_not_load_an_engine(folder: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    metadata = replace(METADATA, version=trt.__version__)
    with pytest.raises(EngineMismatchError) as caught:
        load_engine(trt, folder, metadata)
    assert caught.value.what.startswith(f"TensorRT {trt.__version__} does not load the engine")
    assert not caught.value.what.endswith("TensorRT logged nothing")
    one_line(caught.value)


def test_asking_for_a_device_raises_nothing() -> None:
    why = device_missing()
    assert why is None or (why and "\n" not in why)

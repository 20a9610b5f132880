"""The plan and the order of the stages, with fakes where a stage is slow."""

from __future__ import annotations

import os
import shutil
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_export.engines import targets
from gptoss_export.engines.build_info import BuildInfo, Execution
from gptoss_export.exporter import cli, pipeline, shared_stages, stopwatch
from gptoss_export.exporter.artifact import MANIFEST_NAME, read_manifest
from gptoss_export.exporter.checkpoint import open as open_module
from gptoss_export.exporter.checkpoint.open import open_checkpoint
from gptoss_export.exporter.checkpoint.tensors import Checkpoint
from gptoss_export.exporter.errors import (
    DiskSpaceError,
    GraphError,
    IntegrityError,
    InvalidScaleError,
    ManifestError,
    NotValidatedError,
    OutputExistsError,
    ParityFailedError,
    SessionError,
    TargetUnavailableError,
    WeightsModeError,
)
from gptoss_export.exporter.graph import build as build_module
from gptoss_export.exporter.pipeline import export, require_pass, validate_artifact
from gptoss_export.exporter.planning import plan
from gptoss_export.exporter.planning.plan import make_plan
from gptoss_export.exporter.planning.request import ExportRequest
from gptoss_export.exporter.weights import WeightsMode, hash_files
from gptoss_export.validators import floor, gates, parity, probes, reference_cache
from gptoss_export.validators import report as report_module

Usage = namedtuple("Usage", "total used free")
NOTHING_MEASURED = {"evidence": SimpleNamespace(scenarios=()), "reference": "reference"}
FLOORS = {"bfloat16": "floor in bfloat16", "float16": "floor in float16"}

CHECKPOINT_FILES = [
    "config.json",
    "generation_config.json",
    "model-00000-of-00002.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@dataclass
class FakeTarget:
    """A target that writes a file where an engine would write a model."""

    name: str
    log: list[str]
    fail: Exception | None = None
    summary: str = ""
    engine: str = "fake"
    own: int = 0
    library: Path | None = None
    kernels: Callable[[], Path] | None = None

    def device_bytes(self, checkpoint: Any, settings: Any) -> int:
        return 0

    def own_bytes(self, checkpoint: Any, settings: Any) -> int:
        return self.own

    def packages(self, settings: Any) -> tuple[str, ...]:
        return targets.PACKAGES

    def ram_bytes(self, checkpoint: Any, settings: Any) -> int:
        return 3_000_000_000 if self.name == "onnx" else 0

    def kernel_library(self) -> Path:
        if self.library is None:
            raise TargetUnavailableError(f"{self.name} has no kernels", "leave --bundle-kernels out")
        return self.library

    def bundle_kernels(self, folder: Path) -> str:
        shutil.copyfile(self.kernel_library(), folder / "kernels.so")
        return "kernels: bundled"

    def check_available(self) -> None:
        if self.fail is not None and isinstance(self.fail, TargetUnavailableError):
            raise self.fail

    def check(self, checkpoint: Any, settings: Any) -> None:
        assert settings.engine.max_batch >= 1

    def execution(self, folder: Path) -> Execution:
        return Execution("fake", "1", "FakeProvider")

    def build(self, graph: object, checkpoint: Any, folder: Path, weights_dir: str, settings: Any) -> BuildInfo:
        assert all((folder / weights_dir / f.name).is_file() for f in checkpoint.weight_files)
        self.log.append(f"build {self.name}")
        (folder / "model.onnx").write_text(f"{self.name} with weights in {weights_dir!r}")
        return BuildInfo(engine="fake 1", provider="FakeProvider", notes=("built by a test",))

    def open_runner(self, folder: Path, threads: int | None = None) -> str:
        assert (folder / "model.onnx").is_file()
        if isinstance(self.fail, SessionError):
            raise self.fail
        self.log.append(f"open {self.name}")
        return f"runner of {self.name}"

    def inspect(self, folder: Path, threads: int | None = None) -> str:
        return f"inspector of {self.name}"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fakes of everything slow; the list says in which order they ran."""
    entries: list[str] = []
    monkeypatch.setattr(targets, "TARGETS", {name: FakeTarget(name, entries) for name in ("onnx", "ort-cpu")})

    def note(entry: str, answer: object) -> Callable[..., object]:
        def stage(*_: object, **__: object) -> object:
            entries.append(entry)
            return answer

        return stage

    def validate(subject: parity.Subject, yardstick: parity.Yardstick, **_: object) -> object:
        assert yardstick.reference == "reference"
        entries.append(f"validate {subject.target} {yardstick.effort}")
        assert set(subject.binding.checkpoint) == set(CHECKPOINT_FILES)
        assert len(subject.binding.files) >= len(CHECKPOINT_FILES) + 1
        assert subject.inspector == f"inspector of {subject.target}"
        passed = not subject.runner.endswith("onnx")
        failure = SimpleNamespace(where="decode", gate="max_kl_mean", measured=0.5, limit=1e-9)
        verdict = SimpleNamespace(passed=passed, failures=() if passed else (failure,))
        outcome = "pass" if passed else "fail"
        return SimpleNamespace(
            effort=yardstick.effort,
            verdict=verdict,
            target=subject.target,
            outcome=outcome,
            loosened=(),
            **NOTHING_MEASURED,
        )

    def find_reference(checkpoint: Checkpoint, files: dict[str, str], *_: object, **__: object) -> str:
        assert files.keys() == set(CHECKPOINT_FILES)
        entries.append("reference")
        return "reference"

    def write_report(report: Any, folder: Path) -> tuple[Path, Path]:
        for name in ("parity.json", "parity.md"):
            (folder / name).write_text(f"{report.target} {report.effort} {report.verdict.passed}")
        return folder / "parity.json", folder / "parity.md"

    monkeypatch.setattr(build_module, "build_graph", note("graph", "graph"))
    monkeypatch.setattr(probes, "default_probes", lambda *_: ())
    monkeypatch.setattr(reference_cache, "reference_for", find_reference)
    monkeypatch.setattr(floor, "measure_floor", lambda _, __, dtype, **___: FLOORS[dtype])
    monkeypatch.setattr(parity, "validate", validate)
    monkeypatch.setattr(report_module, "write_report", write_report)
    monkeypatch.setattr(report_module, "content_sha256", lambda _: "5" * 64)
    return entries


def request(tiny_dir: Path, out: Path, *names: str, **options: Any) -> ExportRequest:
    return ExportRequest(str(tiny_dir), out, names or ("ort-cpu",), **options)


def names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_every_target_has_gates() -> None:
    assert targets.TARGETS.keys() <= gates.GATES.keys()


def test_the_plan_names_sizes_and_files_and_writes_nothing(tiny_dir: Path, tmp_path: Path) -> None:
    made = make_plan(request(tiny_dir, tmp_path / "a" / "release", "onnx", "ort-cpu"))
    nbytes = sum((tiny_dir / name).stat().st_size for name in CHECKPOINT_FILES)
    assert list(made.checkpoint_files) == CHECKPOINT_FILES
    assert made.checkpoint_bytes == nbytes
    assert 2 * nbytes < made.copied_bytes < 2 * nbytes + (100 << 20)
    assert made.folders == {t: tmp_path / "a" / "release" / t for t in ("onnx", "ort-cpu")}
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_document: Any
) -> None:
    args = ["--target", "ort-cpu", "--model", str(tiny_dir), "--output", str(tmp_path / "release"), "--dry-run"]
    assert cli.main(args) == 0
    assert "weights/model-00000-of-00002.safetensors  4.0 MB" in capsys.readouterr().out
    assert cli.main([*args, "--json"]) == 0
    shown = read_document("plan", capsys.readouterr().out)
    assert shown["artifacts"] == {"ort-cpu": str(tmp_path / "release")}
    assert shown["checkpoint_files"]["config.json"] == (tiny_dir / "config.json").stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small(tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 1000))
    monkeypatch.setattr(plan, "can_reflink", lambda *_: False)
    with pytest.raises(DiskSpaceError, match=r"1\.0 kB are free"):
        make_plan(request(tiny_dir, tmp_path / "release"))
    nbytes = sum((tiny_dir / name).stat().st_size for name in CHECKPOINT_FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, (36 << 20) + nbytes // 2))
    monkeypatch.setattr(plan, "can_reflink", lambda *_: True)
    make_plan(request(tiny_dir, tmp_path / "release", parity="off"))


def test_hardlinks_need_next_to_no_space(tiny_dir: Path, tmp_path: Path) -> None:
    copied = make_plan(request(tiny_dir, tmp_path / "r")).copied_bytes
    linked = make_plan(request(tiny_dir, tmp_path / "r", weights=WeightsMode.HARDLINK)).copied_bytes
    assert copied - linked == sum((tiny_dir / name).stat().st_size for name in CHECKPOINT_FILES)


def test_a_target_that_writes_weights_of_its_own_needs_their_space(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_plan(request(tiny_dir, tmp_path / "r", weights=WeightsMode.HARDLINK))
    targets.TARGETS["ort-cpu"].own = 123_456_789  # type: ignore[attr-defined]
    made = make_plan(request(tiny_dir, tmp_path / "r", weights=WeightsMode.HARDLINK))
    assert made.copied_bytes - before.copied_bytes == 123_456_789
    assert "build ort-cpu, with 123.5 MB of weights in a form of its own, and load it" in made.steps
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 30, 1, 100_000_000))
    with pytest.raises(DiskSpaceError, match="are needed"):
        make_plan(request(tiny_dir, tmp_path / "r", weights=WeightsMode.HARDLINK))


def test_the_plan_of_the_int8_target(tiny_dir: Path, tmp_path: Path) -> None:
    plain, int8 = (make_plan(request(tiny_dir, tmp_path / "r", name)) for name in ("ort-cpu", "ort-cpu-int8"))
    assert 650_000 < int8.copied_bytes - plain.copied_bytes < 700_000
    assert any("681.7 kB of weights in a form of its own" in step for step in int8.steps)


def test_kernels_are_bundled_when_asked(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    library = tmp_path / "installed.so"
    library.write_bytes(b"kernels" * 1000)
    with pytest.raises(TargetUnavailableError, match="no kernels"):
        make_plan(request(tiny_dir, tmp_path / "release", bundle_kernels=True))
    targets.TARGETS["ort-cpu"].library = library  # type: ignore[attr-defined]
    plain, made = (make_plan(request(tiny_dir, tmp_path / "r", bundle_kernels=b)) for b in (False, True))
    assert made.copied_bytes - plain.copied_bytes == 7000
    assert "build ort-cpu and load it; add its kernel library" in made.steps
    (result,) = export(request(tiny_dir, tmp_path / "release", bundle_kernels=True))
    assert result.manifest.notes == ("built by a test", "kernels: bundled")
    assert result.manifest.files["kernels.so"].nbytes == 7000
    with pytest.raises(TargetUnavailableError, match="onnx has no kernels"):
        export(request(tiny_dir, tmp_path / "both", "ort-cpu", "onnx", bundle_kernels=True))


def test_in_place_plans(tiny_dir: Path, tmp_path: Path) -> None:
    options = {"weights": WeightsMode.IN_PLACE}
    assert make_plan(request(tiny_dir, tiny_dir, **options)).weights_dir == "."
    assert make_plan(request(tiny_dir, tiny_dir.parent, **options)).weights_dir == tiny_dir.name
    with pytest.raises(WeightsModeError):
        make_plan(request(tiny_dir, tmp_path / "release", **options))
    with pytest.raises(WeightsModeError, match="one target"):
        make_plan(request(tiny_dir, tiny_dir, "onnx", "ort-cpu", **options))


def test_the_output_is_checked_first(tiny_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError):
        make_plan(request(tiny_dir, tmp_path))
    with pytest.raises(OutputExistsError, match="holds the checkpoint"):
        make_plan(request(tiny_dir, tiny_dir, force=True))


def test_an_unavailable_target_is_told_before_anything_else(tmp_path: Path, log: list[str]) -> None:
    targets.TARGETS["ort-cpu"].fail = TargetUnavailableError("no engine", "pip install engine")  # type: ignore[attr-defined]
    with pytest.raises(TargetUnavailableError):
        make_plan(ExportRequest(str(tmp_path / "nothing"), tmp_path / "out", ("ort-cpu",)))


def test_one_target_fills_the_folder(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    out = tmp_path / "release"
    (result,) = export(request(tiny_dir, out))
    side = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    ours = ["manifest.json", "model.onnx", "parity.json", "parity.md", "provenance.intoto.json", "sbom.cdx.json"]
    assert names(out) == sorted([*ours, *side, *(f"weights/{name}" for name in CHECKPOINT_FILES)])
    assert log == ["graph", "build ort-cpu", "reference", "open ort-cpu", "validate ort-cpu quick"]
    manifest = read_manifest(out)
    assert manifest == result.manifest
    assert manifest.parity.verdict == "pass"
    paths = {name: out / name for name in names(out) if name != MANIFEST_NAME}
    assert manifest.files == hash_files(paths)
    assert manifest.checkpoint == hash_files({name: tiny_dir / name for name in CHECKPOINT_FILES})
    assert open_checkpoint(out / manifest.weights_dir).config == manifest.model
    assert list(tmp_path.iterdir()) == [out]
    require_pass([result])


def test_several_targets_share_the_reference(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    results = export(request(tiny_dir, tmp_path / "release", "ort-cpu", "onnx", parity="full"))
    assert log.count("graph") == log.count("reference") == 1
    assert log[-4:] == ["open ort-cpu", "validate ort-cpu full", "open onnx", "validate onnx full"]
    assert [r.folder for r in results] == [tmp_path / "release" / name for name in ("ort-cpu", "onnx")]
    assert [read_manifest(r.folder).target for r in results] == ["ort-cpu", "onnx"]


def test_a_failed_verdict_is_delivered_and_refused(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    results = export(request(tiny_dir, tmp_path / "release", "onnx"))
    assert read_manifest(tmp_path / "release").parity.verdict == "fail"
    with pytest.raises(ParityFailedError, match="max_kl_mean in decode"):
        require_pass(results)


def test_seconds_are_those_of_the_target_even_where_another_run_took_them(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    took = {"graph": 1, "reference": 2, "build onnx": 10, "build ort-cpu": 20, "open onnx": 300, "open ort-cpu": 400}
    clock = SimpleNamespace(monotonic=lambda: float(sum(took.get(entry, 0) for entry in log)))
    for module in (pipeline, stopwatch):
        monkeypatch.setattr(module, "time", clock)
    measure, asked = parity.validate, request(tiny_dir, tmp_path / "release", "ort-cpu", "onnx")

    def cut_off(*given: Any, **options: Any) -> object:
        if "open onnx" in log:
            raise KeyboardInterrupt
        return measure(*given, **options)

    monkeypatch.setattr(parity, "validate", cut_off)
    with pytest.raises(KeyboardInterrupt):
        export(asked)
    monkeypatch.setattr(parity, "validate", measure)
    monkeypatch.setattr(report_module, "read_report", lambda _: SimpleNamespace(verdict=SimpleNamespace(passed=True)))
    log.clear()
    ort_cpu, onnx = export(asked)
    assert log == ["reference", "open onnx", "validate onnx quick"]
    assert (ort_cpu.seconds, onnx.seconds) == (20 + 400, 10 + 300)
    assert ort_cpu.run == onnx.run
    assert (onnx.run.total, onnx.run.reference, onnx.run.graph) == (302, 2, None)
    (alone,) = export(request(tiny_dir, tmp_path / "alone"))
    assert (alone.seconds, alone.run.graph, alone.run.reference, alone.run.total) == (420, 1, 2, 423)


def test_parity_off_still_loads_the_artifact(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    results = export(request(tiny_dir, tmp_path / "release", parity="off"))
    assert log == ["graph", "build ort-cpu", "open ort-cpu"]
    assert read_manifest(tmp_path / "release").parity.verdict == "not validated"
    assert not (tmp_path / "release" / "parity.json").exists()
    with pytest.raises(NotValidatedError):
        require_pass(results)


def test_validate_records_a_verdict_later(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    out = tmp_path / "release"
    export(request(tiny_dir, out, parity="off"))
    before = read_manifest(out)
    result = validate_artifact(out, "full")
    after = read_manifest(out)
    assert result.manifest == after
    assert (after.parity.verdict, after.parity.effort) == ("pass", "full")
    assert set(after.files) - set(before.files) == {"parity.json", "parity.md"}
    (out / "parity.json").write_text("a validation that was cut off")
    assert validate_artifact(out, "quick").manifest.parity.effort == "quick"


def test_validate_checks_every_byte_first(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    out = tmp_path / "release"
    export(request(tiny_dir, out))
    log.clear()
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        validate_artifact(out, "quick")
    assert log == []


def test_validate_needs_a_target_that_it_knows(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(request(tiny_dir, tmp_path / "release"))
    monkeypatch.setattr(targets, "TARGETS", {})
    with pytest.raises(ManifestError, match="'ort-cpu'"):
        validate_artifact(tmp_path / "release", "quick")


@pytest.mark.parametrize("mode", [WeightsMode.HARDLINK, WeightsMode.IN_PLACE])
def test_links_and_places(mode: WeightsMode, tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_dir, source)
    out = source if mode is WeightsMode.IN_PLACE else tmp_path / "release"
    export(request(source, out, weights=mode))
    manifest = read_manifest(out)
    assert manifest.weights_mode is mode
    weights = out / manifest.weights_dir
    assert all((weights / name).samefile(source / name) for name in CHECKPOINT_FILES)
    assert names(source)[:2] == ["config.json", "generation_config.json"]
    validate_artifact(out, "quick")


def test_in_place_in_a_folder_above(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_dir, source)
    before = names(source)
    export(request(source, tmp_path, weights=WeightsMode.IN_PLACE))
    assert names(source) == before
    assert read_manifest(tmp_path).weights_dir == "model"
    assert (tmp_path / "tokenizer.json").is_file()
    validate_artifact(tmp_path, "quick")


@pytest.mark.parametrize("stage", ["scales", "graph", "build", "open", "reference", "parity", "weights"])
def test_a_failure_anywhere_leaves_nothing(
    stage: str, tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise GraphError(stage, "stop")

    where: dict[str, tuple[object, str]] = {
        "scales": (open_module, "check_scales"),
        "graph": (build_module, "build_graph"),
        "build": (targets.TARGETS["ort-cpu"], "build"),
        "open": (targets.TARGETS["ort-cpu"], "open_runner"),
        "reference": (reference_cache, "reference_for"),
        "parity": (parity, "validate"),
        "weights": (shared_stages, "place_weights"),
    }
    module, name = where[stage]
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(GraphError):
        export(request(tiny_dir, tmp_path / "a" / "release"))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_copy_spares_the_graph(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DiskSpaceError("full", "stop")

    monkeypatch.setattr(shared_stages, "place_weights", full)
    monkeypatch.setattr(open_module, "check_scales", lambda _: time.sleep(0.2))
    with pytest.raises(DiskSpaceError):
        export(request(tiny_dir, tmp_path / "release"))
    assert log == []


def test_a_failed_graph_cancels_the_copy(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = []

    def slow(files: object, destinations: object, mode: object, progress: object, cancel: Any, _: object) -> None:
        cancelled.append(cancel.wait(20))

    def fail(_: object) -> None:
        raise InvalidScaleError("a scale of 255", "stop")

    monkeypatch.setattr(shared_stages, "place_weights", slow)
    monkeypatch.setattr(open_module, "check_scales", fail)
    with pytest.raises(InvalidScaleError):
        export(request(tiny_dir, tmp_path / "release"))
    assert cancelled == [True]


def test_a_checkpoint_that_is_swapped_meanwhile(
    tiny_dir: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def swap(folder: Path) -> Any:
        checkpoint = open_checkpoint(folder)
        opened.append(folder)
        if len(opened) == 1:
            return checkpoint
        return replace(checkpoint, config=replace(checkpoint.config, sliding_window=17))

    monkeypatch.setattr(open_module, "open_checkpoint", swap)
    with pytest.raises(IntegrityError, match="changed while it was exported"):
        export(request(tiny_dir, tmp_path / "release"))
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_of_the_hub_cache(tiny_dir: Path, tmp_path: Path, log: list[str]) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in CHECKPOINT_FILES:
        shutil.copy(tiny_dir / name, blobs / name.replace(".", "0"))
        (snapshot / name).symlink_to(os.path.relpath(blobs / name.replace(".", "0"), snapshot))
    out = tmp_path / "release"
    export(request(snapshot, out))
    assert not any(path.is_symlink() for path in out.rglob("*"))
    with pytest.raises(WeightsModeError, match="link"):
        make_plan(request(snapshot, snapshot, weights=WeightsMode.IN_PLACE))

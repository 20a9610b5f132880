"""Which exports are the same work, and may go on with what another run finished."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines import targets
from gptoss_export.engines.tensorrt import target
from gptoss_export.engines.tensorrt.flavor import Flavor
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter import pipeline
from gptoss_export.exporter.origin import ModelName
from gptoss_export.exporter.output import identity
from gptoss_export.exporter.output.identity import export_key, library_versions
from gptoss_export.exporter.planning.plan import make_plan
from gptoss_export.exporter.planning.request import ExportRequest, MeasureOptions
from gptoss_export.exporter.weights import WeightsMode
from gptoss_export.validators import gates


@pytest.fixture
def model(tiny_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_dir, tmp_path / "model"))


@pytest.fixture
def request_of(model: Path, tmp_path: Path) -> ExportRequest:
    return ExportRequest(str(model), tmp_path / "release", ("ort-cpu",))


def key(request: ExportRequest) -> str:
    return export_key(make_plan(request))


def test_the_same_work_has_the_same_key(request_of: ExportRequest, tmp_path: Path) -> None:
    first = key(request_of)
    assert len(first) == 64
    assert key(request_of) == first
    assert key(replace(request_of, force=True, ignore_preflight=True, output=tmp_path / "elsewhere")) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"targets": ("onnx",)},
        {"targets": ("onnx", "ort-cpu")},
        {"weights": WeightsMode.HARDLINK},
        {"parity": "full"},
        {"threads": 3},
        {"bundle_kernels": True},
        {"engine": EngineOptions(max_batch=3)},
        {"measure": MeasureOptions(overrides={"max_kl_mean": 1e-9})},
        {"measure": MeasureOptions(bisection=True)},
        {"called": ModelName("support-bot")},
        {"called": ModelName(labels={"team": "ml"})},
    ],
    ids=str,
)
def test_other_options_are_other_work(changes: dict[str, Any], request_of: ExportRequest) -> None:
    # Where no kernels were built, none can be bundled; the key asks nothing of them.
    plan = make_plan(request_of)
    assert export_key(plan) != export_key(replace(plan, request=replace(request_of, **changes)))


def touch(path: Path) -> None:
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def swap_for_a_copy(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def grow(path: Path) -> None:
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize("change", [touch, swap_for_a_copy, grow])
def test_another_source_is_other_work(change: Callable[[Path], None], model: Path, request_of: ExportRequest) -> None:
    before = key(request_of)
    change(model / "config.json")
    assert key(request_of) != before


def test_prompts_count_by_their_content(request_of: ExportRequest, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one")
    asked = replace(request_of, measure=MeasureOptions(prompts=prompts))
    first = key(asked)
    touch(prompts)
    assert key(asked) == first
    prompts.write_text("two")
    assert key(asked) != first


@pytest.mark.parametrize("name", ["SOURCE_DATE_EPOCH", "OMP_NUM_THREADS", "GPTOSS_EXPORT_ISA"])
def test_the_environment_counts(name: str, request_of: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(request_of)
    monkeypatch.delenv(name, raising=False)
    before = export_key(plan)
    monkeypatch.setenv(name, "1")
    assert export_key(plan) != before


def test_our_own_code_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Path] = []
    monkeypatch.setattr(identity, "_sha256", lambda paths: taken.extend(paths) or "")
    identity._own_code()
    for module in (pipeline, identity, targets, gates):
        assert Path(str(module.__file__)) in taken


def test_other_software_is_other_work(request_of: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(request_of)
    before = export_key(plan)
    monkeypatch.setattr(identity, "library_versions", lambda *of: library_versions(*of) | {"onnx": "0"})
    other = export_key(plan)
    monkeypatch.undo()
    monkeypatch.setattr(identity, "_own_code", lambda: "0" * 64)
    assert len({before, other, export_key(plan)}) == 3


OTHERS = {"tensorrt", "tensorrt-rtx-cu13", "triton", "cuda-bindings"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every package be installed in that version, both of TensorRT's included."""

    def pretend(version: str) -> None:
        monkeypatch.setattr(identity, "_version", lambda name: version if name in OTHERS else "1")
        monkeypatch.setattr(
            target, "find_flavor", lambda choice: Flavor("rtx" if choice == "rtx" else "tensorrt", "11")
        )

    return pretend


def test_each_target_lists_what_makes_it(installed: Callable[[str], None]) -> None:
    installed("2")
    rtx, function = EngineOptions(flavor="rtx"), EngineOptions(flavor="tensorrt", plugin=False)

    def others(*names: str, engine: EngineOptions = rtx) -> set[str]:
        found = library_versions(names, engine)
        assert set(targets.PACKAGES) <= found.keys()
        assert list(found) == sorted(found)
        return found.keys() & OTHERS

    for name in ("onnx", "ort-cpu", "ort-cpu-int8"):
        assert others(name) == set()
    for name in ("trt-fp16", "trt-bf16", "trt-fp32"):
        assert others(name) == {"tensorrt-rtx-cu13", "triton", "cuda-bindings"}
        assert others("onnx", name, engine=function) == {"tensorrt", "cuda-bindings"}


def test_the_key_covers_what_the_targets_need_and_no_more(
    installed: Callable[[str], None], request_of: ExportRequest
) -> None:
    plan = make_plan(request_of)
    both = replace(plan, request=replace(request_of, targets=("ort-cpu", "trt-fp16")))
    keys = []
    for version in ("1", "2"):
        installed(version)
        keys.append((export_key(plan), export_key(both)))
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]

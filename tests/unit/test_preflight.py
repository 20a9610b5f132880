"""What an export takes, from headers alone: figures near those that were measured, and refusals with figures."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines import memory
from gptoss_export.engines.memory import Room, machine_memory, oom_kills, out_of_memory, ran_out, rooms
from gptoss_export.engines.tensorrt import preflight as device_preflight
from gptoss_export.engines.tensorrt.options import EngineOptions
from gptoss_export.exporter import cli
from gptoss_export.exporter.checkpoint.config import parse_config
from gptoss_export.exporter.checkpoint.layouts import stored_tensors
from gptoss_export.exporter.checkpoint.synth import PRESETS, SynthShape, raw_config
from gptoss_export.exporter.checkpoint.tensors import Layout
from gptoss_export.exporter.commands.failure import error_of
from gptoss_export.exporter.errors import DiskSpaceError, OutOfMemoryError, PromptError
from gptoss_export.exporter.planning import preflight
from gptoss_export.exporter.planning.plan import Plan, make_plan
from gptoss_export.exporter.planning.request import ExportRequest, MeasureOptions
from gptoss_export.exporter.weights import WeightsMode

GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")
PLENTY = (Room("free memory", 1 << 42),)


def sparse(folder: Path, shape: SynthShape) -> Path:
    """A checkpoint of a released shape whose tensors are one hole: a header is all that it takes of the disk."""
    raw = raw_config(shape, Layout.HF_MXFP4)
    header, offset = {}, 0
    for tensor in stored_tensors(parse_config(raw), Layout.HF_MXFP4):
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + offset)
    return folder


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("released")
    shapes = PRESETS | {"two layers": replace(PRESETS["20b"], num_layers=2)}
    return {name: sparse(folder / name, shape) for name, shape in shapes.items()}


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has enough of everything."""
    monkeypatch.setattr(preflight, "rooms", lambda: PLENTY)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 1 << 50))


def planned(model: Path, out: Path, *targets: str, **options: Any) -> Plan:
    return make_plan(ExportRequest(str(model), out, targets or ("ort-cpu",), **options))


def stages(plan: Plan) -> dict[str, Any]:
    return {stage.stage: stage for stage in plan.preflight.stages}


def test_figures_of_20b_are_near_what_was_measured(released: dict[str, Path], tmp_path: Path, plenty: None) -> None:
    """Against benchmarks/RESULTS.md: never less memory, nor twice as much; times within a factor 2."""
    quick = stages(planned(released["20b"], tmp_path / "o", "ort-cpu", "onnx"))
    full = stages(planned(released["20b"], tmp_path / "o", parity="full"))
    assert 0.50 * GIB < quick["weights and graph"].memory < 1.0 * GIB
    assert 1.59 * GIB < quick["reference"].memory < 3.2 * GIB
    assert 2.44 * GIB < full["reference"].memory < 4.9 * GIB
    assert 42.5 / 2 < quick["weights and graph"].seconds / 2 < 42.5 * 2  # two targets
    assert 319 / 2 < quick["reference"].seconds < 319 * 2
    two = stages(planned(released["two layers"], tmp_path / "o", "ort-cpu", "onnx"))
    assert 681 / 2 < two["parity onnx"].seconds < 681 * 2
    assert 92 / 2 < two["parity ort-cpu"].seconds < 92 * 2


def test_figures_of_an_engine_of_20b(released: dict[str, Path], tmp_path: Path, plenty: None) -> None:
    pytest.importorskip("tensorrt_rtx")
    plan = planned(released["20b"], tmp_path / "o", "trt-fp16", weights=WeightsMode.HARDLINK, parity="off")
    made = stages(plan)
    assert list(made) == ["weights and graph", "build trt-fp16"]
    assert 6.51 * GIB < made["build trt-fp16"].memory < 10 * GIB
    assert 191 / 2 < plan.preflight.seconds < 191 * 2
    (disk,) = plan.preflight.disks
    assert 2.490e9 + 2.433e9 < disk.needed < 5.2e9
    assert disk.purposes == ("the artifacts",)


def test_a_larger_model_takes_more(released: dict[str, Path], tmp_path: Path, plenty: None) -> None:
    small, large = (planned(released[name], tmp_path / "o") for name in ("20b", "120b"))
    assert large.preflight.seconds > 2 * small.preflight.seconds
    assert large.copied_bytes > 60e9 > 14e9 > small.copied_bytes > 13.7e9


def test_nothing_of_the_tensors_is_read(released: dict[str, Path], tmp_path: Path, plenty: None) -> None:
    """120b is planned within two seconds of processor time, and 1 MB of its 65 GB is all that the file has."""
    assert (released["120b"] / "model.safetensors").stat().st_blocks * 512 < 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF)
    planned(released["120b"], tmp_path / "o")
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_a_disk_that_is_too_small(
    released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 10_000_000_000))
    with pytest.raises(
        DiskSpaceError, match=r"14\.\d GB are needed below .* for the artifacts.*10\.0 GB are free"
    ) as e:
        planned(released["20b"], tmp_path / "o")
    assert "--weights hardlink; --ignore-preflight" in e.value.next_step
    planned(released["20b"], tmp_path / "o", weights=WeightsMode.HARDLINK)
    ignored = planned(released["20b"], tmp_path / "o", ignore_preflight=True)
    assert [problem.exit_code for problem in ignored.preflight.problems] == [45]


def test_what_an_unfinished_run_left_need_not_be_written_again(
    released: dict[str, Path], tmp_path: Path, plenty: None
) -> None:
    before = planned(released["20b"], tmp_path / "o", parity="off").preflight.disks[0]
    kept = tmp_path / ".o.partial" / "tree" / "weights"
    kept.mkdir(parents=True)
    (kept / "model.safetensors").write_bytes(bytes(1 << 20))
    after = planned(released["20b"], tmp_path / "o", parity="off").preflight.disks[0]
    assert before.needed - after.needed == 1 << 20


def test_force_is_not_meant_for_it(
    released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "rooms", lambda: (Room("free memory", GIB),))
    with pytest.raises(OutOfMemoryError):
        planned(released["20b"], tmp_path / "o", force=True)


def test_the_references_states_count_where_they_will_lie(
    released: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "rooms", lambda: PLENTY)
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system")
    monkeypatch.setenv("GPTOSS_EXPORT_CACHE", str(shm / "no-such-cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 50, 0, 1 << 50))
    artifacts, states = planned(released["20b"], tmp_path / "o").preflight.disks
    assert (states.folder, states.purposes) == (shm, ("the reference's states",))
    assert 1e8 < states.needed < 1e9
    # Where the cache's disk is full, they become temporary files.
    small = {shm: Usage(1 << 50, 0, 1 << 20)}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: small.get(folder, Usage(1 << 50, 0, 1 << 50)))
    (both,) = planned(released["20b"], tmp_path / "o").preflight.disks
    assert both.purposes == ("the artifacts", "the reference's states")
    assert both.needed == artifacts.needed + states.needed


@pytest.mark.parametrize(("room", "stage"), [(GIB // 4, "weights and graph"), (int(1.5 * GIB), "reference")])
def test_too_little_memory(
    room: int, stage: str, released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "rooms", lambda: (*PLENTY, Room("the control group's memory limit", room)))
    with pytest.raises(OutOfMemoryError) as caught:
        planned(released["20b"], tmp_path / "o")
    assert caught.value.what.startswith(f"{stage} takes about ")
    assert "the control group's memory limit leaves" in caught.value.what
    assert caught.value.next_step.endswith("--ignore-preflight begins all the same")


def test_address_space_counts_what_is_mapped(
    released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "rooms", lambda: (Room("ulimit -v", 16 * GIB, address_space=True),))
    with pytest.raises(OutOfMemoryError, match=r"takes about 2\d\.\d GB of memory, and ulimit -v leaves 17\.2 GB"):
        planned(released["20b"], tmp_path / "o")


def test_embedded_weights_are_the_first_thing_to_change(
    released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(preflight, "rooms", lambda: (Room("free memory", 16 * GIB),))
    with pytest.raises(OutOfMemoryError, match="build trt-bf16 takes about 3") as caught:
        planned(released["20b"], tmp_path / "o", "trt-bf16", engine=EngineOptions("rtx", "embedded"))
    assert caught.value.next_step.startswith("use --engine-weights external; ")
    planned(released["20b"], tmp_path / "o", "trt-bf16", engine=EngineOptions("rtx"))


def test_a_gpu_that_is_too_small(
    released: dict[str, Path], tmp_path: Path, plenty: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(device_preflight, "device_room", lambda: ("Paper GPU", 12 * GIB))
    with pytest.raises(
        OutOfMemoryError, match=r"about 1[4-9]\.\d GB of device memory, and Paper GPU has 12\.9 GB free"
    ):
        planned(released["20b"], tmp_path / "o", "trt-fp16", engine=EngineOptions("rtx"))
    monkeypatch.setattr(device_preflight, "device_room", lambda: ("Paper GPU", 24 * GIB))
    plan = planned(released["20b"], tmp_path / "o", "trt-fp16", engine=EngineOptions("rtx"))
    assert plan.preflight.device is not None
    assert planned(released["20b"], tmp_path / "o").preflight.device is None


def test_prompts_that_no_reference_can_hold_are_told_first(tiny_dir: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"ids": [1, 99999]}))
    with pytest.raises(PromptError):
        planned(tiny_dir, tmp_path / "o", measure=MeasureOptions(prompts=prompts))
    prompts.write_text(json.dumps({"ids": [1] * 1000}))
    longer = stages(planned(tiny_dir, tmp_path / "o", measure=MeasureOptions(prompts=prompts)))
    assert longer["reference"].memory > stages(planned(tiny_dir, tmp_path / "o"))["reference"].memory + (50 << 20)


def test_dry_run_prints_figures_and_refusal(
    tiny_dir: Path,
    tmp_path: Path,
    plenty: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    read_document: Any,
) -> None:
    args = ["--target", "ort-cpu", "--model", str(tiny_dir), "--output", str(tmp_path / "release"), "--dry-run"]
    assert cli.main(args) == 0
    out = capsys.readouterr().out
    for line in ("disk: at most ", "stage: reference, about ", "memory: ", "time: about "):
        assert f"\n{line}" in out
    monkeypatch.setattr(preflight, "rooms", lambda: (Room("free memory", 1000),))
    assert cli.main([*args, "--json"]) == 61
    shown = capsys.readouterr()
    document = read_document("plan", shown.out)
    assert document["error"]["kind"] == "out-of-memory"
    found = document["preflight"]
    assert [stage["stage"] for stage in found["stages"]] == [
        "weights and graph",
        "build ort-cpu",
        "reference",
        "parity ort-cpu",
    ]
    assert found["memory"] == [{"limit": "free memory", "free_bytes": 1000}]
    assert len(found["problems"]) == 4
    assert shown.err.startswith("error: weights and graph takes about ")
    assert cli.main([*args, "--ignore-preflight"]) == 0
    assert list(tmp_path.iterdir()) == []


# Limits, as the kernel tells them


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A /proc and a /sys/fs/cgroup."""

    def make(cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
        proc, groups = tmp_path / "proc", tmp_path / "groups"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal:  16000000 kB\nMemAvailable:   8000000 kB\nSwapTotal:  1000000 kB\n")
        (proc / "self" / "status").write_text("VmSize:\t 1000000 kB\nVmData:\t  200000 kB\n")
        (proc / "self" / "cgroup").write_text(cgroup)
        for name, text in files.items():
            (groups / name).parent.mkdir(parents=True, exist_ok=True)
            (groups / name).write_text(text)
        return proc, groups

    return make


def test_limits_of_version_2(machine: Callable[..., tuple[Path, Path]]) -> None:
    """Every level counts, and cached files can be dropped."""
    where = machine(
        "0::/a/b\n",
        {
            "a/memory.max": "3000\n",
            "a/memory.current": "2500\n",
            "a/memory.stat": "anon 100\ninactive_file 400\n",
            "a/memory.events": "low 0\noom 2\noom_kill 1\n",
            "a/b/memory.max": "max\n",
            "a/b/memory.current": "70\n",
            "a/b/memory.events": "oom_kill 1\n",
        },
    )
    assert rooms(*where)[:2] == (Room("free memory", 8_192_000_000), Room("the control group's memory limit", 900))
    assert machine_memory(*where) == 3000
    assert oom_kills(*where) == 2


def test_limits_of_version_1_in_a_container(machine: Callable[..., tuple[Path, Path]]) -> None:
    """Its path is the host's, and the root that it sees is its own group."""
    where = machine(
        "5:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n0::/docker/1\n",
        {
            "memory/memory.limit_in_bytes": "5000\n",
            "memory/memory.usage_in_bytes": "6000\n",
            "memory/memory.stat": "total_inactive_file 10\n",
            "memory/memory.oom_control": "oom_kill_disable 0\noom_kill 4\n",
        },
    )
    assert rooms(*where)[1] == Room("the control group's memory limit", 0)
    assert oom_kills(*where) == 4


def test_no_limits(machine: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    where = machine("4:memory:/a/../../etc\n", {"memory/memory.limit_in_bytes": "9223372036854771712\n"})
    assert rooms(*where)[:1] == (Room("free memory", 8_192_000_000),)
    assert machine_memory(*where) == 17_000_000 * 1024
    assert machine_memory(tmp_path / "nothing", tmp_path / "nothing") is None
    assert oom_kills(tmp_path / "nothing", tmp_path / "nothing") == 0


def test_limits_of_the_process() -> None:
    code = "import resource; from gptoss_export.engines.memory import rooms; print(rooms())"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 35, 1 << 35)); {code}"
    done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True)
    assert '(ulimit -v)", nbytes=3' in done.stdout and "address_space=True" in done.stdout


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, os.strerror(12)),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        ValueError("Failed to allocate memory for requested buffer of size 1152921504606846976"),
    ],
    ids=lambda error: str(error)[:24],
)
def test_every_librarys_way_of_saying_it(error: Exception) -> None:
    assert ran_out(error)
    told = error_of(error)
    assert (told.kind, told.exit_code) == ("out-of-memory", OutOfMemoryError.exit_code)
    assert "this process had up to" in told.what and " now" in told.what


def test_other_errors_are_not_about_memory() -> None:
    assert not any(map(ran_out, (RuntimeError("a shape"), OSError(2, "no such file"), KeyboardInterrupt())))


def test_a_machine_that_says_nothing_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "rooms", lambda: ())
    assert out_of_memory().what.endswith("B")


def test_a_plan_is_still_a_plan_of_what_was_asked(tiny_dir: Path, tmp_path: Path) -> None:
    request = ExportRequest(str(tiny_dir), tmp_path / "o", ("ort-cpu",), ignore_preflight=True)
    assert make_plan(request).request == replace(request)

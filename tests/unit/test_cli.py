"""The command line: where options come from, what is printed where, and which exit code says what."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss_export.engines.tensorrt import flavor
from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.artifact import ParityRecord, Verdict
from gptoss_export.exporter.commands.failure import BUG, USAGE
from gptoss_export.exporter.errors import ConfigError, GptossExportError
from gptoss_export.exporter.pipeline import ExportRequest, ExportResult, MeasureOptions
from gptoss_export.exporter.stopwatch import RunSeconds
from gptoss_export.exporter.weights import WeightsMode
from gptoss_export.validators.verdict import Failure

FLAGS = {"FORCE": "1", "THREADS": "5", "JSON": "1", "QUIET": "1", "BUNDLE_KERNELS": "1"}
EXPORT = ["--target", "ort-cpu", "--model", "m", "--output", "out"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GPTOSS_EXPORT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[ExportRequest]:
    """Replaces the pipeline by one that only remembers what it was asked for."""
    seen: list[ExportRequest] = []

    def export(request: ExportRequest, progress: object) -> list[ExportResult]:
        seen.append(request)
        print("a library prints this")
        return [result("pass", Path("out"))]

    monkeypatch.setattr(pipeline, "export", export)
    return seen


def raising(error: BaseException) -> Callable[..., Any]:
    def export(*_: object) -> None:
        raise error

    return export


def python(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False, **options)


@pytest.mark.serial
def test_help_is_instant_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from gptoss_export.exporter.cli import main; code = main(['--help'])\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'rich', 'numpy', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = python(code)
        times.append(time.monotonic() - start)
        assert done.returncode == 0, done.stderr
        assert "gptoss-export --target ort-cpu --model ./gpt-oss-20b --output ./release" in done.stdout
    assert min(times) < 0.5


@pytest.mark.parametrize("command", ["targets", "inspect", "validate", "verify", "sign", "generate", "synth"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "Usage: gptoss-export" in capsys.readouterr().out


def test_module_runs_and_prints_versions() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptoss_export.exporter", "--version"], capture_output=True, text=True, check=True
    )
    assert re.match(r"gptoss-export \d+\.\d+\.\d+ \(torch ", done.stdout)


def test_command_line(requests: list[ExportRequest]) -> None:
    options = ["--target", "onnx", "--revision", "main", "--weights", "hardlink", "--parity", "full", "--force"]
    assert cli.main([*EXPORT, *options, "--threads", "2", "--bundle-kernels"]) == 0
    assert requests == [
        ExportRequest("m", Path("out"), ("ort-cpu", "onnx"), "main", WeightsMode.HARDLINK, "full", True, 2, True)
    ]


def test_defaults(requests: list[ExportRequest]) -> None:
    assert cli.main(EXPORT) == 0
    assert requests == [
        ExportRequest("m", Path("out"), ("ort-cpu",), None, WeightsMode.COPY, "quick", False, None, False)
    ]


def test_a_target_given_twice_is_built_once(requests: list[ExportRequest]) -> None:
    assert cli.main([*EXPORT, "--target", "ort-cpu"]) == 0
    assert requests[0].targets == ("ort-cpu",)


def test_file_environment_and_command_line(
    requests: list[ExportRequest], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "export.yaml"
    config.write_text(
        "target: [onnx, ort-cpu]\nmodel: file\noutput: file-out\n"
        "parity: full\nweights: hardlink\nforce: yes\nthreads: 3\nbundle-kernels: yes\n"
    )
    monkeypatch.setenv("GPTOSS_EXPORT_MODEL", "environment")
    monkeypatch.setenv("GPTOSS_EXPORT_PARITY", "quick")
    monkeypatch.setenv("GPTOSS_EXPORT_CONFIG", str(config))
    assert cli.main(["--model", "line"]) == 0
    assert cli.main([]) == 0
    line, environment = requests
    assert (line.model, environment.model) == ("line", "environment")
    assert line.targets == ("onnx", "ort-cpu")
    assert (line.output, line.weights, line.parity) == (Path("file-out"), WeightsMode.HARDLINK, "quick")
    assert (line.force, line.threads, line.bundle_kernels) == (True, 3, True)


def test_all_from_the_environment(requests: list[ExportRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"TARGET": "onnx ort-cpu", "MODEL": "m", "OUTPUT": "o", "WEIGHTS": "in-place", "PARITY": "off"}
    for name, value in (values | FLAGS).items():
        monkeypatch.setenv(f"GPTOSS_EXPORT_{name}", value)
    monkeypatch.setenv("GPTOSS_EXPORT_PARITY", "full")
    assert cli.main([]) == 0
    (request,) = requests
    assert request == ExportRequest(
        "m", Path("o"), ("onnx", "ort-cpu"), None, WeightsMode.IN_PLACE, "full", True, 5, True
    )


def test_yaml_off_is_the_word_and_not_false(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def make_plan(request: ExportRequest) -> None:
        seen.append(request.parity)
        raise ConfigError("stop", "here")

    monkeypatch.setattr(pipeline, "make_plan", make_plan)
    (tmp_path / "c.yaml").write_text("parity: off\ndry-run: true\n")
    assert cli.main(["--config", "c.yaml", *EXPORT]) == ConfigError.exit_code
    assert seen == ["off"]


def test_a_subcommand_has_its_own_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def validate(folder: Path, effort: str, *, options: MeasureOptions, **more: object) -> None:
        raise ConfigError(f"{folder} {effort} {more['threads']} {more['output']} {options}", "stop")

    monkeypatch.setattr(pipeline, "validate_artifact", validate)
    (tmp_path / "c.yaml").write_text(
        "model: m\noutput: o\n"
        "validate: {parity: full, threads: 2, prompts: p.txt, bisect: true, gate: [max-kl-mean=1e-9]}\n"
    )
    assert cli.main(["--config", "c.yaml", "validate", "out"]) == ConfigError.exit_code
    options = MeasureOptions(Path("p.txt"), {"max_kl_mean": 1e-9}, bisection=True)
    assert f"error: out full 2 None {options}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: x", "unknown option 'modle'"),
        ("model: a\nmodel: b", "given twice"),
        ("model: [a, b]", "one value"),
        ("model: {a: b}", "one value"),
        ("model:", "one value"),
        ("target: [[a]]", "a value or a list"),
        ("target: []", "a value or a list"),
        ("validate: {prity: full}", "unknown option 'prity'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("[a]: b", "unknown option"),
        ("- a", "expected a mapping"),
        ("model: 'open", "c.yaml"),
        ("a: &a [x]\nmodel: *a", "aliases"),
        ("[" * 5000, "c.yaml"),
        ("#" * 70_000, "more than 65536 bytes"),
        ("\x00", "c.yaml"),
        ("parity: sometimes", "is not one of"),
        ("threads: many", "not a valid integer"),
        ("force: perhaps", "not a valid boolean"),
    ],
)
def test_a_config_file_that_is_wrong(
    text: str, message: str, requests: list[ExportRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert cli.main([*EXPORT[:2], "--config", "c.yaml", "--output", "o"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert requests == []


def test_yaml_tags_make_no_objects(requests: list[ExportRequest], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: !!python/object/apply:os.system ['touch owned']\n")
    assert cli.main(["--config", "c.yaml", *EXPORT]) == 2
    assert not (tmp_path / "owned").exists()


def test_a_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "nothing.yaml", *EXPORT]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "m"], "missing --target, --output"),
        (["--target", "gguf", "--model", "m", "--output", "o"], "no target 'gguf'; there are onnx, ort-cpu"),
        ([*EXPORT, "--parity", "some"], "is not one of"),
        ([*EXPORT, "--threads", "0"], "not in the range"),
        ([*EXPORT, "--nonsense"], "No such option"),
        (["--model", "m", "validate", "out"], "--model is an option of the export"),
        (["nonsense"], "No such command"),
        (["generate", "out"], "either --prompt or --token-ids"),
        (["generate", "out", "--prompt", "a", "--token-ids", "1"], "either --prompt or --token-ids"),
    ],
)
def test_wrong_command_lines(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.split())
    assert captured.out == ""


def test_nothing_at_all_shows_the_help_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    captured = capsys.readouterr()
    assert "Examples:" in captured.err
    assert captured.out == ""


def test_an_error_is_two_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["--target", "ort-cpu", "--model", str(tmp_path), "--output", "out"]) == 12
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  next: ")
    assert captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("what", "step"), 10, "error: what"),
        (MemoryError(), 61, "memory"),
        (OSError(errno.ENOSPC, "full", "out/x"), 45, "out/x"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 47, "out: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 47, "Read-only"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 47, "a/b"),
        (RuntimeError("first\nsecond"), 1, "a bug in gptoss-export: RuntimeError: first"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "export", raising(error))
    assert cli.main(EXPORT) == code
    stderr = capfd.readouterr().err
    assert line in stderr
    assert "Traceback" not in stderr
    assert "second" not in stderr


@pytest.mark.parametrize("args", [["--debug", *EXPORT], [*EXPORT, "--debug"]])
def test_debug_shows_the_traceback(
    args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "export", raising(RuntimeError("boom")))
    assert cli.main(args) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debug_after_the_name_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", "nothing", "--debug"]) == 42
    assert "Traceback" in capsys.readouterr().err


def test_stdout_carries_only_results(requests: list[ExportRequest], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*EXPORT, "--json"]) == 0
    captured = capsys.readouterr()
    assert [found["folder"] for found in json.loads(captured.out)["results"]] == ["out"]
    assert "a library prints this" in captured.err


def test_sigterm_cleans_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "from gptoss_export.exporter import cli, pipeline; from gptoss_export.exporter.output.staging import staging\n"
        "def export(request, progress):\n"
        "    with staging(request.output) as folder:\n"
        "        (folder / 'half').touch(); os.kill(os.getpid(), int(sys.argv[1])); time.sleep(20)\n"
        "pipeline.export = export\n"
        "sys.exit(cli.main(['--target', 'onnx', '--model', 'm', '--output', 'out']))"
    )
    for number, exit_code, word in ((15, 143, "terminated"), (2, 130, "interrupted")):
        # Where the tests run in the background, Ctrl-C is ignored, and so it would be there.
        done = python(code, str(number), cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        assert done.returncode == exit_code, done.stderr
        assert word in done.stderr
        assert list(tmp_path.iterdir()) == []


def result(verdict: Verdict, folder: Path, loosened: tuple[str, ...] = ()) -> Any:
    failures = (Failure("decode", "max_kl_mean", measured=0.25, limit=1e-9),)
    report = SimpleNamespace(
        effort="quick",
        outcome=verdict,
        engine=SimpleNamespace(not_executed_reason="no NVIDIA driver"),
        loosened=loosened,
        bisection=None,
        verdict=SimpleNamespace(passed=verdict != "fail", failures=failures if verdict == "fail" else ()),
    )
    manifest = SimpleNamespace(
        target="ort-cpu",
        parity=ParityRecord("not validated")
        if verdict == "not validated"
        else ParityRecord(verdict, "quick", "0" * 64, loosened),
        files={},
        engine="e",
        provider="p",
        notes=(),
        content_sha256="0" * 64,
    )
    found: Any = (manifest, None if verdict == "not validated" else report)
    return ExportResult(folder, *found, 1.0, RunSeconds(2.5, None, 0.25, 0.5, 0.75))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failed_verdict_is_printed_and_exits_50(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "export", lambda *_: [result("pass", Path("a")), result("fail", Path("b"))])
    assert cli.main([*EXPORT, *(["--json"] if as_json else [])]) == 50
    captured = capsys.readouterr()
    if as_json:
        assert [r["verdict"] for r in json.loads(captured.out)["results"]] == ["pass", "fail"]
    else:
        assert "FAIL, gate max_kl_mean in decode" in captured.out
    assert "max_kl_mean" in captured.err


@pytest.mark.parametrize("verdict", ["pass", "fail", "not executed"])
def test_a_loosened_gate_is_in_the_verdict(
    verdict: Verdict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [result(verdict, Path("a"), ("max_kl_mean",)), result(verdict, Path("b"))]
    monkeypatch.setattr(pipeline, "export", lambda *_: found)
    cli.main([*EXPORT, "--allow-unexecuted"])
    loose, strict = capsys.readouterr().out.splitlines()
    assert "gates LOOSENED: max_kl_mean" in loose
    assert "LOOSENED" not in strict


def test_parity_off_is_no_failure_but_said_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "export", lambda *_: [result("not validated", Path("out"))])
    assert cli.main([*EXPORT, "--parity", "off", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert "NOT VALIDATED" in captured.err
    assert "gptoss-export validate out" in captured.err
    assert "NOT VALIDATED" in captured.out


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    code = "import sys; from gptoss_export.exporter import cli; sys.exit(cli.main(['targets']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_targets_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["targets"]
    assert [row["name"] for row in rows] == ["onnx", "ort-cpu", "ort-cpu-int8", "trt-fp16", "trt-bf16", "trt-fp32"]
    assert [row["missing"] for row in rows[:3]] == [None, None, None]


def test_targets_says_what_tensorrt_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flavor, "_is_installed", lambda package: False)
    assert cli.main(["targets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["targets"]
    assert [row["missing"] is None for row in rows] == [True, True, True, False, False, False]
    assert "neither TensorRT nor TensorRT for RTX is installed; pip install tensorrt-rtx-cu13" in rows[3]["missing"]


def test_an_engine_that_was_never_run_exits_52_unless_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "export", lambda *_: [result("not executed", Path("a"))])
    assert cli.main(EXPORT) == 52
    captured = capsys.readouterr()
    assert "ort-cpu: graph passes (quick), engine NOT EXECUTED (no NVIDIA driver), a" in captured.out
    assert "gptoss-export validate a` on a host with an NVIDIA GPU" in captured.err
    assert cli.main([*EXPORT, "--allow-unexecuted"]) == 0
    monkeypatch.setattr(pipeline, "export", lambda *_: [result("not executed", Path("a")), result("fail", Path("b"))])
    assert cli.main([*EXPORT, "--allow-unexecuted"]) == 50


def test_synth_writes_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "1", "--experts", "4", "--hidden-size", "64", "--intermediate-size", "64", "--heads", "4"]
    sizes += ["--kv-heads", "2", "--head-dim", "16", "--vocab-size", "128", "--top-k", "2", "--sliding-window", "8"]
    assert cli.main(["synth", "small", *sizes, "--layout", "original"]) == 0
    assert (tmp_path / "small" / "model.safetensors").is_file()
    assert "small: " in capsys.readouterr().out


def all_errors(error: type[GptossExportError] = GptossExportError) -> dict[str, tuple[int, str]]:
    own = "exit_code" in vars(error) and error is not GptossExportError
    found = {error.__name__: (error.exit_code, error.kind)} if own else {}
    for child in error.__subclasses__():
        found |= all_errors(child)
    return found


def test_exit_codes_are_documented() -> None:
    root = Path(__file__).parents[2]
    table = (root / "docs" / "exit-codes.md").read_text()
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `([a-z-]+)` \| (\S.*) \|$", table, re.MULTILINE)
    ours = {name: said for name, said in all_errors().items() if not name.startswith("_")}
    assert {name: (int(code), kind) for code, name, kind, _ in rows} == ours
    codes, kinds = zip(*ours.values(), strict=True)
    assert len(set(codes)) == len(set(kinds)) == len(ours)
    for code, kind in ((1, BUG), (2, USAGE)):
        assert f"| {code} | `{kind}` |" in table and kind not in kinds
    from gptoss_export.exporter import errors

    tree = dict(re.findall(r"\+-- (\w+) +(\d+)", errors.__doc__ or ""))
    assert {name: int(code) for name, code in tree.items()} == {name: code for name, (code, _) in ours.items()}

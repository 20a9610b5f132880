"""--json: one document on stdout whatever happens, as its schema has it, and in the same words everywhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.commands import documents, schemas
from gptoss_export.exporter.errors import ConfigError, OutOfMemoryError
from gptoss_export.exporter.pipeline import ExportResult
from gptoss_export.exporter.stopwatch import RunSeconds
from gptoss_export.validators.report import write_report

DOCS = Path(__file__).parents[2] / "docs"
EXPORT = ["--target", "ort-cpu", "--model", "./m", "--output", "out"]
SYNTH = ["synth", "small", "--layers", "1", "--experts", "4", "--hidden-size", "64", "--intermediate-size", "64"]
SYNTH += ["--heads", "4", "--kv-heads", "2", "--head-dim", "16", "--vocab-size", "128", "--top-k", "2"]
RUN = RunSeconds(2.5, None, 0.25, 0.5, 0.75)
Read = Callable[[str, str], dict[str, Any]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("GPTOSS_EXPORT_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def places(delivered: Any, samples: Any, tmp_path: Path) -> dict[str, str]:
    """A delivered artifact, and folders with reports, by what they are."""
    found = {"release": str(delivered.folder)}
    for kind in ("passing", "failing", "not_executed"):
        (tmp_path / kind).mkdir()
        write_report(getattr(samples, kind), tmp_path / kind)
        found[kind] = str(tmp_path / kind)
    return found


def exported(*results: ExportResult) -> Callable[..., list[ExportResult]]:
    return lambda *_, **__: list(results)


def result(of: Any, report: Any) -> ExportResult:
    """A delivered artifact as if this report were its own."""
    parity = replace(of.manifest.parity, verdict=report.outcome, loosened=report.loosened)
    return ExportResult(of.folder, replace(of.manifest, parity=parity), report, 1.25, RUN)


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema of an object in a schema."""
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    if isinstance(node, dict) and node.get("type") == "object":
        yield node
    for child in children:
        yield from objects(child)


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        where = f"{path} {name}".strip()
        if isinstance(command, click.Group):
            yield from commands(command, where)
        else:
            yield where, command


def test_the_schemas_are_made_of_the_documents() -> None:
    names = {path.name.removesuffix(".schema.json") for path in (DOCS / "schemas").iterdir()}
    assert names == schemas.DOCUMENTS.keys()
    for name in names:
        text = (DOCS / "schemas" / f"{name}.schema.json").read_text()
        assert text == schemas.schema_text(schemas.document_schema(name)), name
    shared = json.loads((DOCS / "bench.schema.json").read_text())["$defs"]
    assert {name: shared[name] for name in ("Error", "Failed")} == schemas.error_definitions()


def test_every_command_that_has_the_option_has_a_schema() -> None:
    with_json = {name for name, command in commands(cli.cli) if any(p.name == "as_json" for p in command.params)}
    assert {command for command, _ in schemas.DOCUMENTS.values()} - {"", "--dry-run"} == with_json - {"bench"}
    assert {name for name, _ in commands(cli.cli)} - with_json == {"generate"}


@pytest.mark.parametrize("path", [*(DOCS / "schemas").iterdir(), *DOCS.glob("*.schema.json")], ids=lambda p: p.name)
def test_a_schema_leaves_nothing_open_and_has_one_word_for_the_verdict(path: Path) -> None:
    schema = json.loads(path.read_text())
    assert all("additionalProperties" in found for found in objects(schema))
    assert all(found["additionalProperties"] is not True for found in objects(schema))
    properties = {name for found in objects(schema) for name in found.get("properties", ())}
    assert "outcome" not in path.read_text() and not properties & {"passed", "result", "status"}
    assert any("verdict" in found["properties"] for found in objects(schema) if "properties" in found) or not (
        properties & {"failures", "gates"}
    )


@pytest.mark.parametrize(
    ("name", "args", "code", "kind"),
    [
        ("targets", ["targets"], 0, None),
        ("inspect", ["inspect", "{release}"], 0, None),
        ("inspect", ["inspect", "nothing"], 42, "artifact-not-found"),
        ("verify", ["verify", "{release}"], 0, None),
        ("verify", ["verify", "nothing"], 42, "artifact-not-found"),
        ("verify", ["verify", "{release}", "--require-signature"], 2, "usage"),
        ("sign", ["sign", "{release}"], 2, "usage"),
        ("sign", ["sign", "nothing", "--keyless"], 42, "artifact-not-found"),
        ("report", ["report", "{passing}"], 0, None),
        ("report", ["report", "{failing}"], 50, "parity-failed"),
        ("report", ["report", "{not_executed}"], 52, "not-executed"),
        ("report", ["report", "{not_executed}", "--allow-unexecuted"], 0, None),
        ("report", ["report", "nothing"], 42, "artifact-not-found"),
        ("diff", ["diff", "{passing}", "{passing}"], 0, None),
        ("diff", ["diff", "{passing}", "{failing}"], 53, "regression"),
        ("diff", ["diff", "{passing}", "{not_executed}"], 54, "not-comparable"),
        ("validate", ["validate", "nothing"], 42, "artifact-not-found"),
        ("bench", ["bench", "nothing"], 42, "artifact-not-found"),
        ("polygraphy-export", ["polygraphy", "export", "nothing", "--output", "x"], 42, "artifact-not-found"),
        ("polygraphy-import", ["polygraphy", "import", "nothing", "x"], 42, "artifact-not-found"),
        ("synth", SYNTH, 0, None),
        ("synth", ["synth", "small", "--top-k", "99"], 10, "config"),
        ("export", EXPORT, 12, "checkpoint-not-found"),
        ("plan", [*EXPORT, "--dry-run"], 12, "checkpoint-not-found"),
    ],
)
def test_every_command_prints_one_document(
    name: str,
    args: list[str],
    code: int,
    kind: str | None,
    places: dict[str, str],
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    assert cli.main([*(arg.format(**places) for arg in args), "--json"]) == code
    captured = capsys.readouterr()
    found = read_document(name, captured.out)
    assert ("error" in found) == (code != 0)
    if kind is not None:
        error = found["error"]
        assert (error["kind"], error["exit_code"]) == (kind, code)
        if kind != "usage":
            assert f"error: {error['what']}\n  next: {error['next']}\n" in captured.err
        assert error["what"].isprintable() and error["next"]


def test_an_export_that_fails_is_one_document_with_its_failures(
    delivered: Any,
    samples: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    loosened = result(delivered, samples.loosened)
    monkeypatch.setattr(pipeline, "export", exported(loosened, result(delivered, samples.failing)))
    assert cli.main([*EXPORT, "--json"]) == 50
    found = read_document("export", capsys.readouterr().out)
    good, bad = found["results"]
    assert (good["verdict"], good["failures"]) == ("pass", [])
    assert good["loosened"] == ["max_logit_diff", "max_layer_error"]
    assert (bad["verdict"], bad["bisection"]["findings"][0]["layer"]) == ("fail", 1)
    assert bad["failures"] == [vars(failure) for failure in samples.failing.verdict.failures]
    first = bad["failures"][0]
    assert (first["where"], first["gate"], first["measured"]) == ("settled positions of decode", "max_logit_diff", 5.0)
    assert (bad["seconds"], found["run_seconds"]) == (1.25, vars(RUN))
    assert found["error"]["kind"] == "parity-failed"
    assert "max_logit_diff in settled positions of decode: measured 5" in found["error"]["what"]
    monkeypatch.setattr(pipeline, "validate_artifact", lambda *_, **__: result(delivered, samples.not_executed))
    assert cli.main(["validate", "out", "--json"]) == 52
    assert read_document("validate", capsys.readouterr().out)["error"]["kind"] == "not-executed"
    assert cli.main(["validate", "out", "--json", "--allow-unexecuted"]) == 0
    found = read_document("validate", capsys.readouterr().out)
    assert found["results"][0]["verdict"] == "not executed" and "error" not in found


@pytest.mark.parametrize(
    ("error", "kind", "code", "what"),
    [
        (ConfigError("what", "step"), "config", 10, "what"),
        (MemoryError(), "out-of-memory", OutOfMemoryError.exit_code, "memory"),
        (OSError(28, "full", "out/\udcff\x1b[31m"), "disk-space", 45, r"out/\udcff\x1b[31m"),
        (RuntimeError("first\nsecond"), "bug", 1, "a bug in gptoss-export: RuntimeError: first"),
    ],
)
def test_errors_of_all_sorts(
    error: Exception,
    kind: str,
    code: int,
    what: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    def export(*_: object) -> None:
        raise error

    monkeypatch.setattr(pipeline, "export", export)
    assert cli.main([*EXPORT, "--json"]) == code
    captured = capsys.readouterr()
    found = read_document("export", captured.out)["error"]
    assert (found["kind"], found["exit_code"]) == (kind, code)
    assert what in found["what"] and f"error: {found['what']}\n" in captured.err
    assert cli.main(EXPORT) == code
    assert capsys.readouterr().out == ""


def test_a_bug_after_the_result_is_in_the_document_of_the_result(
    delivered: Any,
    samples: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    def require_pass(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(pipeline, "export", exported(result(delivered, samples.passing)))
    monkeypatch.setattr(pipeline, "require_pass", require_pass)
    assert cli.main([*EXPORT, "--json"]) == 1
    found = read_document("export", capsys.readouterr().out)
    assert (found["results"][0]["verdict"], found["error"]["kind"]) == ("pass", "bug")


def test_a_document_that_cannot_be_written_is_an_error_and_one_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], read_document: Read
) -> None:
    monkeypatch.setattr(documents, "delivered", lambda _: {"figure": float("nan")})
    monkeypatch.setattr(pipeline, "export", exported())
    assert cli.main([*EXPORT, "--json"]) == 1
    assert read_document("export", capsys.readouterr().out)["error"]["kind"] == "bug"


LINES: list[tuple[str, list[str], str]] = [
    ("export", ["--json"], "missing --target, --model, --output"),
    ("export", ["--json", "--nonsense"], "No such option '--nonsense'"),
    ("export", [*EXPORT, "--threads", "0", "--json"], "not in the range"),
    ("export", [*EXPORT, "--config", "nothing.yaml", "--json"], "nothing.yaml"),
    ("export", ["--json", "--target", "gguf", "--model", "m", "--output", "o"], "no target 'gguf'"),
    ("export", ["nonsense", "--json"], "No such command 'nonsense'"),
    ("export", ["--json", "validate", "out"], "--json is an option of the export"),
    ("validate", ["validate", "--json"], "Missing argument 'OUT'"),
    ("validate", ["validate", "out", "--gate", "x=1", "--json"], "names no gate"),
    ("validate", ["validate", "out", "--json", "--nonsense"], "No such option"),
    ("export", ["generate", "out", "--json"], "No such option '--json'"),
]


@pytest.mark.parametrize(("name", "args", "what"), LINES, ids=lambda value: " ".join(value)[:40])
def test_a_wrong_command_line(
    name: str, args: list[str], what: str, capsys: pytest.CaptureFixture[str], read_document: Read
) -> None:
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    error = read_document(name, captured.out)["error"]
    assert (error["kind"], error["exit_code"]) == ("usage", 2)
    assert what in error["what"] and error["next"].startswith("see `gptoss-export ")
    assert what in " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["inspect", "nothing"], 42),
        (["inspect"], 2),
        (["inspect", "nothing", "--nonsense"], 2),
        (["nonsense"], 2),
        (["polygraphy"], 2),
        (["polygraphy", "nonsense"], 2),
        ([*EXPORT, "--threads", "0"], 2),
        ([], 2),
    ],
    ids=str,
)
def test_the_environment_asks_for_json_too(
    args: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    monkeypatch.setenv("GPTOSS_EXPORT_JSON", "1")
    assert cli.main(args) == code
    assert read_document("export", capsys.readouterr().out)["error"]["exit_code"] == code
    monkeypatch.setenv("GPTOSS_EXPORT_JSON", "0")
    assert cli.main(args) == code
    assert capsys.readouterr().out == ""


def test_what_has_no_json_prints_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GPTOSS_EXPORT_JSON", "1")
    for args, code in ((["generate", "out", "--prompt", "--json"], 42), (["generate", "out"], 2), (["--help"], 0)):
        assert cli.main(args) == code
        assert not capsys.readouterr().out.startswith("{")
    monkeypatch.setenv("GPTOSS_EXPORT_JSON", "perhaps")
    assert cli.main(["targets"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given", [["--config", "c.yaml"], []])
def test_a_config_file_asks_for_json_too(
    given: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    (tmp_path / "c.yaml").write_text("json: true\ninspect: {json: true}\n")
    if not given:
        monkeypatch.setenv("GPTOSS_EXPORT_CONFIG", "c.yaml")
    for args, code in (([*EXPORT, "--threads", "0"], 2), ([*EXPORT, "--parity", "some"], 2), (["--model", "m"], 2)):
        assert cli.main([*given, *args]) == code
        assert read_document("export", capsys.readouterr().out)["error"]["kind"] == "usage"
    for args, code in ((["inspect"], 2), (["inspect", "nothing"], 42)):
        assert cli.main([*given, *args]) == code
        assert read_document("inspect", capsys.readouterr().out)["error"]["exit_code"] == code
    assert cli.main([*given, "verify", "nothing"]) == 42  # whose section says nothing
    assert capsys.readouterr().out == ""
    (tmp_path / "c.yaml").write_text("inspect: {json: no}\n")
    monkeypatch.setenv("GPTOSS_EXPORT_JSON", "1")
    assert cli.main([*given, "inspect", "nothing"]) == 42
    assert read_document("inspect", capsys.readouterr().out), "the environment wins over the file"


def test_a_path_that_is_no_text(
    delivered: Any,
    samples: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_document: Read,
) -> None:
    found = replace(result(delivered, samples.passing), folder=Path(os.fsdecode(b"out\xff\n\xc3\xa9")))
    monkeypatch.setattr(pipeline, "export", exported(found))
    assert cli.main([*EXPORT, "--json"]) == 0
    out = capsys.readouterr().out
    assert read_document("export", out)["results"][0]["folder"] == "out\\xff\né"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_prints_no_document(number: signal.Signals, code: int) -> None:
    program = (
        "import os, sys, time\n"
        "from gptoss_export.exporter import cli, pipeline\n"
        "def export(request, progress):\n"
        "    os.kill(os.getpid(), int(sys.argv[1])); time.sleep(20)\n"
        "pipeline.export = export\n"
        "sys.exit(cli.main(['--target', 'onnx', '--model', 'm', '--output', 'out', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(int(number))],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout) == (code, "")


def test_a_reader_that_goes_away_gets_no_second_document() -> None:
    code = "import sys; from gptoss_export.exporter import cli; sys.exit(cli.main(['inspect', 'nothing', '--json']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_one_place_prints_json() -> None:
    """Whatever prints by itself could print a second document."""
    folder = Path(str(documents.__file__)).parent
    dumping = {path.name for path in (*folder.glob("*.py"), *folder.parent.glob("*.py")) if "dump" in path.read_text()}
    assert dumping == {"settings.py", "schemas.py", "artifact.py"}  # files of docs/, and manifest.json

"""Who refuses an artifact that is no clean pass: commands on every kind of artifact, exit codes and lines."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.engines import bench as measured
from gptoss_export.engines import generate as engine
from gptoss_export.exporter import cli, pipeline
from gptoss_export.exporter.artifact import MANIFEST_NAME, REPORT_NAMES, SIGNATURE_NAME, ParityRecord, read_manifest
from gptoss_export.exporter.errors import (
    DiskSpaceError,
    LoosenedGatesError,
    NotExecutedError,
    NotValidatedError,
    OutputExistsError,
    ParityError,
    ParityFailedError,
)
from gptoss_export.exporter.output import report_place
from gptoss_export.exporter.output.report_place import write_elsewhere
from gptoss_export.exporter.output.staging import in_use
from gptoss_export.exporter.trust.policy import DOUBTS, OPTIONS, doubts, in_words, require_pass
from gptoss_export.validators.gates import GATES
from gptoss_export.validators.report import ParityReport, read_report
from gptoss_export.validators.report.again import judged_again
from gptoss_export.validators.report.schema import Binding

FAILED = "ort-cpu is not the model: gate max_logit_diff in settled positions of decode: measured 5, limit "


@dataclass(frozen=True)
class Kind:
    """A kind of artifact: the sample that is its report, and what is said of it. code: 0 for a clean pass."""

    sample: str | None
    code: int
    error: str
    warning: str
    allow: tuple[str, ...]


KINDS = {
    "passing": Kind("passing", 0, "", "", ()),
    "failing": Kind("failing", 50, FAILED, "FAILED parity, it is not the model", ("--allow-failed",)),
    "unvalidated": Kind(
        None, 51, "was never validated", "NOT VALIDATED, nothing was compared with the model", ("--allow-unvalidated",)
    ),
    "unexecuted": Kind(
        "not_executed",
        52,
        "was built and never executed; its graph keeps the gates",
        "NOT EXECUTED, only the graph of its engine was compared with the model",
        ("--allow-unexecuted",),
    ),
    "loosened": Kind(
        "loosened",
        57,
        "ort-cpu was judged by gates looser than its own: max_logit_diff, max_layer_error",
        "gates LOOSENED: max_logit_diff, max_layer_error",
        ("--allow-loosened",),
    ),
}
OFFERED_BY_VERIFY = ("--allow-unexecuted", "--allow-loosened")


def of_ort_cpu(report: ParityReport) -> ParityReport:
    """The report as one of an ort-cpu artifact, whose gates follow from no noise floor."""
    if report.policy.floor_dtype is None:
        return replace(report, target="ort-cpu")
    policy = GATES["ort-cpu"]
    plain = replace(report, target="ort-cpu", policy=policy, floors=(), table_gates=policy.absolute)
    return judged_again(plain, {})


@pytest.fixture
def artifact(samples: Any, delivered_with: Any) -> Callable[[str], Path]:
    """A finished artifact of that kind. Without an engine, whatever its report says of one."""

    def make(name: str) -> Path:
        sample = KINDS[name].sample
        report = None if sample is None else of_ort_cpu(getattr(samples, sample))
        return Path(delivered_with(name, report).folder)

    return make


@pytest.fixture
def private_key(tmp_path: Path) -> Path:
    pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path / "key.pem"
    path.write_bytes(ec.generate_private_key(ec.SECP256R1()).private_bytes(*form))
    return path


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def error_lines(err: str) -> tuple[str, str]:
    """The error and its next step, which are all that stderr holds."""
    first, second = err.splitlines()
    assert first.startswith("error: ") and second.startswith("  next: ")
    return first.removeprefix("error: "), second.removeprefix("  next: ")


def record(verdict: Any, loosened: bool = False) -> ParityRecord:
    gates = ("max_kl_mean",) if loosened else ()
    return ParityRecord("not validated") if verdict == "not validated" else ParityRecord(verdict, "quick", "0", gates)


@pytest.mark.parametrize("name", KINDS)
def test_verify_warns_and_require_pass_refuses(
    name: str, artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder = KINDS[name], artifact(name)
    before = content(folder)
    assert cli.main(["-q", "verify", str(folder)]) == 0
    warned = capsys.readouterr()
    assert warned.err == (f"warning: {folder}: {kind.warning}\n" if kind.code else "")
    assert cli.main(["-q", "verify", str(folder), "--require-pass"]) == kind.code
    refused = capsys.readouterr()
    assert refused.out == warned.out, "the checks are shown either way"
    if kind.code:
        what, next_step = error_lines(refused.err)
        assert kind.error in what
        assert (f"accept it as it is with {kind.allow[0]}" in next_step) == (kind.allow[0] in OFFERED_BY_VERIFY)
    else:
        assert refused.err == ""
    accepted = kind.code if kind.allow and kind.allow[0] not in OFFERED_BY_VERIFY else 0
    assert cli.main(["-q", "verify", str(folder), "--require-pass", *OFFERED_BY_VERIFY]) == accepted
    assert content(folder) == before


@pytest.mark.parametrize("name", KINDS)
def test_verify_as_json_says_the_verdict_and_is_refused_all_the_same(
    name: str, artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str], read_document: Any
) -> None:
    kind, folder = KINDS[name], artifact(name)
    assert cli.main(["-q", "verify", str(folder), "--json", "--require-pass"]) == kind.code
    found = read_document("verify", capsys.readouterr().out)
    assert found.get("error", {"exit_code": 0})["exit_code"] == kind.code
    assert found["verdict"] == read_manifest(folder).parity.verdict
    assert found["loosened"] == (["max_logit_diff", "max_layer_error"] if name == "loosened" else [])


@pytest.mark.parametrize("name", KINDS)
def test_sign_refuses_what_did_not_pass_unless_its_verdict_is_named(
    name: str, artifact: Callable[[str], Path], private_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder = KINDS[name], artifact(name)
    sign = ["-q", "sign", str(folder), "--key", str(private_key)]
    before = content(folder)
    others = [option for option in OPTIONS.values() if option not in kind.allow]
    if kind.code:
        for given in ([], others):
            assert cli.main([*sign, *given]) == kind.code
            what, next_step = error_lines(capsys.readouterr().err)
            assert kind.error in what
            assert next_step.endswith(f", or accept it as it is with {kind.allow[0]}")
            assert content(folder) == before
    assert cli.main([*sign, *kind.allow]) == 0
    said = capsys.readouterr()
    assert f"verdict: {read_manifest(folder).parity.verdict}" in said.out
    assert ("gates LOOSENED: max_logit_diff" in said.out) == (name == "loosened")
    assert said.err == ""
    assert (folder / SIGNATURE_NAME).is_file()


def test_a_failure_by_loosened_gates_is_two_things_to_accept(
    samples: Any, delivered_with: Any, private_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The gates were loosened, and it failed another one."""
    report = judged_again(samples.failing, {"max_logit_diff": 6.0})
    assert report.outcome == "fail" and report.loosened == ("max_logit_diff",)
    folder = delivered_with("both", report).folder
    sign = ["-q", "sign", str(folder), "--key", str(private_key)]
    assert cli.main(sign) == 50
    assert capsys.readouterr().err.endswith("with --allow-failed --allow-loosened\n")
    assert cli.main([*sign, "--allow-failed"]) == 57
    assert cli.main([*sign, "--allow-loosened"]) == 50
    assert cli.main([*sign, "--allow-failed", "--allow-loosened"]) == 0
    capsys.readouterr()
    assert cli.main(["-q", "verify", str(folder)]) == 0
    words = "FAILED parity, it is not the model; gates LOOSENED: max_logit_diff"
    assert capsys.readouterr().err == f"warning: {folder}: {words}\n"
    assert cli.main(["-q", "verify", str(folder), "--require-pass"]) == 50
    assert "--allow" not in capsys.readouterr().err, "no option of verify accepts a failure"


def test_an_older_signature_outlives_a_refusal(artifact: Callable[[str], Path], private_key: Path) -> None:
    folder = artifact("failing")
    (folder / SIGNATURE_NAME).write_text("of before")
    assert cli.main(["-q", "sign", str(folder), "--key", str(private_key)]) == 50
    assert (folder / SIGNATURE_NAME).read_text() == "of before"


def test_signing_and_validating_exclude_each_other(
    artifact: Callable[[str], Path], private_key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = artifact("passing")
    with in_use(folder):
        assert cli.main(["-q", "sign", str(folder), "--key", str(private_key)]) == 48
    assert "is in use by process" in capsys.readouterr().err
    assert not (folder / SIGNATURE_NAME).exists()


@pytest.mark.parametrize("option", OFFERED_BY_VERIFY)
def test_an_acceptance_without_a_demand_is_a_wrong_command_line(
    option: str, artifact: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(artifact("passing")), option]) == 2
    assert f"{option} goes with --require-pass" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--allow-failed", "--allow-unvalidated"])
def test_what_a_deploy_cannot_accept(option: str, artifact: Callable[[str], Path]) -> None:
    assert cli.main(["verify", str(artifact("passing")), "--require-pass", option]) == 2


@pytest.mark.parametrize("name", KINDS)
def test_generate_and_bench_warn_in_one_line(
    name: str,
    artifact: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> Any:
        raise ParityError("reached", "stop")

    kind, folder = KINDS[name], artifact(name)
    monkeypatch.setattr(pipeline, "open_artifact", lambda folder, _: (read_manifest(folder), None))
    monkeypatch.setattr(engine, "generate", stop)
    monkeypatch.setattr(measured, "run_bench", stop)
    expected = f"warning: {folder}: {kind.warning}\n" if kind.code else ""
    for command in (["generate", str(folder), "--token-ids", "1"], ["bench", str(folder)]):
        assert cli.main(["-q", *command]) == 1
        captured = capsys.readouterr()
        assert captured.err == f"{expected}error: reached\n  next: stop\n"
        assert captured.out == ""


@pytest.fixture
def measures(monkeypatch: pytest.MonkeyPatch, samples: Any) -> list[ParityReport]:
    """Measuring takes no time, and gives a pass unless the list names another report; [] says that it never ran."""
    reports: list[ParityReport] = []

    def measure(folder: Path, manifest: Any, *_: object) -> ParityReport:
        files = {n: r.sha256 for n, r in manifest.files.items() if n in ("model.onnx",) or n.startswith("weights/")}
        checkpoint = {name: r.sha256 for name, r in manifest.checkpoint.items()}
        report = next(iter(reports), samples.passing)
        made = replace(report, binding=Binding(checkpoint, files, manifest.origin.model))
        reports.append(made)
        return made

    monkeypatch.setattr(pipeline, "make_yardstick", lambda *_: None)
    monkeypatch.setattr(pipeline, "measure", measure)
    return reports


def signed(folder: Path) -> Path:
    (folder / SIGNATURE_NAME).write_text("a signature")
    return folder


@pytest.mark.parametrize("link", [False, True], ids=["file", "dangling link"])
@pytest.mark.parametrize("name", KINDS)
def test_validate_refuses_a_signed_artifact_before_any_work(
    name: str,
    link: bool,
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = artifact(name)
    if link:
        (folder / SIGNATURE_NAME).symlink_to("nowhere")
    else:
        signed(folder)
    before = content(folder)
    monkeypatch.setattr(pipeline, "verify_files", lambda *_, **__: pytest.fail("a file was hashed"))
    assert cli.main(["-q", "validate", str(folder)]) == 49
    what, next_step = error_lines(capsys.readouterr().err)
    assert what.startswith(f"{folder} is signed")
    assert "--output REPORT_DIR" in next_step and "--drop-signature" in next_step
    assert content(folder) == before
    assert measures == []


@pytest.mark.parametrize("name", KINDS)
def test_validate_elsewhere_changes_nothing_in_a_signed_artifact(
    name: str,
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    read_document: Any,
) -> None:
    folder, output = signed(artifact(name)), tmp_path / "a" / "report"
    before = content(folder)
    assert cli.main(["-q", "validate", str(folder), "--output", str(output), "--json"]) == 0
    (result,) = read_document("validate", capsys.readouterr().out)["results"]
    assert (result["verdict"], result["report_folder"]) == ("pass", str(output))
    assert result["content_sha256"] == read_manifest(folder).content_sha256
    assert content(folder) == before
    assert sorted(path.name for path in output.iterdir()) == sorted(REPORT_NAMES)
    assert read_report(output) == measures[0]
    assert stat.S_IMODE(output.stat().st_mode) == stat.S_IMODE(output.parent.stat().st_mode)
    assert sorted(path.name for path in output.parent.iterdir()) == ["report"]


def test_the_exit_code_is_that_of_the_new_verdict(
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    samples: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, output = artifact("passing"), tmp_path / "report"
    measures.append(samples.failing)
    assert cli.main(["-q", "validate", str(folder), "--output", str(output)]) == 50
    captured = capsys.readouterr()
    assert f"report in {output}; the artifact was not changed" in captured.out
    what, next_step = error_lines(captured.err)
    assert what.startswith(FAILED)
    assert next_step == f"do not ship it; read {output / 'parity.md'} and attach it to a bug report"
    assert cli.main(["-q", "verify", str(folder), "--require-pass"]) == 0, "what lies in it is what it was"


def test_a_signature_is_given_up_on_purpose_and_only_for_a_new_verdict(
    artifact: Callable[[str], Path], measures: list[ParityReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = signed(artifact("failing"))
    kept = pipeline.measure

    def stop(*_: object) -> Any:
        assert (folder / SIGNATURE_NAME).exists()
        raise ParityFailedError("stopped", "stop")

    monkeypatch.setattr(pipeline, "measure", stop)
    before = content(folder)
    assert cli.main(["-q", "validate", str(folder), "--drop-signature"]) == 50
    assert content(folder) == before, "measuring came to nothing: the signature is still right"
    monkeypatch.setattr(pipeline, "measure", kept)
    recorded = pipeline.record

    def later(*given: Any) -> Any:
        assert not (folder / SIGNATURE_NAME).exists(), "gone before the first file that it signs is another"
        return recorded(*given)

    monkeypatch.setattr(pipeline, "record", later)
    assert cli.main(["-q", "validate", str(folder), "--drop-signature"]) == 0
    assert cli.main(["-q", "verify", str(folder), "--require-pass"]) == 0
    assert cli.main(["-q", "validate", str(folder), "--drop-signature"]) == 0, "without one there is nothing to drop"


def test_a_signature_that_comes_while_it_measures_stays_right(
    artifact: Callable[[str], Path], measures: list[ParityReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tools sign too, and know nothing of the lock."""
    folder = artifact("failing")
    measure = pipeline.measure
    monkeypatch.setattr(pipeline, "measure", lambda *given: measure(signed(folder), *given[1:]))
    before = content(folder)
    assert cli.main(["-q", "validate", str(folder)]) == 49
    after = content(folder)
    assert after.pop(SIGNATURE_NAME)[0] == b"a signature"
    assert after == before


def test_elsewhere_and_no_signature_contradict_each_other(artifact: Callable[[str], Path], tmp_path: Path) -> None:
    given = ["validate", str(artifact("passing")), "--drop-signature", "--output", str(tmp_path / "report")]
    assert cli.main(given) == 2


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize("way", [".", "sub", "sub/deeper", "weights", "link"])
def test_a_report_is_never_written_into_the_artifact(
    way: str,
    command: str,
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = artifact("passing")
    before = content(folder)
    (tmp_path / "link").symlink_to(folder / "weights")
    output = tmp_path / "link" / "report" if way == "link" else folder / way
    assert cli.main(["-q", command, str(folder), "--output", str(output)]) == OutputExistsError.exit_code
    assert f"{output} is in the artifact" in error_lines(capsys.readouterr().err)[0]
    assert measures == []
    assert content(folder) == before
    assert cli.main(["-q", "verify", str(folder)]) == 0, "no empty folder either"


@pytest.mark.parametrize("command", ["validate", "report"])
@pytest.mark.parametrize("there", [*REPORT_NAMES, MANIFEST_NAME])
def test_a_folder_with_a_report_or_an_artifact_is_left_alone(
    there: str, command: str, artifact: Callable[[str], Path], measures: list[ParityReport], tmp_path: Path
) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / there).symlink_to("nowhere")
    assert cli.main(["-q", command, str(artifact("passing")), "--output", str(output)]) == OutputExistsError.exit_code
    assert [path.name for path in output.iterdir()] == [there]
    assert measures == []


@pytest.mark.parametrize("command", ["validate", "report"])
def test_other_things_in_the_folder_stay(
    command: str, artifact: Callable[[str], Path], measures: list[ParityReport], tmp_path: Path
) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / "notes").write_text("theirs")
    assert cli.main(["-q", command, str(artifact("passing")), "--output", str(output)]) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted([*REPORT_NAMES, "notes"])
    assert (output / "notes").read_text() == "theirs"


@pytest.mark.parametrize("command", ["validate", "report"])
def test_a_file_is_no_folder(
    command: str,
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("theirs")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["-q", command, str(artifact("passing")), "--output", str(output)]) == 40
        assert error_lines(capsys.readouterr().err)[0] == f"{tmp_path / 'file'} is a file"
        shutil.rmtree(tmp_path / "passing")
    assert measures == []


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder of others"])
@pytest.mark.parametrize("name", REPORT_NAMES)
def test_nothing_half_is_left_of_a_report(
    name: str, there: bool, samples: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when this file takes its place."""
    output = tmp_path / "a" / "report"
    if there:
        output.mkdir(parents=True)
        (output / "notes").write_text("theirs")
    before = sorted(tmp_path.rglob("*"))
    real = Path.replace

    def replace_or_fail(self: Path, target: Path) -> Path:
        if target.name == name:
            raise OSError(28, "No space left on device", str(target))
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_fail)
    with pytest.raises(DiskSpaceError, match="the parity report"):
        write_elsewhere(samples.passing, output, tmp_path / "nowhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_comes_between_check_and_writing_stays(samples: Any, tmp_path: Path) -> None:
    output = tmp_path / "report"
    report_place.check_elsewhere(output, tmp_path / "nowhere")
    output.mkdir()
    (output / REPORT_NAMES[0]).write_text("another run's")
    with pytest.raises(OutputExistsError):
        write_elsewhere(samples.passing, output, tmp_path / "nowhere")
    assert (output / REPORT_NAMES[0]).read_text() == "another run's"


def test_validate_elsewhere_checks_the_records_too(
    artifact: Callable[[str], Path], measures: list[ParityReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay, unlike those that a validation in place writes anew."""
    folder = artifact("passing")
    (folder / "parity.md").write_text("everything is fine")
    assert cli.main(["-q", "validate", str(folder), "--output", str(tmp_path / "report")]) == 44
    assert "parity.md" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()
    assert cli.main(["-q", "validate", str(folder)]) == 0


def test_the_policy_takes_every_doubt_and_nothing_else() -> None:
    assert [doubts(record(v)) for v in ("pass", *DOUBTS[:3])] == [(), ("fail",), ("not validated",), ("not executed",)]
    assert doubts(record("pass", True)) == ("loosened",)
    assert doubts(record("fail", True)) == ("fail", "loosened")
    assert in_words(record("pass")) == ""
    assert OPTIONS.keys() == set(DOUBTS)


def test_an_acceptance_is_of_what_it_names(samples: Any) -> None:
    kinds = {
        "fail": ParityFailedError,
        "not validated": NotValidatedError,
        "not executed": NotExecutedError,
        "loosened": LoosenedGatesError,
    }
    subsets = [set(s) for s in chain.from_iterable(combinations(DOUBTS, n) for n in range(len(DOUBTS) + 1))]
    for verdict in ("pass", "fail", "not validated", "not executed"):
        for loosened in (False, True):
            parity = record(verdict, loosened)
            for accepted in subsets:
                left = [doubt for doubt in doubts(parity) if doubt not in accepted]
                if not left:
                    require_pass(Path("out"), "ort-cpu", parity, samples.failing, accepted=accepted)
                    continue
                with pytest.raises(kinds[left[0]]) as caught:
                    require_pass(Path("out"), "ort-cpu", parity, samples.failing, accepted=accepted, offered=DOUBTS)
                assert caught.value.next_step.endswith(f"with {' '.join(OPTIONS[doubt] for doubt in left)}")


def test_validate_names_what_it_cannot_write(
    artifact: Callable[[str], Path],
    measures: list[ParityReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A folder by its modes: as another user where this one is root."""
    folder, output = artifact("passing"), tmp_path / "report"
    root = os.geteuid() == 0
    for path in folder.parents if root else ():
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    before = content(folder)
    folder.chmod(0o555)
    monkeypatch.setattr(pipeline, "verify_files", lambda *_, **__: pytest.fail("a file was hashed"))
    if root:
        os.seteuid(65534)
    try:
        codes = [cli.main(["-q", "validate", str(folder)])]
        in_place = capsys.readouterr().err
        codes.append(cli.main(["-q", "validate", str(folder), "--output", str(folder.parent / "none")]))
        elsewhere = capsys.readouterr().err
    finally:
        if root:
            os.seteuid(0)
    assert codes[0] == 47
    what, next_step = error_lines(in_place)
    assert what == f"{folder} cannot be written: Permission denied"
    assert "--output REPORT_DIR" in next_step
    if root:
        assert codes[1] == 47, "the folder above it is root's"
        assert error_lines(elsewhere) == (
            f"{folder.parent} cannot be written: Permission denied",
            "choose another --output",
        )
    monkeypatch.undo()
    assert content(folder) == before
    assert not output.exists()

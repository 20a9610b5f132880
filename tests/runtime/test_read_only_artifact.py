"""A delivered artifact that is signed, read-only or both: measured again for real, and nothing in it changes.

Read-only by a bind mount in a mount namespace of the command's own, since modes do not bind root.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from gptoss_export.exporter.artifact import REPORT_NAMES, SIGNATURE_NAME, read_manifest
from gptoss_export.exporter.errors import OutOfMemoryError
from gptoss_export.exporter.output.journal import LOCK_NAME, REPLACED_NAME, is_ours
from gptoss_export.exporter.output.lock import lock_file
from gptoss_export.exporter.output.staging import home_of, journaled
from gptoss_export.validators.report import content_sha256, read_report

COMMAND = (sys.executable, "-m", "gptoss_export.exporter")
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'


def run(*args: object, read_only: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command, in a namespace in which a folder is read-only where one is named."""
    command = [*COMMAND, *map(str, args)]
    if read_only is not None:
        command = ["unshare", "-m", "sh", "-c", READ_ONLY, str(read_only), *command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The error of a command that did nothing before it: without --quiet, stderr would name what was done."""
    assert done.returncode == code, done.stderr
    error, next_step = done.stderr.splitlines()
    assert error.startswith("error: ") and next_step.startswith("  next: ")
    assert done.stdout == ""
    return done.stderr


@pytest.fixture(scope="module")
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("mount")
    try:
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", READ_ONLY, str(folder), "touch", str(folder / "file")],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("this machine has no unshare")
    if "Read-only file system" not in done.stderr:
        pytest.skip(f"this user cannot mount a folder read-only: {done.stderr.strip()}")


@pytest.fixture(scope="module")
def release(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("delivered") / "release"
    done = run("-q", "--target", "ort-cpu", "--model", tiny_dir, "--output", out)
    assert done.returncode == 0, done.stderr
    return out


def content(folder: Path) -> Mapping[str, tuple[bytes, int]]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


@pytest.mark.usefixtures("can_mount")
def test_a_read_only_artifact_is_refused_before_any_work_or_measured_elsewhere(release: Path, tmp_path: Path) -> None:
    before = content(release)
    error = refused(run("validate", release, read_only=release), 47)
    assert f"{release} cannot be written: Read-only file system" in error and "--output REPORT_DIR" in error
    output = tmp_path / "report"
    done = run("validate", release, "--output", output, "--json", read_only=release)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    assert (result["verdict"], result["report_folder"]) == ("pass", str(output))
    assert sorted(path.name for path in output.iterdir()) == sorted(REPORT_NAMES)
    report = read_report(output)
    assert report.binding.files == read_report(release).binding.files
    assert content_sha256(report) == result["report_sha256"]
    assert content(release) == before
    assert sorted(path.name for path in release.parent.iterdir()) == ["release"]
    done = run("-q", "verify", release, "--require-pass", read_only=release)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.usefixtures("can_mount")
def test_a_report_folder_that_cannot_be_written_is_refused_before_any_work(release: Path, tmp_path: Path) -> None:
    error = refused(run("validate", release, "--output", tmp_path / "a" / "report", read_only=tmp_path), 47)
    assert f"{tmp_path} cannot be written: Read-only file system" in error and "another --output" in error
    error = refused(run("validate", release, "--output", release / "report", read_only=release), 40)
    assert "is in the artifact" in error


@pytest.mark.usefixtures("can_mount")
def test_a_read_only_artifact_is_not_hashed_to_be_signed(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
    (tmp_path / "key.pem").touch()
    error = refused(run("sign", release, "--key", tmp_path / "key.pem", read_only=release), 47)
    assert f"{release} cannot be written: Read-only file system" in error


@pytest.mark.usefixtures("can_mount")
def test_what_an_export_left_beside_a_read_only_artifact_is_left(release: Path) -> None:
    """A kill after the exchange left the older artifact in the hidden folder; there is nothing to put back."""
    home = home_of(release)
    with pytest.raises(OutOfMemoryError), journaled(release, "key", force=True) as journal:
        journal.finish("a stage", {})
        raise OutOfMemoryError("cut off", "again")
    (home / REPLACED_NAME).mkdir()
    try:
        assert is_ours(home)
        done = run("inspect", release, read_only=release.parent)
        assert done.returncode == 0, done.stderr
        assert (home / REPLACED_NAME).is_dir()
    finally:
        shutil.rmtree(home)


@contextmanager
def lock_file_of(release: Path) -> Iterator[None]:
    """The lock of an export of `release` that is under way."""
    home = home_of(release)
    home.mkdir(mode=0o700)
    try:
        with lock_file(home / LOCK_NAME, "busy"):
            yield
    finally:
        shutil.rmtree(home)


@pytest.mark.usefixtures("can_mount")
def test_an_export_by_another_mount_is_noticed(release: Path, tmp_path: Path) -> None:
    with lock_file_of(release):
        error = refused(run("validate", release, "--output", tmp_path / "report", read_only=release.parent), 48)
    assert "is being written by process" in error


def test_a_signed_artifact_from_export_to_deploy(release: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "key.pem").write_bytes(key.private_bytes(*form))
    public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "key.pub").write_bytes(key.public_key().public_bytes(*public))
    deploy = ("-q", "verify", release, "--require-pass", "--require-signature", "--public-key", tmp_path / "key.pub")
    assert run(*deploy).returncode == 55
    assert run("-q", "sign", release, "--key", tmp_path / "key.pem").returncode == 0
    assert run(*deploy).returncode == 0

    before = content(release)
    assert f"{release} is signed" in refused(run("validate", release), 49)
    done = run("validate", release, "--output", tmp_path / "report", "--gate", "max-kl-mean=0")
    assert done.returncode == 50
    assert f"read {tmp_path / 'report' / 'parity.md'}" in done.stderr
    assert read_report(tmp_path / "report").outcome == "fail"
    assert content(release) == before
    assert run(*deploy).returncode == 0

    done = run("-q", "validate", release, "--drop-signature", "--gate", "max-kl-mean=1e-3")
    assert (done.returncode, done.stderr) == (0, "")
    assert not (release / SIGNATURE_NAME).exists()
    assert read_manifest(release).parity.loosened == ("max_kl_mean",)
    assert run("-q", "sign", release, "--key", tmp_path / "key.pem").returncode == 57
    assert run("-q", "sign", release, "--key", tmp_path / "key.pem", "--allow-loosened").returncode == 0
    assert run(*deploy).returncode == 57
    assert run(*deploy, "--allow-loosened").returncode == 0
    done = run("-q", "generate", release, "--token-ids", "1,2", "--max-new-tokens", "2")
    assert (done.returncode, done.stderr) == (0, f"warning: {release}: gates LOOSENED: max_kl_mean\n")

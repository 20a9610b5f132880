"""Signed artifacts: what was signed verifies, and nothing else does, each file in turn."""

from __future__ import annotations

import builtins
import json
import shutil
import socket
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from gptoss_export.exporter import cli
from gptoss_export.exporter.artifact import MANIFEST_NAME, RECORD_NAMES, SIGNATURE_NAME, read_manifest, write_manifest
from gptoss_export.exporter.errors import IntegrityError, ManifestError, SignatureError
from gptoss_export.exporter.measure import record
from gptoss_export.exporter.trust.attest import attest
from gptoss_export.exporter.trust.signing import (
    CertificateSigner,
    CertificateTrust,
    IdentityTrust,
    KeylessSigner,
    KeySigner,
    KeyTrust,
    check_signature,
    sign_artifact,
)
from gptoss_export.exporter.weights import hash_files

pytest.importorskip("model_signing", reason="the extra [sign] is not installed")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key pair for signing, another one, and a certificate of the first below a root of the second."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("keys")
    private = {}
    for name, curve in (("ours", ec.SECP256R1()), ("other", ec.SECP256R1()), ("koblitz", ec.SECP256K1())):
        key = private[name] = ec.generate_private_key(curve)
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / f"{name}.pub").write_bytes(public)

    def name_of(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    for file, subject, key, authority in (("root", "root", "other", True), ("leaf", "signer", "ours", False)):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name_of(subject))
            .issuer_name(name_of("root"))
            .public_key(private[key].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=2 if authority else 1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(
                x509.KeyUsage(not authority, False, False, False, False, authority, False, False, False), critical=True
            )
            .sign(private["other"], hashes.SHA256())
        )
        (folder / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return folder


@pytest.fixture
def signed(delivered: Any, keys: Path) -> Any:
    sign_artifact(delivered.folder, KeySigner(keys / "ours.pem"))
    return delivered


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def verify(folder: Path, keys: Path, key: str = "ours") -> int:
    return cli.main(["-q", "verify", str(folder), "--require-signature", "--public-key", str(keys / f"{key}.pub")])


def test_signed_by_the_command_and_verified(
    delivered: Any, keys: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, read_document: Any
) -> None:
    assert verify(delivered.folder, keys) == SignatureError.exit_code
    assert "is not signed" in capsys.readouterr().err
    before = delivered.manifest
    for _ in range(2):  # a second time replaces the first signature
        assert cli.main(["-q", "sign", str(delivered.folder), "--key", str(keys / "ours.pem")]) == 0
    assert "signs 15 files; verdict: pass" in capsys.readouterr().out
    assert read_manifest(delivered.folder) == before
    assert cli.main(["-q", "sign", str(delivered.folder), "--key", str(keys / "ours.pem"), "--json"]) == 0
    found = read_document("sign", capsys.readouterr().out)
    assert (found["signature"], found["files"]) == (str(delivered.folder / "model.sig"), 15)
    assert verify(delivered.folder, keys) == 0
    assert "signed by the key ours.pub" in capsys.readouterr().out
    moved = shutil.copytree(delivered.folder, tmp_path / "under another name")
    assert verify(moved, keys) == 0
    assert cli.main(["-q", "verify", str(delivered.folder)]) == 0
    assert "NOT CHECKED" in capsys.readouterr().out


def test_any_file_of_a_signed_artifact_with_one_bit_flipped_is_refused(
    signed: Any, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted(p.relative_to(signed.folder).as_posix() for p in signed.folder.rglob("*") if p.is_file())
    assert len(names) == 16
    codes = {MANIFEST_NAME: {ManifestError.exit_code, IntegrityError.exit_code}, SIGNATURE_NAME: {55}}
    for name in names:
        path = signed.folder / name
        for position in (1, path.stat().st_size // 2):
            flip(path, position)
            assert verify(signed.folder, keys) in codes.get(name, {IntegrityError.exit_code}), name
            said = capsys.readouterr().err
            assert {MANIFEST_NAME: "manifest", SIGNATURE_NAME: "signature"}.get(name, name) in said
            flip(path, position)
    assert verify(signed.folder, keys) == 0


def test_a_signature_says_what_the_hashes_of_a_forger_do_not(
    signed: Any, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every record is made again as an export makes it: only the signature is left to object."""
    model = signed.folder / "model.onnx"
    model.write_bytes(b"another graph")
    manifest = signed.manifest.with_records(hash_files({"model.onnx": model}))
    files = {name: entry.sha256 for name, entry in manifest.files.items() if name not in RECORD_NAMES}
    report = replace(signed.report, binding=replace(signed.report.binding, files=files))
    write_manifest(attest(record(report, manifest, signed.folder), report, signed.folder), signed.folder)
    assert cli.main(["-q", "verify", str(signed.folder)]) == 0
    assert verify(signed.folder, keys) == SignatureError.exit_code
    assert "model.onnx" in capsys.readouterr().err


def test_extra_and_missing_files_are_refused(signed: Any, keys: Path) -> None:
    extra = signed.folder / "extra"
    extra.touch()
    assert verify(signed.folder, keys) == IntegrityError.exit_code
    with pytest.raises(SignatureError, match="extra"):
        check_signature(signed.folder, signed.manifest, KeyTrust(keys / "ours.pub"))
    extra.unlink()
    (signed.folder / "model.onnx").unlink()
    assert verify(signed.folder, keys) == IntegrityError.exit_code
    with pytest.raises(SignatureError, match=r"model\.onnx"):
        check_signature(signed.folder, signed.manifest, KeyTrust(keys / "ours.pub"))


def test_a_signature_that_leaves_files_out_is_refused(delivered: Any, keys: Path) -> None:
    from model_signing import hashing, signing

    folder = delivered.folder
    for left_out in (MANIFEST_NAME, "weights"):
        ignoring = hashing.Config().set_ignored_paths(paths=[SIGNATURE_NAME, left_out])
        config = signing.Config().use_elliptic_key_signer(private_key=keys / "ours.pem").set_hashing_config(ignoring)
        config.sign(folder, folder / SIGNATURE_NAME)
        with pytest.raises(SignatureError, match=f"signed without '{left_out}"):
            check_signature(folder, delivered.manifest, KeyTrust(keys / "ours.pub"))


def test_the_wrong_key_is_refused(signed: Any, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(signed.folder, keys, "other") == SignatureError.exit_code
    assert "Key mismatch" in capsys.readouterr().err
    signature = signed.folder / SIGNATURE_NAME
    bundle = json.loads(signature.read_text())
    sign_artifact(signed.folder, KeySigner(keys / "other.pem"))
    other = json.loads(signature.read_text())
    bundle["verificationMaterial"] = other["verificationMaterial"]
    signature.write_text(json.dumps(bundle))
    for key in ("other", "ours", "koblitz"):
        assert verify(signed.folder, keys, key) == SignatureError.exit_code


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"\xff", b"{" * 100_000, b'{"verificationMaterial": {}}', b"x" * 100]
)
def test_what_is_no_signature_is_refused(content: bytes, delivered: Any, keys: Path) -> None:
    (delivered.folder / SIGNATURE_NAME).write_bytes(content)
    assert verify(delivered.folder, keys) == SignatureError.exit_code


def test_a_signature_that_is_no_plain_file_is_refused(signed: Any, keys: Path) -> None:
    path = signed.folder / SIGNATURE_NAME
    path.rename(signed.folder.parent / "kept")
    path.symlink_to(signed.folder.parent / "kept")
    with pytest.raises(SignatureError, match="link"):
        check_signature(signed.folder, signed.manifest, KeyTrust(keys / "ours.pub"))


def test_certificates(delivered: Any, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, leaf, root = str(delivered.folder), str(keys / "leaf.crt"), str(keys / "root.crt")
    assert cli.main(["-q", "sign", out, "--key", str(keys / "ours.pem"), "--certificate", leaf]) == 0
    assert cli.main(["-q", "verify", out, "--require-signature", "--certificate-chain", root]) == 0
    assert "signed by a certificate below root.crt" in capsys.readouterr().out
    assert cli.main(["-q", "verify", out, "--certificate-chain", leaf]) == SignatureError.exit_code
    assert verify(delivered.folder, keys) == SignatureError.exit_code  # one key, another way of signing
    wrong = CertificateSigner(keys / "other.pem", keys / "leaf.crt", (keys / "root.crt",))
    with pytest.raises(SignatureError, match="does not match"):
        sign_artifact(delivered.folder, wrong)
    assert cli.main(["-q", "verify", out, "--certificate-chain", root]) == 0  # the good signature is still there
    with pytest.raises(SignatureError):
        check_signature(delivered.folder, delivered.manifest, CertificateTrust((keys / "ours.pem",)))


@pytest.mark.parametrize("key", ["koblitz.pem", "ours.pub", "root.crt"])
def test_keys_that_cannot_sign(key: str, delivered: Any, keys: Path) -> None:
    with pytest.raises(SignatureError, match="cannot be signed"):
        sign_artifact(delivered.folder, KeySigner(keys / key))
    assert not list(delivered.folder.glob("*.sig*")) and not list(delivered.folder.glob(".*"))


def test_what_is_not_intact_is_not_signed(delivered: Any, keys: Path) -> None:
    (delivered.folder / "extra").touch()
    assert cli.main(["-q", "sign", str(delivered.folder), "--key", str(keys / "ours.pem")]) == IntegrityError.exit_code
    assert not (delivered.folder / SIGNATURE_NAME).exists()


def test_keyless_without_a_network_is_an_error_of_ours(
    signed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket.socket, "connect", unreachable)
    for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    with pytest.raises(SignatureError, match="cannot be signed"):
        sign_artifact(signed.folder, KeylessSigner())
    with pytest.raises(SignatureError, match="no signature of who is trusted"):
        check_signature(signed.folder, signed.manifest, IdentityTrust("ci@example.com", "https://accounts.example.com"))


def test_without_the_package_the_error_says_what_to_install(
    signed: Any, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("model_signing"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for call in (
        lambda: sign_artifact(signed.folder, KeySigner(keys / "ours.pem")),
        lambda: check_signature(signed.folder, signed.manifest, KeyTrust(keys / "ours.pub")),
    ):
        with pytest.raises(SignatureError, match="model-signing") as caught:
            call()
        assert "gptoss-export[sign]" in caught.value.next_step


@pytest.mark.parametrize(
    "args",
    [
        ["sign"],
        ["sign", "--key", "K", "--keyless"],
        ["sign", "--keyless", "--certificate", "K"],
        ["sign", "--key", "K", "--certificate-chain", "K"],
        ["sign", "--key", "missing"],
        ["verify", "--require-signature"],
        ["verify", "--identity", "me"],
        ["verify", "--issuer", "https://example.com"],
        ["verify", "--public-key", "K", "--certificate-chain", "K"],
    ],
    ids=" ".join,
)
def test_command_lines_that_do_not_add_up(args: list[str], delivered: Any, keys: Path) -> None:
    key = str(keys / "ours.pem")
    assert cli.main([args[0], str(delivered.folder), *(key if arg == "K" else arg for arg in args[1:])]) == 2

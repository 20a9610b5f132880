"""Signatures of whole artifacts, in the OpenSSF model signing format, by the `model-signing` package.

    sign_artifact(folder, KeySigner(Path("key.pem")))
    check_signature(folder, manifest, KeyTrust(Path("key.pub")))

model.sig is a Sigstore bundle around the sha256 of every file, the manifest's own included; it is the one file that
no manifest names. `model_signing verify` and `cosign` read it too.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.artifact import MANIFEST_NAME, SIGNATURE_NAME, Manifest
from gptoss_export.exporter.checkpoint.files import open_regular, shown
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import CheckpointError, GptossExportError, SignatureError
from gptoss_export.exporter.weights import hash_files

if TYPE_CHECKING:
    from model_signing import hashing

MAX_SIGNATURE_BYTES = 16 << 20
_OTHER_FILES = "Signature mismatch"  # what the package says of a genuine signature of other files
_NAMED = 8


@dataclass(frozen=True)
class KeySigner:
    """A private key, PEM, on P-256, P-384 or P-521, without a password."""

    key: Path


@dataclass(frozen=True)
class CertificateSigner:
    """A private key, its certificate, and those between it and the root; PEM."""

    key: Path
    certificate: Path
    chain: tuple[Path, ...] = ()


@dataclass(frozen=True)
class KeylessSigner:
    """Sigstore: the identity of the CI job, or of whoever logs in. Needs the network."""


@dataclass(frozen=True)
class KeyTrust:
    """Whoever has the private half of this key; PEM."""

    public_key: Path


@dataclass(frozen=True)
class CertificateTrust:
    """Whoever has a certificate below one of these; PEM. The package looks neither at expiry nor at revocation."""

    chain: tuple[Path, ...]


@dataclass(frozen=True)
class IdentityTrust:
    """Whoever Sigstore's authority knew as `identity` (a mail address, a workflow's URL) by `issuer`. Needs the
    network.
    """

    identity: str
    issuer: str


Signer = KeySigner | CertificateSigner | KeylessSigner
Trust = KeyTrust | CertificateTrust | IdentityTrust


def sign_artifact(folder: Path, signer: Signer) -> Path:
    """Signs a folder that was verified, and returns the signature's path; an older signature is replaced.

    Raises SignatureError for a key or certificate that cannot sign, or where Sigstore cannot be reached.
    """
    hashing_config = _hashing()
    from model_signing import signing

    path, partial = folder / SIGNATURE_NAME, folder / f".{SIGNATURE_NAME}.partial"
    config = signing.Config().set_hashing_config(hashing_config)
    try:
        match signer:
            case KeySigner(key):
                config.use_elliptic_key_signer(private_key=key)
            case CertificateSigner(key, certificate, chain):
                # Without any other the package reads an empty file and refuses it; the leaf once more does no harm.
                others = chain or (certificate,)
                config.use_certificate_signer(
                    private_key=key, signing_certificate=certificate, certificate_chain=others
                )
            case KeylessSigner():
                config.use_sigstore_signer(use_ambient_credentials=True, force_oob=True)
        config.sign(folder, partial)
        partial.replace(path)
    except Exception as error:
        # Keys are files of anybody, and the libraries below raise whatever their parsers do.
        raise _failed("cannot be signed", folder, error, "give a PEM key that fits, or check the network") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def check_signature(folder: Path, manifest: Manifest, trust: Trust) -> str:
    """Who signed the artifact, in a few words. The folder is read once more, since the signer hashes by itself.

    Raises SignatureError when there is no signature, when it is not of who is trusted, and when it is of other bytes
    than those of the folder or of fewer files than the manifest names.
    """
    data = _read(folder)
    hashing_config = _hashing()
    from model_signing import verifying

    config = verifying.Config().set_hashing_config(hashing_config)
    try:
        match trust:
            case KeyTrust(public_key):
                config.use_elliptic_key_verifier(public_key=public_key)
                who = f"the key {public_key.name}"
            case CertificateTrust(chain):
                config.use_certificate_verifier(certificate_chain=chain)
                who = f"a certificate below {', '.join(path.name for path in chain)}"
            case IdentityTrust(identity, issuer):
                config.use_sigstore_verifier(identity=identity, oidc_issuer=issuer)
                who = f"{identity}, known to {issuer}"
        config.verify(folder, folder / SIGNATURE_NAME)
    except Exception as error:
        # The signature is hostile until this call returns, and its parsers raise whatever they like.
        if str(error).startswith(_OTHER_FILES):
            _check_complete(folder, manifest, data)
        next_step = "do not use the artifact; get it and the key again from who made it"
        raise _failed("has no signature of who is trusted", folder, error, next_step) from error
    _check_complete(folder, manifest, data)
    return f"signed by {who}"


def _read(folder: Path) -> bytes:
    path = folder / SIGNATURE_NAME
    if not (path.exists() or path.is_symlink()):
        raise SignatureError(
            f"{folder} is not signed: it has no {SIGNATURE_NAME}", f"sign it: `gptoss-export sign {folder} --key FILE`"
        )
    try:
        with open_regular(path) as file:
            data = file.read(MAX_SIGNATURE_BYTES + 1)
    except CheckpointError as error:
        raise SignatureError(error.what, "get the signature again from who made it") from error
    if path.is_symlink() or len(data) > MAX_SIGNATURE_BYTES:
        raise SignatureError(f"{path} is a link, or too large", "get the signature again from who made it")
    return data


def _check_complete(folder: Path, manifest: Manifest, data: bytes) -> None:
    """Signers may leave files out; what was signed has to be all of the manifest's files and the manifest itself."""
    signed = _signed_files(data)
    own = hash_files({MANIFEST_NAME: folder / MANIFEST_NAME})
    expected = {name: record.sha256 for name, record in {**manifest.files, **own}.items()}
    if missing := sorted(expected.keys() - signed.keys()):
        raise SignatureError(
            f"{folder} is signed without {_some(missing)}",
            f"sign it with `gptoss-export sign {folder}`, which leaves nothing out",
        )
    if others := sorted(name for name in expected if signed[name] != expected[name]):
        raise SignatureError(
            f"{folder} is signed, and not with these bytes of {_some(others)}",
            "do not use the artifact; get it again from who made it",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(shown(name) for name in names[:_NAMED]) + more


def _signed_files(data: bytes) -> dict[str, str]:
    """The sha256 of every file that a bundle speaks of, which was found genuine before."""
    try:
        bundle = parse_json_object(data, SIGNATURE_NAME, SignatureError)
        payload = base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True)  # type: ignore[index]
        statement = parse_json_object(payload, SIGNATURE_NAME, SignatureError)
        resources = statement["predicate"]["resources"]  # type: ignore[index]
        return {entry["name"]: entry["digest"] for entry in resources if entry["algorithm"] == "sha256"}
    except (KeyError, TypeError, binascii.Error) as error:
        raise SignatureError(
            f"{SIGNATURE_NAME} is no signature of a model", "get the signature again from who made it"
        ) from error


def _hashing() -> hashing.Config:
    try:
        from model_signing import hashing
    except ImportError as error:
        raise SignatureError(
            "signatures need the package model-signing, which this Python has not",
            "pip install 'gptoss-export[sign]'",
        ) from error
    config = hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=False)
    return config.set_ignored_paths(paths=[SIGNATURE_NAME], ignore_git_paths=False)


def _failed(what: str, folder: Path, error: Exception, next_step: str) -> GptossExportError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return SignatureError(f"{folder} {what}: {reason}", next_step)

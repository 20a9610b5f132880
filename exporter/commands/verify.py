"""Commands about who an artifact is from: `verify` and `sign`. Neither runs anything of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gptoss_export.exporter.commands.artifact import ARTIFACT
from gptoss_export.exporter.commands.settings import Settings, common_options, json_option
from gptoss_export.exporter.trust.policy import DOUBTS, OPTIONS, Doubt

if TYPE_CHECKING:
    from gptoss_export.exporter.artifact import Manifest
    from gptoss_export.exporter.trust.signing import Signer, Trust
    from gptoss_export.exporter.trust.verify import Check

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_F = TypeVar("_F", bound=Callable[..., Any])
_VERIFY_ACCEPTS: tuple[Doubt, ...] = ("not executed", "loosened")
_SIGN_ACCEPTS = DOUBTS


def _allow(*names: Doubt, verb: str) -> Callable[[_F], _F]:
    """Adds an option for each doubt that a command accepts when it is named."""
    help_of: dict[Doubt, str] = {
        "fail": "that failed: it is not the model",
        "not validated": "that was compared with nothing",
        "not executed": "whose engine was never run",
        "loosened": "whose gates were loosened",
    }

    def add(command: _F) -> _F:
        for name in reversed(names):
            command = click.option(OPTIONS[name], is_flag=True, help=f"{verb} an artifact {help_of[name]}.")(command)
        return command

    return add


def _accepted(given: Mapping[str, bool]) -> tuple[Doubt, ...]:
    return tuple(doubt for doubt in DOUBTS if given.get(OPTIONS[doubt].removeprefix("--").replace("-", "_")))


@click.command("verify")
@ARTIFACT
@click.option("--require-pass", "pass_required", is_flag=True, help="Refuse an artifact that is no clean pass.")
@_allow(*_VERIFY_ACCEPTS, verb="Let --require-pass accept")
@click.option("--require-signature", is_flag=True, help="Refuse an artifact that is not signed by who is trusted.")
@click.option("--public-key", type=_FILE, metavar="FILE", help="Trust the signer with this key (PEM).")
@click.option(
    "--certificate-chain",
    "chain",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Trust signers with a certificate below this one (PEM); may be repeated.",
)
@click.option("--identity", metavar="WHO", help="Trust this identity, known to Sigstore (keyless).")
@click.option("--issuer", metavar="URL", help="Who has to have vouched for --identity.")
@json_option
@common_options
@click.pass_obj
def verify(
    settings: Settings,
    /,
    folder: Path,
    pass_required: bool,
    require_signature: bool,
    public_key: Path | None,
    chain: tuple[Path, ...],
    identity: str | None,
    issuer: str | None,
    **allow: bool,
) -> None:
    """Check that the artifact in OUT is complete, unchanged, and what its own papers say.

    Every sha256, no file beside the manifest's, and a report, provenance and bill of materials that speak of these
    bytes. Reads files and runs nothing; only --identity needs the network. Naming whom to trust checks the
    signature as well. Exits 44 when something is not as it was delivered, 55 without a signature of who is trusted.

    The verdict is shown, and a warning when it is no clean pass. With --require-pass that is refused: 50 for an
    artifact that failed, 51 for one that was not validated, 52 for an engine that was never run, 57 for loosened gates.

    \b
    Examples:
      gptoss-export verify ./release
      gptoss-export verify ./release --require-pass --require-signature --public-key release.pub
      gptoss-export verify ./release --identity ci@example.com --issuer https://accounts.example.com
    """
    from gptoss_export.exporter.commands.show import warn_unless_clean
    from gptoss_export.exporter.trust.policy import require_pass
    from gptoss_export.exporter.trust.signing import check_signature
    from gptoss_export.exporter.trust.verify import Check, verify_artifact

    accepted = _accepted(allow)
    if accepted and not pass_required:
        raise click.UsageError(f"{OPTIONS[accepted[0]]} goes with --require-pass")
    trust = _trust(public_key, chain, identity, issuer)
    if require_signature and trust is None:
        raise click.UsageError("--require-signature needs --public-key, --certificate-chain or --identity")
    with settings.working() as progress:
        result = verify_artifact(folder, progress)
        signed = _unchecked(folder) if trust is None else check_signature(folder, result.manifest, trust)
    checks = (*result.checks, Check("signature", signed))
    if settings.as_json:
        settings.document = _as_json(result.manifest, checks, trust is not None)
    else:
        for check in checks:
            click.echo(f"{check.name:<11} {check.found}")
    if pass_required:
        judged = folder, result.manifest.target, result.manifest.parity, result.report
        require_pass(*judged, accepted=accepted, offered=_VERIFY_ACCEPTS)
    else:
        warn_unless_clean(folder, result.manifest)


@click.command("sign")
@ARTIFACT
@click.option("--key", type=_FILE, metavar="FILE", help="Private key: PEM, P-256, P-384 or P-521, no password.")
@click.option("--certificate", type=_FILE, metavar="FILE", help="Certificate of --key (PEM).")
@click.option(
    "--certificate-chain",
    "chain",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Certificates between --certificate and the root (PEM); may be repeated.",
)
@click.option("--keyless", is_flag=True, help="Sign as the CI job or whoever logs in, by Sigstore; needs the network.")
@_allow(*_SIGN_ACCEPTS, verb="Sign")
@json_option
@common_options
@click.pass_obj
def sign(
    settings: Settings,
    /,
    folder: Path,
    key: Path | None,
    certificate: Path | None,
    chain: tuple[Path, ...],
    keyless: bool,
    **allow: bool,
) -> None:
    """Verify the artifact in OUT and sign all of it: writes model.sig into the folder.

    A signature says that somebody stands by these files, so that an artifact is refused whose verdict is no clean
    pass, with the exit codes of `verify --require-pass`, unless an option names that verdict.

    \b
    Examples:
      gptoss-export sign ./release --key release.pem
      gptoss-export sign ./release --key release.pem --certificate release.crt --certificate-chain ca.crt
      gptoss-export sign ./release --keyless
    """
    from gptoss_export.exporter.output.report_place import check_writable
    from gptoss_export.exporter.output.staging import in_use
    from gptoss_export.exporter.trust.policy import require_pass
    from gptoss_export.exporter.trust.signing import sign_artifact
    from gptoss_export.exporter.trust.verify import verify_artifact

    signer = _signer(key, certificate, chain, keyless)
    with settings.working() as progress, in_use(folder):
        if folder.is_dir():
            check_writable(folder, "copy the artifact to where it can be written, and sign it there")
        result = verify_artifact(folder, progress)
        parity = result.manifest.parity
        judged = folder, result.manifest.target, parity, result.report
        require_pass(*judged, accepted=_accepted(allow), offered=_SIGN_ACCEPTS)
        path = sign_artifact(folder, signer)
    manifest, files = result.manifest, len(result.manifest.files) + 1
    if settings.as_json:
        from gptoss_export.exporter.commands.documents import Signed, document

        said = (manifest.target, parity.verdict, parity.loosened, manifest.content_sha256)
        settings.document = document(Signed(path, *said, files))
        return
    loosened = f", gates LOOSENED: {', '.join(parity.loosened)}" if parity.loosened else ""
    click.echo(f"{path}: signs {files} files; verdict: {parity.verdict}{loosened}")


def _trust(public_key: Path | None, chain: tuple[Path, ...], identity: str | None, issuer: str | None) -> Trust | None:
    from gptoss_export.exporter.trust.signing import CertificateTrust, IdentityTrust, KeyTrust

    if (identity is None) != (issuer is None):
        raise click.UsageError("--identity and --issuer go together")
    ways: list[Trust] = []
    if public_key is not None:
        ways.append(KeyTrust(public_key))
    if chain:
        ways.append(CertificateTrust(chain))
    if identity is not None and issuer is not None:
        ways.append(IdentityTrust(identity, issuer))
    if len(ways) > 1:
        raise click.UsageError("a signature is checked in one way: key, certificate or identity")
    return ways[0] if ways else None


def _signer(key: Path | None, certificate: Path | None, chain: tuple[Path, ...], keyless: bool) -> Signer:
    from gptoss_export.exporter.trust.signing import CertificateSigner, KeylessSigner, KeySigner

    if keyless == (key is not None):
        raise click.UsageError("give either --key or --keyless")
    if (certificate is not None or chain) and key is None:
        raise click.UsageError("--certificate and --certificate-chain belong to --key")
    if chain and certificate is None:
        raise click.UsageError("--certificate-chain belongs to --certificate")
    if key is None:
        return KeylessSigner()
    return KeySigner(key) if certificate is None else CertificateSigner(key, certificate, chain)


def _unchecked(folder: Path) -> str:
    from gptoss_export.exporter.artifact import SIGNATURE_NAME

    if (folder / SIGNATURE_NAME).exists():
        return f"{SIGNATURE_NAME} NOT CHECKED; say whom to trust, as with --public-key"
    return "none; anybody who can write the folder could have made this artifact"


def _as_json(manifest: Manifest, checks: tuple[Check, ...], signature_checked: bool) -> dict[str, object]:
    from gptoss_export.exporter.commands.documents import Verified, document

    parity, files = manifest.parity, len(manifest.files)
    said = (manifest.target, parity.verdict, parity.effort, parity.loosened, manifest.content_sha256)
    return document(Verified(*said, files, signature_checked, checks))

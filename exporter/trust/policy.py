"""May this artifact go on as it is? One answer for all who ask: `verify --require-pass`, `sign`, the export itself.

    doubts(manifest.parity)      # () for a clean pass
    require_pass(folder, manifest.target, manifest.parity, report, accepted={"not executed"})

A pass by loosened gates is no clean one: whoever loosened them knows why, whoever deploys does not.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from gptoss_export.exporter.artifact import REPORT_NAMES, ParityRecord
from gptoss_export.exporter.errors import (
    LoosenedGatesError,
    NotExecutedError,
    NotValidatedError,
    ParityError,
    ParityFailedError,
)
from gptoss_export.exporter.measure import first_failure

if TYPE_CHECKING:
    from gptoss_export.validators.report import ParityReport

Doubt = Literal["fail", "not validated", "not executed", "loosened"]
DOUBTS: tuple[Doubt, ...] = get_args(Doubt)
OPTIONS: Mapping[Doubt, str] = {
    "fail": "--allow-failed",
    "not validated": "--allow-unvalidated",
    "not executed": "--allow-unexecuted",
    "loosened": "--allow-loosened",
}
"""What a command line calls the acceptance of each."""


def doubts(parity: ParityRecord) -> tuple[Doubt, ...]:
    """What keeps a verdict from being a clean pass, gravest first."""
    return tuple(doubt for doubt in DOUBTS if doubt == parity.verdict or (doubt == "loosened" and parity.loosened))


def in_words(parity: ParityRecord) -> str:
    """The doubts in one line; empty for a clean pass."""
    words: dict[Doubt, str] = {
        "fail": "FAILED parity, it is not the model",
        "not validated": "NOT VALIDATED, nothing was compared with the model",
        "not executed": "NOT EXECUTED, only the graph of its engine was compared with the model",
        "loosened": f"gates LOOSENED: {', '.join(parity.loosened)}",
    }
    return "; ".join(words[doubt] for doubt in doubts(parity))


def require_pass(
    folder: Path,
    target: str,
    parity: ParityRecord,
    report: ParityReport | None,
    *,
    accepted: Collection[Doubt] = (),
    offered: Collection[Doubt] = (),
    report_folder: Path | None = None,
) -> None:
    """Raises the error of the gravest doubt that is not accepted.

    report: of `parity`, None where nothing was validated. accepted: each doubt has to be named; a failure by loosened
    gates is two. offered: those that the command at hand has an option for, which the next step then names.
    report_folder: where the report is, if not in `folder`.

    Raises ParityFailedError naming the first gate that was not kept, NotValidatedError, NotExecutedError or
    LoosenedGatesError.
    """
    left = [doubt for doubt in doubts(parity) if doubt not in accepted]
    if not left:
        return
    options = " ".join(OPTIONS[doubt] for doubt in left)
    otherwise = f", or accept it as it is with {options}" if set(left) <= set(offered) else ""
    kind, what, next_step = _error(left[0], folder, target, parity, report, report_folder or folder)
    raise kind(what, f"{next_step}{otherwise}")


def _error(
    doubt: Doubt, folder: Path, target: str, parity: ParityRecord, report: ParityReport | None, report_folder: Path
) -> tuple[type[ParityError], str, str]:
    validate = f"run `gptoss-export validate {folder}`"
    match doubt:
        case "fail":
            assert report is not None
            return (
                ParityFailedError,
                f"{target} is not the model: {first_failure(report)}",
                f"do not ship it; read {report_folder / REPORT_NAMES[1]} and attach it to a bug report",
            )
        case "not validated":
            return NotValidatedError, f"{folder} was never validated", validate
        case "not executed":
            return (
                NotExecutedError,
                f"{target} was built and never executed; its graph keeps the gates",
                f"{validate} on a host with an NVIDIA GPU",
            )
        case "loosened":
            return (
                LoosenedGatesError,
                f"{target} was judged by gates looser than its own: {', '.join(parity.loosened)}",
                f"{validate} without --gate",
            )

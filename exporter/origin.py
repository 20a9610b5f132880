"""Where the checkpoint of an artifact came from, and what was asked for: what its manifest and its provenance say.

    origin = origin_of(request, "ort-cpu", checkpoint)
    origin.options["parity"]     # "quick"

Nothing here names a folder of the machine, so that two machines say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.exporter.plan import ExportRequest

Option = str | int | float | bool | None | tuple[str, ...]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_APACHE = re.compile(r"\s*Apache License\s+Version 2\.0, January 2004")
_MOST_OPTIONS, _LONGEST = 256, 4096


@dataclass(frozen=True)
class Origin:
    """Options and checkpoint of one artifact.

    repository, commit: of the Hub; both None for a folder, which only its hashes name. license: as the checkpoint
    itself has it, in its config.json or its LICENSE, None where it says nothing. options: by name, with whatever can
    change the artifact; those of a gate are named `gate.NAME`, those of an engine `engine.NAME`.
    """

    repository: str | None = None
    commit: str | None = None
    license: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


def origin_of(request: ExportRequest, target: str, checkpoint: Checkpoint) -> Origin:
    """What this request means for one of its targets; the others have no part in its artifact."""
    options: dict[str, Option] = {
        "target": target,
        "weights": request.weights.value,
        "parity": request.parity,
        "threads": request.threads,
        "bundle_kernels": request.bundle_kernels,
    }
    if target.startswith("trt-"):
        options |= {f"engine.{name}": value for name, value in asdict(request.engine).items()}
    if request.parity != "off":
        options |= {f"gate.{name}": float(limit) for name, limit in request.measure.overrides.items()}
        if request.measure.prompts is not None:
            options |= _prompts(request.measure.prompts)
    repository, commit = _hub(request, checkpoint.root)
    return Origin(repository, commit, _license(checkpoint), options)


def origin_from(raw: Mapping[str, object]) -> Origin:
    """The origin as `asdict` wrote it and JSON gave it back. Raises ValueError for anything else."""
    options = raw.get("options")
    if set(raw) != {"repository", "commit", "license", "options"} or not isinstance(options, dict):
        raise ValueError("it has other fields than an origin has")
    if len(options) > _MOST_OPTIONS:
        raise ValueError(f"{len(options)} options are too many")
    repository, commit = _text(raw, "repository", _REPOSITORY), _text(raw, "commit", _COMMIT)
    if (repository is None) != (commit is None):
        raise ValueError("a repository has a commit, and a folder has neither")
    return Origin(
        repository, commit, _text(raw, "license"), {name: _option(name, value) for name, value in options.items()}
    )


def _option(name: str, value: object) -> Option:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError("an option is a number, a text, a list of texts or nothing")
    texts = (name, *(value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()))
    if not all(text.isprintable() and len(text) <= _LONGEST for text in texts):
        raise ValueError("an option holds what no command line does")
    return value


def _text(raw: Mapping[str, object], name: str, form: re.Pattern[str] | None = None) -> str | None:
    value = raw[name]
    if value is None:
        return None
    if not isinstance(value, str) or not (form.fullmatch(value) if form else _is_license(value)):
        raise ValueError(f"{name} is none")
    return value


def _is_license(text: str) -> bool:
    return text.isprintable() and text.isascii() and 0 < len(text) <= 64 and text == text.strip()


def _hub(request: ExportRequest, root: Path) -> tuple[str | None, str | None]:
    """Repository and commit of a snapshot in the Hub's cache, where `snapshots/COMMIT` ends its path."""
    if Path(request.model).expanduser().is_dir() or not _REPOSITORY.fullmatch(request.model):
        return None, None
    for folder in (root, root.parent):  # the parent: of original/, which lies in the snapshot
        if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
            return request.model, folder.name
    return None, None


def _license(checkpoint: Checkpoint) -> str | None:
    from gptoss_export.exporter.checkpoint.files import open_regular

    said = checkpoint.raw_config.get("license")
    if isinstance(said, str) and _is_license(said):
        return "Apache-2.0" if said.lower() == "apache-2.0" else said
    path = checkpoint.root / "LICENSE"
    if not path.is_file():
        return None
    with open_regular(path) as file:
        head = file.read(_LONGEST).decode("utf-8", errors="replace")
    return "Apache-2.0" if _APACHE.match(head) else None


def _prompts(path: Path) -> dict[str, Option]:
    from gptoss_export.exporter.weights import hash_files

    return {"prompts": path.name, "prompts_sha256": hash_files({"prompts": path})["prompts"].sha256}

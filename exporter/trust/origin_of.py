"""The origin of an artifact, from what was asked for and from the checkpoint that was found."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_export.exporter.origin import COMMIT, LONGEST, REPOSITORY, ModelName, Option, Origin, is_license

if TYPE_CHECKING:
    from gptoss_export.exporter.checkpoint.tensors import Checkpoint
    from gptoss_export.exporter.planning.request import ExportRequest

_APACHE = re.compile(r"\s*Apache License\s+Version 2\.0, January 2004")


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
    return Origin(_on_hub(request.called, checkpoint.root), _license(checkpoint), options)


def _on_hub(called: ModelName, root: Path) -> ModelName:
    """With repository and revision of a snapshot in the Hub's cache, `models--ORG--NAME/snapshots/COMMIT`, or of its
    original/.

    The path says so whether the snapshot was given as an id or as a folder. What the checkpoint says of itself is not
    asked: `_name_or_path` in config.json is where its weights were loaded from, so a fine-tune names its base there.
    """
    real = Path(os.path.realpath(root))
    inside = real.name == "original"
    snapshot = real.parent if inside else real
    kind, *parts = snapshot.parent.parent.name.split("--")
    repository = "/".join(parts)
    cached = kind == "models" and snapshot.parent.name == "snapshots" and COMMIT.fullmatch(snapshot.name)
    if not (cached and REPOSITORY.fullmatch(repository)):
        return called
    return replace(called, repository=repository, revision=snapshot.name, subfolder="original" if inside else None)


def _license(checkpoint: Checkpoint) -> str | None:
    from gptoss_export.exporter.checkpoint.files import open_regular

    said = checkpoint.raw_config.get("license")
    if isinstance(said, str) and is_license(said):
        return "Apache-2.0" if said.lower() == "apache-2.0" else said
    path = checkpoint.root / "LICENSE"
    if not path.is_file():
        return None
    with open_regular(path) as file:
        head = file.read(LONGEST).decode("utf-8", errors="replace")
    return "Apache-2.0" if _APACHE.match(head) else None


def _prompts(path: Path) -> dict[str, Option]:
    from gptoss_export.exporter.weights import hash_files

    return {"prompts": path.name, "prompts_sha256": hash_files({"prompts": path})["prompts"].sha256}

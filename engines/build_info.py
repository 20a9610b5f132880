"""What a build says of itself; it goes into the manifest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildInfo:
    """engine: name and version of what runs the artifact. provider: the execution provider. notes: choices made."""

    engine: str
    provider: str
    notes: tuple[str, ...]

"""Where the links of a checkpoint folder may end: in the folder itself, or in the blobs of the Hub cache it lies in.

A link to anywhere else would bring any file of this user's into an artifact that is handed on, under a harmless name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.errors import UnsafeFileError


@dataclass(frozen=True)
class AllowedPlaces:
    """The folders that a checkpoint's files may lie in, links resolved."""

    roots: tuple[Path, ...]

    @classmethod
    def of(cls, folder: Path) -> AllowedPlaces:
        """Those of the checkpoint in `folder`.

        The Hub cache has `models--ORG--NAME/snapshots/REVISION/FILE -> ../../blobs/HASH`, and nothing else in blobs;
        FILE may be in the snapshot's original/, which is a checkpoint as well.
        """
        root = _real(folder)
        snapshots = (root.parent if root.name == "original" else root).parent
        return cls((root, snapshots.parent / "blobs") if snapshots.name == "snapshots" else (root,))

    def check(self, path: Path) -> None:
        """Raises UnsafeFileError for a path that leads out by a link at any step; what it leads to is not touched."""
        target = _real(path)
        if not any(target.is_relative_to(root) for root in self.roots):
            raise UnsafeFileError(
                f"{path} is, or lies behind, a symbolic link that leads out of the checkpoint, to {shown(str(target))}",
                "Put the file itself there, or give the folder that really holds the checkpoint.",
            )


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # Path.resolve() raises RuntimeError for links in a circle

"""Where the checkpoint of an artifact came from, and what was asked for: what its manifest and its provenance say.

    origin = origin_from(manifest["origin"])
    origin.options["parity"]     # "quick"

Nothing here names a folder of the machine, so that two machines say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Option = str | int | float | bool | None | tuple[str, ...]

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_MOST_OPTIONS, LONGEST = 256, 4096


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


def origin_from(raw: Mapping[str, object]) -> Origin:
    """The origin as `asdict` wrote it and JSON gave it back. Raises ValueError for anything else."""
    options = raw.get("options")
    if set(raw) != {"repository", "commit", "license", "options"} or not isinstance(options, dict):
        raise ValueError("it has other fields than an origin has")
    if len(options) > _MOST_OPTIONS:
        raise ValueError(f"{len(options)} options are too many")
    repository, commit = _text(raw, "repository", REPOSITORY), _text(raw, "commit", COMMIT)
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
    if not all(text.isprintable() and len(text) <= LONGEST for text in texts):
        raise ValueError("an option holds what no command line does")
    return value


def _text(raw: Mapping[str, object], name: str, form: re.Pattern[str] | None = None) -> str | None:
    value = raw[name]
    if value is None:
        return None
    if not isinstance(value, str) or not (form.fullmatch(value) if form else is_license(value)):
        raise ValueError(f"{name} is none")
    return value


def is_license(text: str) -> bool:
    return text.isprintable() and text.isascii() and 0 < len(text) <= 64 and text == text.strip()

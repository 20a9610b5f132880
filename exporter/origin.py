"""Where the checkpoint of an artifact came from, what it is called, and what was asked for: what its manifest and its
provenance say.

    origin = origin_from(manifest["origin"])
    origin.options["parity"]     # "quick"
    origin.model.title           # "openai/gpt-oss-20b"

Nothing here names a folder of the machine, so that two machines say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Option = str | int | float | bool | None | tuple[str, ...]

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}")
COMMIT = re.compile(r"[0-9a-f]{40}")
LABEL_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
LONGEST_TEXT = 160
"""Characters of a name and of a label's value: no view of a report cuts them."""
MOST_LABELS = 32
_MOST_OPTIONS, LONGEST = 256, 4096


@dataclass(frozen=True)
class ModelName:
    """What a checkpoint is called; every field is None, or empty, where that is not known.

    name, labels: as the user said. repository, revision: of the Hub, where the checkpoint is a snapshot in its cache;
    the revision is the commit. subfolder: of the repository. Raises ValueError for what is not one line of text or
    names no repository, so that no manifest, report or command line holds such a thing.
    """

    name: str | None = None
    repository: str | None = None
    revision: str | None = None
    subfolder: Literal["original"] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name is not None:
            _check_text("a name", self.name)
        if len(self.labels) > MOST_LABELS:
            raise ValueError(f"{len(self.labels)} labels are more than {MOST_LABELS}")
        for key, value in self.labels.items():
            if not LABEL_KEY.fullmatch(key):
                raise ValueError("the key of a label has 1 to 63 letters, digits, '.', '_', '-' and '/'")
            _check_text("the value of a label", value)
        for what, text, form in (("repository", self.repository, REPOSITORY), ("revision", self.revision, COMMIT)):
            if text is not None and not (isinstance(text, str) and form.fullmatch(text)):
                raise ValueError(f"the {what} is none of the Hub")
        if (self.repository is None) != (self.revision is None):
            raise ValueError("a repository has a revision, and a folder has neither")
        if self.subfolder not in (None, "original") or (self.subfolder and self.repository is None):
            raise ValueError("the subfolder is none of a repository")

    @property
    def title(self) -> str | None:
        """The name, or else the repository."""
        return self.name or self.repository

    @property
    def source(self) -> str | None:
        """`openai/gpt-oss-20b at 6cee5e81...`, the folder in it included; None for what is not of the Hub."""
        if self.repository is None:
            return None
        return f"{'/'.join(filter(None, (self.repository, self.subfolder)))} at {self.revision}"

    @property
    def facts(self) -> tuple[tuple[str, str], ...]:
        """Everything that is known, by what it is: `name`, `repository`, `revision`, `subfolder`, `label KEY`."""
        texts = ("name", self.name), ("repository", self.repository), ("revision", self.revision)
        known = [(what, text) for what, text in (*texts, ("subfolder", self.subfolder)) if text is not None]
        return (*known, *((f"label {key}", value) for key, value in sorted(self.labels.items())))


def _check_text(what: str, text: object) -> None:
    """Printable leaves out control characters, line ends and whatever turns the direction of a line."""
    if not (isinstance(text, str) and text.isprintable() and text == text.strip() and 0 < len(text) <= LONGEST_TEXT):
        raise ValueError(
            f"{what} is one line of 1 to {LONGEST_TEXT} printable characters, with no space before or after it"
        )


_UNNAMED = ModelName()


@dataclass(frozen=True)
class Origin:
    """Checkpoint and options of one artifact.

    model: what the checkpoint is called. license: as the checkpoint itself has it, in its config.json or its LICENSE,
    None where it says nothing. options: by name, with whatever can change the artifact beside its model's name; those
    of a gate are named `gate.NAME`, those of an engine `engine.NAME`.
    """

    model: ModelName = _UNNAMED
    license: str | None = None
    options: Mapping[str, Option] = field(default_factory=dict)


def origin_from(raw: Mapping[str, object]) -> Origin:
    """The origin as `asdict` wrote it and JSON gave it back. Raises ValueError for anything else."""
    options, model, license = raw.get("options"), raw.get("model"), raw.get("license")
    if set(raw) != {"model", "license", "options"} or not isinstance(options, dict):
        raise ValueError("it has other fields than an origin has")
    if len(options) > _MOST_OPTIONS:
        raise ValueError(f"{len(options)} options are too many")
    if not (license is None or (isinstance(license, str) and is_license(license))):
        raise ValueError("license is none")
    return Origin(_model(model), license, {name: _option(name, value) for name, value in options.items()})


def _model(raw: object) -> ModelName:
    fields = ModelName.__dataclass_fields__
    if not isinstance(raw, dict) or set(raw) != set(fields) or not isinstance(raw["labels"], dict):
        raise ValueError("it has other fields than the name of a model has")
    return ModelName(**raw)


def _option(name: str, value: object) -> Option:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError("an option is a number, a text, a list of texts or nothing")
    texts = (name, *(value if isinstance(value, tuple) else (value,) if isinstance(value, str) else ()))
    if not all(text.isprintable() and len(text) <= LONGEST for text in texts):
        raise ValueError("an option holds what no command line does")
    return value


def is_license(text: str) -> bool:
    return text.isprintable() and text.isascii() and 0 < len(text) <= 64 and text == text.strip()

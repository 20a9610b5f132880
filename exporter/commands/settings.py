"""What every command shares: --debug, --quiet, --json, and stdout that carries nothing but results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click

from gptoss_export.exporter.commands.failure import Error
from gptoss_export.exporter.progress import Progress, choose_progress

SCHEMA_VERSION = "1"
"""Of every document, but for those that are a file of the artifact."""

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Settings:
    """How this process talks; filled in while the command line is read.

    document: what a command has to say to machines. It is printed when the command has ended, so that an error that
    comes after it is in the same document.
    """

    debug: bool = False
    quiet: bool = False
    as_json: bool = False
    document: Mapping[str, object] | None = None

    def print_document(self, error: Error | None = None) -> None:
        """With --json, the one document on stdout: what the command had to say, the error, or the one in the other."""
        content, self.document = self.document, None
        if not self.as_json or (content is None and error is None):
            return
        content = {"schema_version": SCHEMA_VERSION} if content is None else content
        found = {} if error is None else {"error": asdict(error)}
        click.echo(json.dumps({**content, **found}, indent=2, sort_keys=True, allow_nan=False, default=_plain))
        self.as_json = False

    @contextlib.contextmanager
    def working(self) -> Iterator[Progress]:
        """A block that may take long: its progress, with whatever libraries print sent to stderr."""
        with contextlib.redirect_stdout(sys.stderr):
            yield choose_progress(self.quiet)


def common_options(command: _F) -> _F:
    """Adds --quiet and --debug, which are understood before and after the name of a subcommand."""
    quiet = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=_set, help="No progress on stderr."
    )
    debug = click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set, help="Show tracebacks and library warnings."
    )
    return quiet(debug(command))


def json_option(command: _F) -> _F:
    """Adds --json, which is read before the other options, so that an error in them is JSON too."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        envvar="GPTOSS_EXPORT_JSON",
        callback=_set_json,
        help="Print the result, or the error, as one JSON document.",
    )(command)


def threads_option(command: _F) -> _F:
    """Adds --threads."""
    return click.option(
        "--threads",
        type=click.IntRange(1, 4096),
        envvar="GPTOSS_EXPORT_THREADS",
        help="Threads of the engine.  [default: one a core]",
    )(command)


def prompts_option(command: _F) -> _F:
    """Adds --prompts."""
    return click.option(
        "--prompts",
        type=click.Path(dir_okay=False, path_type=Path),
        envvar="GPTOSS_EXPORT_PROMPTS",
        metavar="FILE",
        help="Texts of your own to compare as well: plain text, or JSON lines of texts or token ids.",
    )(command)


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):  # bytes in it that are no text are spelled, since JSON cannot hold them
        return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    raise TypeError(f"{type(value).__name__} in a document")


def _set_json(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    settings = ctx.find_object(Settings)
    if settings is not None:
        settings.as_json = value  # a subcommand's own, whatever the group's was


def _set(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    settings = ctx.find_object(Settings)
    if value and settings is not None and param.name is not None:
        setattr(settings, param.name, True)

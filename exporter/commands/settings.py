"""What every command shares: --debug, --quiet, and stdout that carries nothing but results."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from gptoss_export.exporter.progress import Progress, choose_progress

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass
class Settings:
    """How this process talks; filled in while the command line is read."""

    debug: bool = False
    quiet: bool = False

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
    """Adds --json."""
    return click.option(
        "--json", "as_json", is_flag=True, envvar="GPTOSS_EXPORT_JSON", help="Print the result as JSON."
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


def print_json(content: Mapping[str, object]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(content, indent=2, sort_keys=True, allow_nan=False))


def _set(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    settings = ctx.find_object(Settings)
    if value and settings is not None and param.name is not None:
        setattr(settings, param.name, True)

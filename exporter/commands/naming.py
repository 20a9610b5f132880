"""--name and --label: what the user calls the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from gptoss_export.exporter.checkpoint.files import shown
from gptoss_export.exporter.origin import ModelName

_F = TypeVar("_F", bound=Callable[..., Any])


def naming_options(command: _F) -> _F:
    """Adds --name NAME and --label KEY=VALUE, which may be repeated; the command gets `name` and `labels`, a dict."""
    name = click.option(
        "--name",
        envvar="GPTOSS_EXPORT_NAME",
        callback=_read_name,
        metavar="NAME",
        help="What the model is called in manifest, report, provenance and bill of materials.",
    )
    label = click.option(
        "--label",
        "labels",
        multiple=True,
        envvar="GPTOSS_EXPORT_LABEL",
        callback=_read_labels,
        metavar="KEY=VALUE",
        help="What else these shall say of it; may be repeated.",
    )
    return name(label(command))


def _read_name(ctx: click.Context, param: click.Parameter, given: str | None) -> str | None:
    try:
        return ModelName(name=given).name
    except ValueError as error:
        raise click.BadParameter(f"{shown(given)} is no name: {error}", ctx, param) from error


def _read_labels(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{shown(text)} is no label: it takes KEY=VALUE", ctx, param)
        if key in found:
            raise click.BadParameter(f"{shown(key)} is given twice", ctx, param)
        found[key] = value
        try:
            ModelName(labels=found)
        except ValueError as error:
            raise click.BadParameter(f"{shown(text)} is no label: {error}", ctx, param) from error
    return found

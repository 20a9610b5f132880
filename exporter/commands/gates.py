"""--gate: limits of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_SHOWN = 80


def gate_option(command: _F) -> _F:
    """Adds --gate NAME=VALUE, which may be repeated; the command gets `gates`, a dict by the names of GATE_NAMES."""
    return click.option(
        "--gate",
        "gates",
        multiple=True,
        envvar="GPTOSS_EXPORT_GATE",
        callback=_read,
        metavar="NAME=VALUE",
        help="Another limit for a gate; may be repeated. A looser one is named in the verdict.",
    )(command)


def _read(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, float]:
    if not given:
        return {}
    from gptoss_export.validators.gates import EXACT, GATE_NAMES, override

    found: dict[str, float] = {}
    for text in given:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        shown = repr(text[:_SHOWN])
        if name not in GATE_NAMES:
            names = ", ".join(known.replace("_", "-") for known in GATE_NAMES)
            raise click.BadParameter(f"{shown} names no gate; there are {names}, as NAME=VALUE", ctx, param)
        if name in found:
            raise click.BadParameter(f"{name.replace('_', '-')} is given twice", ctx, param)
        try:
            found[name] = float(value)
            override(EXACT, found)
        except ValueError as error:
            what = "a share of 0 to 1" if name.startswith("min_top1") else "a number of at least 0"
            raise click.BadParameter(f"{shown} is no limit: it takes {what}", ctx, param) from error
    return found

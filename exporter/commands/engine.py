"""The options of TensorRT engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any, TypeVar

import click

from gptoss_export.engines.tensorrt.options import EngineOptions

_F = TypeVar("_F", bound=Callable[..., Any])
_DEFAULTS = EngineOptions()
_AT_LEAST_ONE = click.IntRange(min=1)


def _size(name: str, default: int, what: str) -> Callable[[_F], _F]:
    return click.option(
        f"--{name}",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="N",
        help=f"TensorRT: {what}",
    )


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--trt-flavor",
        type=click.Choice(["auto", "tensorrt", "rtx"]),
        default=_DEFAULTS.flavor,
        show_default=True,
        help="TensorRT: the package that builds, `tensorrt` or `tensorrt_rtx`.",
    ),
    click.option(
        "--engine-weights",
        type=click.Choice(["external", "embedded"]),
        default=_DEFAULTS.engine_weights,
        show_default=True,
        help="TensorRT: experts and embedding read from the weights at load, or put into the engine.",
    ),
    click.option(
        "--trt-experts",
        type=click.Choice(["plugin", "function"]),
        default="plugin",
        show_default=True,
        help="TensorRT: experts by our kernels, or by their definition, which is slow.",
    ),
    _size("max-batch", _DEFAULTS.max_batch, "rows of a call."),
    _size("max-prompt", _DEFAULTS.max_prompt, "positions of a call; longer prompts go in pieces."),
    _size("max-context", _DEFAULTS.max_context, "positions of a text."),
)

allow_unexecuted_option = click.option(
    "--allow-unexecuted", is_flag=True, help="Exit 0 although an engine was built and could not be run here."
)


def engine_options(command: _F) -> _F:
    """Adds the options to a command."""
    return reduce(lambda function, option: option(function), reversed(_OPTIONS), command)


def engine_options_of(given: Mapping[str, Any]) -> EngineOptions:
    """What was given on the command line. Raises EngineBuildError for values that exclude each other."""
    sizes = {name: given[name] for name in ("max_batch", "max_prompt", "max_context")}
    sizes["max_prompt"] = min(sizes["max_prompt"], sizes["max_context"])  # no prompt is longer than a text
    return EngineOptions(
        flavor=given["trt_flavor"],
        engine_weights=given["engine_weights"],
        plugin=given["trt_experts"] == "plugin",
        max_logits=max(_DEFAULTS.max_logits, sizes["max_batch"]),
        **sizes,
    )

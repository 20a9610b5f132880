"""`synth`: a random checkpoint of a given shape, to try an export with nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from gptoss_export.exporter.commands.settings import Settings, common_options, json_option

_F = TypeVar("_F", bound=Callable[..., Any])

_SIZES = {
    "layers": "num_layers",
    "experts": "num_experts",
    "top-k": "top_k",
    "hidden-size": "hidden_size",
    "intermediate-size": "intermediate_size",
    "heads": "num_heads",
    "kv-heads": "num_kv_heads",
    "head-dim": "head_dim",
    "vocab-size": "vocab_size",
    "sliding-window": "sliding_window",
}
_LAYOUTS = {"mxfp4": "HF_MXFP4", "bf16": "HF_BF16", "original": "ORIGINAL"}


def _size_options(command: _F) -> _F:
    for option, field in reversed(_SIZES.items()):
        command = click.option(f"--{option}", field, type=click.IntRange(1), help="Instead of the preset's.")(command)
    return command


@click.command("synth")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--preset", type=click.Choice(["20b", "120b"]), default="20b", show_default=True, help="Shape.")
@_size_options
@click.option(
    "--layout", type=click.Choice(list(_LAYOUTS)), default="mxfp4", show_default=True, help="As which release."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Same seed, same bytes.")
@json_option
@common_options
@click.pass_obj
def synth(settings: Settings, /, out: Path, preset: str, layout: str, seed: int, **sizes: int | None) -> None:
    """Write a random checkpoint to OUT, streamed, however large.

    \b
    Examples:
      gptoss-export synth ./random-20b --preset 20b
      gptoss-export synth ./small --layers 2 --experts 4
    """
    from dataclasses import replace

    from gptoss_export.exporter.checkpoint.synth import PRESETS, synthesize
    from gptoss_export.exporter.checkpoint.tensors import Layout
    from gptoss_export.exporter.progress import format_bytes

    given = {name: size for name, size in sizes.items() if size is not None}
    shape = replace(PRESETS[preset], **given)
    with settings.working() as progress, progress.task("synth", unit="bytes") as task:
        written = 0

        def advance(done: int, total: int) -> None:
            nonlocal written
            task.advance(done - written)
            written = done

        synthesize(out, shape, layout=Layout[_LAYOUTS[layout]], seed=seed, progress=advance)
    nbytes = sum(path.stat().st_size for path in out.iterdir())
    if settings.as_json:
        from gptoss_export.exporter.commands.documents import Synthesized, document

        settings.document = document(Synthesized(out, Layout[_LAYOUTS[layout]], nbytes))
        return
    click.echo(f"{out}: {format_bytes(nbytes)}")

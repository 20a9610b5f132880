"""The command line: options in, pipeline called, exit code out.

Importing this module must stay cheap, so that `--help` answers at once: everything heavy is imported by the
command that needs it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
from click.core import ParameterSource

from gptoss_export.exporter.commands import artifact, bench, diff, generate, polygraphy, report, synth, verify
from gptoss_export.exporter.commands.config_file import load_defaults
from gptoss_export.exporter.commands.engine import allow_unexecuted_option, engine_options, engine_options_of
from gptoss_export.exporter.commands.failure import BUG, Error, error_of, wants_json
from gptoss_export.exporter.commands.gates import gate_option
from gptoss_export.exporter.commands.naming import naming_options
from gptoss_export.exporter.commands.settings import (
    Settings,
    common_options,
    json_option,
    prompts_option,
    threads_option,
)
from gptoss_export.exporter.interrupt import Terminated, prompt_end, say_goodbye

if TYPE_CHECKING:
    from gptoss_export.exporter.planning.request import Parity

_EPILOG = """\b
Examples:
  gptoss-export --target ort-cpu --model ./gpt-oss-20b --output ./release
  gptoss-export --target trt-fp16 --model ./gpt-oss-20b --output ./release
  gptoss-export --target onnx --target ort-cpu --model openai/gpt-oss-20b --output ./release
  gptoss-export --target ort-cpu --model ./gpt-oss-20b --output ./release --dry-run
  gptoss-export --config export.yaml --parity full
  gptoss-export validate ./release

Every option can also come from the file given as --config, and from the environment as GPTOSS_EXPORT_TARGET
and so on; the command line wins over the environment, the environment over the file.
"""

_EVERYWHERE = {"debug", "quiet", "config", "version", "help"}


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        libraries = ("torch", "onnx", "onnx-ir", "onnxruntime", "transformers")
        named = ", ".join(f"{name} {version(name)}" for name in libraries)
        click.echo(f"gptoss-export {version('gptoss-export')} ({named})")
        ctx.exit()


@click.group(
    "gptoss-export",
    invoke_without_command=True,
    epilog=_EPILOG,
    subcommand_metavar="[COMMAND [ARGS]...]",
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "GPTOSS_EXPORT"},
)
@click.option(
    "--target",
    "targets",
    multiple=True,
    envvar="GPTOSS_EXPORT_TARGET",
    metavar="NAME",
    help="What to export for; may be repeated. See `targets`.",
)
@click.option("--model", metavar="DIR|ID", help="Checkpoint folder, or an id on the Hugging Face Hub.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@naming_options
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder to make; with several targets, one folder each in it.",
)
@click.option(
    "--weights",
    type=click.Choice(["copy", "hardlink", "in-place"]),
    default="copy",
    show_default=True,
    help="How the weights come into the artifact.",
)
@click.option(
    "--parity",
    type=click.Choice(["off", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How thoroughly to compare the artifact with PyTorch.",
)
@prompts_option
@gate_option
@click.option("--bundle-kernels", is_flag=True, help="Put the library with our kernels into the artifact.")
@engine_options
@allow_unexecuted_option
@click.option("--force", is_flag=True, help="Replace an artifact that is in --output.")
@click.option("--ignore-preflight", is_flag=True, help="Begin although disk or memory do not seem to be enough.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and what it takes, and stop.")
@threads_option
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    is_eager=True,
    expose_value=False,
    callback=load_defaults,
    help="YAML file of options.",
)
@json_option  # after --config, which may say so
@common_options
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version, help="Show versions."
)
@click.pass_context
def cli(
    ctx: click.Context,
    /,
    targets: tuple[str, ...],
    model: str | None,
    revision: str | None,
    name: str | None,
    labels: Mapping[str, str],
    output: Path | None,
    weights: str,
    parity: str,
    prompts: Path | None,
    gates: Mapping[str, float],
    bundle_kernels: bool,
    force: bool,
    ignore_preflight: bool,
    dry_run: bool,
    threads: int | None,
    allow_unexecuted: bool,
    **engine: object,
) -> None:
    """Export gpt-oss from its own checkpoint to an artifact that is shown to be the model."""
    settings = ctx.ensure_object(Settings)
    if ctx.invoked_subcommand is not None:
        _refuse_export_options(ctx)
        settings.as_json = False  # as its own option says, if it has one
        return
    if not (targets or model or output or settings.as_json):
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)
    from gptoss_export.exporter.commands import documents
    from gptoss_export.exporter.commands.plan_document import planned
    from gptoss_export.exporter.commands.show import echo_plan, echo_result
    from gptoss_export.exporter.origin import ModelName
    from gptoss_export.exporter.pipeline import ExportRequest, MeasureOptions, export, make_plan, require_pass
    from gptoss_export.exporter.weights import WeightsMode

    if model is None or output is None or not targets:
        absent = [
            name for name, value in (("--target", targets), ("--model", model), ("--output", output)) if not value
        ]
        raise click.UsageError(f"missing {', '.join(absent)}", ctx)
    request = ExportRequest(
        model=model,
        output=output,
        targets=_known_targets(ctx, targets),
        revision=revision,
        weights=WeightsMode(weights),
        parity=cast("Parity", parity),
        force=force,
        ignore_preflight=ignore_preflight,
        threads=threads,
        bundle_kernels=bundle_kernels,
        engine=engine_options_of(engine),
        measure=MeasureOptions(prompts=prompts, overrides=gates),
        called=ModelName(name=name, labels=labels),
    )
    if dry_run:
        with settings.working():
            plan = make_plan(replace(request, ignore_preflight=True))
        if settings.as_json:
            settings.document = planned(plan)
        else:
            echo_plan(plan)
        if not ignore_preflight:
            plan.preflight.require()
        return
    with settings.working() as progress:
        results = export(request, progress)
    if settings.as_json:
        settings.document = documents.delivered(results)
    else:
        for result in results:
            echo_result(result)
    if parity == "off":
        click.echo("warning: NOT VALIDATED, the artifact was not compared with the model (--parity off)", err=True)
        click.echo(f"  next: gptoss-export validate {results[0].folder}", err=True)
        return
    require_pass(results, allow_unexecuted=allow_unexecuted)


for _command in (
    artifact.targets,
    artifact.inspect,
    artifact.validate,
    verify.verify,
    verify.sign,
    report.report,
    diff.diff,
    polygraphy.polygraphy,
    generate.generate,
    bench.bench,
    synth.synth,
):
    cli.add_command(_command)


def _known_targets(ctx: click.Context, names: tuple[str, ...]) -> tuple[str, ...]:
    from gptoss_export.engines.targets import TARGETS

    if unknown := [name for name in names if name not in TARGETS]:
        raise click.UsageError(f"no target {unknown[0]!r}; there are {', '.join(TARGETS)}", ctx)
    return tuple(dict.fromkeys(names))


def _refuse_export_options(ctx: click.Context) -> None:
    for param in ctx.command.params:
        name = str(param.name)
        if name not in _EVERYWHERE and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(
                f"{param.opts[0]} is an option of the export; those of `{ctx.invoked_subcommand}` follow its name",
                ctx,
            )


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; see docs/exit-codes.md. Never raises an Exception.

    With --json, stdout gets one document: the result, the error, or the result with the error in it. A run that a
    signal ends prints none.
    """
    args = sys.argv[1:] if args is None else args
    settings = Settings()
    try:
        try:
            with prompt_end(), warnings.catch_warnings():
                if "--debug" not in args:
                    warnings.simplefilter("ignore")
                code = cli.main(args, "gptoss-export", standalone_mode=False, obj=settings)
                settings.print_document()
        except (BrokenPipeError, click.Abort):
            raise
        except Exception as error:
            found = error_of(error)
            _tell(found, error, debug=settings.debug)
            settings.as_json = wants_json(settings.as_json, args, error)
            settings.print_document(found)
            code = found.exit_code
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (BrokenPipeError, SystemExit):
        # The reader of stdout went away; outside of standalone mode this is all that click turns into sys.exit.
        # Without the next line the interpreter would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except (KeyboardInterrupt, click.Abort) as error:
        return say_goodbye(signal.SIGINT, error)
    except Terminated as error:
        return say_goodbye(signal.SIGTERM, error)


def _tell(found: Error, error: Exception, *, debug: bool) -> None:
    """The error for people, on stderr."""
    if isinstance(error, click.ClickException):
        error.show()
        return
    if debug:
        traceback.print_exception(error)
    click.echo(f"error: {found.what}", err=True)
    click.echo(f"  next: {found.next}", err=True)
    if found.kind != BUG:
        for note in getattr(error, "__notes__", ()):
            click.echo(f"  kept: {note}", err=True)

"""What went wrong, in the words that stderr and the JSON document share."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import click

from gptoss_export.engines.memory import out_of_memory, ran_out
from gptoss_export.exporter.errors import AccessError, DiskSpaceError, GptossExportError, IntegrityError

USAGE, BUG = "usage", "bug"


@dataclass(frozen=True)
class Error:
    """Why a command ended with another exit code than 0.

    kind: a name that stays, of docs/exit-codes.md. what: what happened, one line. next: what to do about it.
    """

    kind: str
    what: str
    next: str
    exit_code: int


def error_of(error: Exception) -> Error:
    """Any exception that ended a command, as the user is told of it."""
    if isinstance(error, click.ClickException):
        return _usage(error)
    known = _known(error)
    if known is None:
        what = str(error).splitlines()[0] if str(error) else "no message"
        what = f"a bug in gptoss-export: {type(error).__name__}: {what}"
        return Error(BUG, printable(what), "rerun with --debug and report the traceback", 1)
    return Error(known.kind, printable(known.what), printable(known.next_step), known.exit_code)


def wants_json(as_json: bool, args: Sequence[str], error: Exception) -> bool:
    """Whether --json was given, in any way, where an error came before the command had read its options or not."""
    if as_json or not isinstance(error, click.UsageError):
        return as_json
    if "--json" in itertools.takewhile(lambda arg: arg != "--", args):
        return True
    ctx = error.ctx
    if ctx is not None and isinstance(ctx.command, click.Group):
        ctx = ctx.find_root()
    option = ctx and next((param for param in ctx.command.params if param.name == "as_json"), None)
    if not ctx or not option:
        return False
    try:
        return bool(option.type_cast_value(ctx, option.consume_value(ctx, {})[0]))
    except click.BadParameter:
        return False


def printable(line: str) -> str:
    """Errors quote files that somebody else wrote; what they hold is not for the terminal to obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _usage(error: click.ClickException) -> Error:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    command = "gptoss-export" if ctx is None else ctx.command_path
    absent = isinstance(error, click.exceptions.NoArgsIsHelpError)  # its message is the help
    what = "a command is missing" if absent else " ".join(error.format_message().split())
    return Error(USAGE, printable(what), f"see `{command} --help`", error.exit_code)


def _known(error: Exception) -> GptossExportError | None:
    """The error as one of ours, if it is one that a user can do something about."""
    if isinstance(error, GptossExportError):
        return error
    if ran_out(error):
        return out_of_memory()
    if not isinstance(error, OSError):
        return None
    where = error.filename if error.filename is not None else "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskSpaceError(f"no space left on the device for {where}", "free space, or choose another --output")
    if error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    ):
        return AccessError(f"{where}: {error.strerror}", "check the path and the rights of this user on it")
    if error.errno == errno.ENOENT and error.filename is not None:
        return IntegrityError(f"{where} is gone, which was there before", "leave the files alone while they are used")
    if error.errno in (errno.EIO, errno.ENXIO, errno.ESTALE, errno.ENOTCONN):
        return AccessError(f"{where}: {error.strerror}", "the disk or the network it is on failed; check both")
    return None

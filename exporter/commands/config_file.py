"""--config: a YAML mapping of option names, read as defaults that environment and command line override.

    target: [onnx, ort-cpu]
    model: ./gpt-oss-20b
    parity: full
    validate:               # options of a subcommand, under its name
      threads: 2

The file is walked as nodes and never constructed: `off` stays the word that was written, no tag makes an
object, and aliases, the stuff of exponential files, are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from yaml.nodes import MappingNode, Node

MAX_CONFIG_FILE_BYTES = 64 << 10
_NOT_OF_A_FILE = ("config", "version")
_DEEPEST = 8  # three are of use, and the scanner's time grows with the square of the depth


def load_defaults(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """The callback of --config. Raises click.BadParameter that names the key or line at fault."""
    if path is None:
        return
    group = ctx.command
    assert isinstance(group, click.Group)
    from gptoss_export.exporter.checkpoint.files import open_regular, read_capped
    from gptoss_export.exporter.errors import CheckpointError

    try:
        with open_regular(path) as f:
            data = read_capped(f, MAX_CONFIG_FILE_BYTES)
    except CheckpointError as error:
        raise click.BadParameter(error.what, ctx, param) from error
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}", ctx, param) from error
    if len(data) > MAX_CONFIG_FILE_BYTES:
        raise click.BadParameter(f"{path} has more than {MAX_CONFIG_FILE_BYTES} bytes", ctx, param)
    try:
        root = _compose(data)
        defaults = _options(root, group) if root is not None else {}
    except _ConfigFileError as error:
        raise click.BadParameter(f"{path}: {error}", ctx, param) from error
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


class _ConfigFileError(Exception):
    pass


def _compose(data: bytes) -> MappingNode | None:
    import yaml

    from gptoss_export.exporter.checkpoint.files import one_line

    try:
        depth = 0
        for event in yaml.parse(data, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise _ConfigFileError("aliases (*name) are not understood")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise _ConfigFileError("nested too deeply")
        root = yaml.compose(data, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two for escapes beyond Unicode
        raise _ConfigFileError(one_line(error, 400)) from error
    except RecursionError as error:
        raise _ConfigFileError("nested too deeply") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise _ConfigFileError("expected a mapping of option names to values")
    return root


def _options(node: MappingNode, command: click.Command) -> dict[str, object]:
    """The mapping as click's default_map: parameter names to strings, lists of strings, or a subcommand's own
    map.
    """
    import yaml

    known = {
        max(param.opts, key=len).removeprefix("--"): param
        for param in command.params
        if isinstance(param, click.Option) and param.name not in _NOT_OF_A_FILE
    }
    subcommands = command.commands if isinstance(command, click.Group) else {}
    defaults: dict[str, object] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value).replace("_", "-") if isinstance(key_node, yaml.ScalarNode) else ""
        if key in subcommands and isinstance(value, yaml.MappingNode):
            name = key
            entry: object = _options(value, subcommands[key])
        elif key in known:
            name = str(known[key].name)
            entry = _value(key, value, known[key], line)
        else:
            raise _ConfigFileError(f"line {line}: unknown option {key[:80]!r}; known are {', '.join(sorted(known))}")
        if name in defaults:
            raise _ConfigFileError(f"line {line}: {key} is given twice")
        defaults[name] = entry
    return defaults


def _value(key: str, node: Node, param: click.Option, line: int) -> str | list[str]:
    import yaml

    scalars = [node, *node.value] if isinstance(node, yaml.SequenceNode) else [node]
    if any(isinstance(scalar, yaml.ScalarNode) and not _is_text(scalar.value) for scalar in scalars):
        raise _ConfigFileError(f"line {line}: {key} holds what no path or name can: NUL or half a surrogate pair")
    if isinstance(node, yaml.ScalarNode) and node.value not in ("", "null", "~"):
        return [node.value] if param.multiple else str(node.value)
    items = node.value if param.multiple and isinstance(node, yaml.SequenceNode) else ()
    if items and all(isinstance(item, yaml.ScalarNode) for item in items):
        return [str(item.value) for item in items]
    expected = "a value or a list of values" if param.multiple else "one value"
    raise _ConfigFileError(f"line {line}: {key} needs {expected}")


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)

"""JSON from an untrusted file: bounded in size and depth, with one meaning only. Everything of ours reads it here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_export.exporter.checkpoint.files import open_regular, read_capped, shown
from gptoss_export.exporter.errors import CheckpointError, ConfigError, GptossExportError

# A hundred megabytes of `[],[],` would become gigabytes of lists; no file of ours holds a million values.
MAX_VALUES = 1_000_000
MAX_DIGITS = 20
MAX_FLOAT_CHARACTERS = 400

NEXT_STEP = "Download the file again, or write it anew with a JSON library."

Refuse = Callable[[str], GptossExportError]


def read_json_object(path: Path, max_bytes: int, error: type[CheckpointError] = ConfigError) -> dict[str, object]:
    """Reads one JSON object of at most max_bytes.

    Raises `error` for whatever is not strict UTF-8 JSON with unique keys, finite numbers and an object at the
    top; CheckpointNotFoundError or UnsafeFileError when there is no such regular file.
    """
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size > max_bytes:
            raise error(
                f"{path} has {size} bytes, more than the {max_bytes} that such a file can need",
                "Download the file again; it is not what its name says.",
            )
        data = read_capped(f, max_bytes)
    return parse_json_object(data, str(path), error)


def parse_json_object(
    data: bytes,
    where: str,
    error: type[GptossExportError],
    duplicate: type[GptossExportError] | None = None,
    next_step: str = NEXT_STEP,
) -> dict[str, object]:
    """Parses one JSON object; everything else as for `parse_json`."""
    parsed = parse_json(data, where, error, duplicate, next_step)
    if not isinstance(parsed, dict):
        raise error(f"{where}: not a JSON object", next_step)
    return parsed


def parse_json(
    data: bytes,
    where: str,
    error: type[GptossExportError],
    duplicate: type[GptossExportError] | None = None,
    next_step: str = NEXT_STEP,
) -> object:
    """Parses one JSON value; `where` names the source in messages.

    Refused with `error` and `next_step`: bytes that are not UTF-8, duplicate keys (parsers disagree about which
    one counts), NaN, Infinity and numbers that overflow to them, integers of more than 20 digits, lone
    surrogates, nesting too deep for the parser, more than a million values. A key that is twice in the outermost
    object raises `duplicate`.
    """

    def refuse(problem: str) -> GptossExportError:
        return error(f"{where}: {problem}", next_step)

    if data.count(b",") + data.count(b"[") + data.count(b"{") > MAX_VALUES:
        raise refuse(f"more than {MAX_VALUES} values")
    reader = _Reader(refuse)
    try:
        text = data.decode("utf-8")
        parsed = json.loads(
            text,
            object_pairs_hook=reader.object,
            parse_int=reader.integer,
            parse_float=reader.number,
            parse_constant=reader.constant,
        )
        if "\\u" in text:  # only an escape can make the half of a surrogate pair that no encoder takes
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as e:
        raise refuse(f"not UTF-8 at byte {e.start}") from e
    except UnicodeEncodeError as e:
        raise refuse("a lone surrogate in a string") from e
    except json.JSONDecodeError as e:
        line = f"line {e.lineno}, " if b"\n" in data else ""
        raise refuse(f"not JSON: {e.msg} at {line}column {e.colno}") from e
    except RecursionError as e:
        raise refuse("nested too deeply") from e
    if reader.inner_duplicate is not None:
        raise refuse(f"the key {shown(reader.inner_duplicate)} is given twice in one object")
    if reader.outer_duplicate is not None:
        problem = f"{where}: the key {shown(reader.outer_duplicate)} is given twice"
        raise (duplicate or error)(problem, next_step)
    return parsed


class _Reader:
    """The hooks of one parse. The outermost object is the last one that the parser closes."""

    def __init__(self, refuse: Refuse) -> None:
        self._refuse = refuse
        self.inner_duplicate: str | None = None
        self.outer_duplicate: str | None = None

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        self.inner_duplicate = self.inner_duplicate or self.outer_duplicate
        self.outer_duplicate = None
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.outer_duplicate = key
                    break
                seen.add(key)
        return result

    def integer(self, digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise self._refuse(f"an integer of {len(digits)} digits")
        return int(digits)

    def number(self, digits: str) -> float:
        if len(digits) > MAX_FLOAT_CHARACTERS:
            raise self._refuse(f"a number of {len(digits)} characters")
        value = float(digits)
        if not math.isfinite(value):
            raise self._refuse(f"the number {shown(digits)} is out of range")
        return value

    def constant(self, name: str) -> float:
        raise self._refuse(f"{name} is not JSON")

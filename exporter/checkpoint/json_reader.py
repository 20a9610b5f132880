"""JSON from an untrusted file: one object, bounded in size and depth, with one meaning only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_export.exporter.checkpoint.files import open_regular, shown
from gptoss_export.exporter.errors import CheckpointError, ConfigError

# A hundred megabytes of `[],[],` would become gigabytes of lists; no file of ours holds a million values.
MAX_VALUES = 1_000_000
MAX_DIGITS = 20

Refuse = Callable[[str], CheckpointError]


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
        data = f.read(max_bytes)
    return parse_json_object(data, str(path), error)


def parse_json_object(
    data: bytes,
    where: str,
    error: type[CheckpointError],
    duplicate: type[CheckpointError] | None = None,
) -> dict[str, object]:
    """Parses one JSON object; `where` names the source in messages.

    Refused with `error`: bytes that are not UTF-8, duplicate keys (parsers disagree about which one counts),
    NaN, Infinity and numbers that overflow to them, integers of more than 20 digits, lone surrogates, nesting
    too deep for the parser, more than a million values. A key that is twice in the outermost object raises
    `duplicate`.
    """

    def refuse(problem: str) -> CheckpointError:
        return error(f"{where}: {problem}", "Download the file again, or write it anew with a JSON library.")

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
        raise refuse(f"not JSON: {e.msg} at line {e.lineno}, column {e.colno}") from e
    except RecursionError as e:
        raise refuse("nested too deeply") from e
    if not isinstance(parsed, dict):
        raise refuse("not a JSON object")
    if reader.inner_duplicate is not None:
        raise refuse(f"the key {shown(reader.inner_duplicate)} is given twice in one object")
    if reader.outer_duplicate is not None:
        problem = f"{where}: the key {shown(reader.outer_duplicate)} is given twice"
        raise (duplicate or error)(problem, "Two meanings are in the file; download it again, or write it anew.")
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
        value = float(digits)
        if not math.isfinite(value):
            raise self._refuse(f"the number {shown(digits)} is out of range")
        return value

    def constant(self, name: str) -> float:
        raise self._refuse(f"{name} is not JSON")

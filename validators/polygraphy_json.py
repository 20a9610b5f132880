"""Polygraphy's JSON, read and written without Polygraphy: nothing of a file is executed or taken at its word.

An object of a class is a JSON object with the class's name under `polygraphy_class`; an array is a .npy file in base64.
Checked against Polygraphy 0.53.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.files import open_regular, read_capped
from gptoss_export.exporter.checkpoint.json_reader import parse_json_object
from gptoss_export.exporter.errors import CheckpointError, PromptError
from gptoss_export.validators.npy import PREFIX_BYTES, data_offset, header_shape

CLASS = "polygraphy_class"
LARGEST_FILE = 2 << 30
"""Bytes: the logits of 1000 positions of gpt-oss and the caches beside them, in base64."""

_NEXT_STEP = "Give what `polygraphy run --save-outputs` wrote with the inputs of `gptoss-export polygraphy export`."


def encode_array(array: NDArray[Any]) -> dict[str, str]:
    """The array as Polygraphy's Encoder writes it."""
    held = io.BytesIO()
    np.save(held, array, allow_pickle=False)
    return {"array": base64.b64encode(held.getvalue()).decode("ascii"), CLASS: "ndarray"}


def write_results(file: TextIO, runner: str, shape: tuple[int, ...], blocks: Iterable[NDArray[np.float32]]) -> None:
    """A RunResults of one iteration of one runner whose only output is `logits`, float32 [shape], block by block."""
    before, after = json.dumps(_run_results(runner, {"array": "@", CLASS: "ndarray"})).split("@")
    file.write(before)
    header = io.BytesIO()
    descriptor = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, descriptor)
    rest = header.getvalue()
    for block in blocks:
        rest += np.ascontiguousarray(block, "<f4").tobytes()
        # Base64 takes three bytes at a time; padding may come at the end alone.
        whole = len(rest) - len(rest) % 3
        file.write(base64.b64encode(rest[:whole]).decode("ascii"))
        rest = rest[whole:]
    file.write(base64.b64encode(rest).decode("ascii"))
    file.write(after)


def _run_results(runner: str, logits: Mapping[str, str]) -> dict[str, object]:
    outputs = {"logits": {"values": logits, CLASS: "LazyArray"}}
    iteration = {"outputs": outputs, "runtime": None, "runner_name": runner, CLASS: "IterationResult"}
    return {"lst": [[runner, [iteration]]], CLASS: "RunResults"}


def read_logits(place: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Runner's name and `logits` of every iteration in a file, or in a folder of files, that --save-outputs wrote.

    One file is in memory at a time. Raises PromptError, naming the file, for one that is no such thing.
    """
    files = sorted(place.glob("*.json")) if place.is_dir() else [place]
    if not files:
        raise _none(place, "it is a folder without .json files")
    for path in files:
        try:
            with open_regular(path) as file:
                data = read_capped(file, LARGEST_FILE)
            if len(data) > LARGEST_FILE:
                raise ValueError(f"it has more than {LARGEST_FILE} bytes; save into a folder, one file an iteration")
            yield from _results(parse_json_object(data, _no_results(path), PromptError, next_step=_NEXT_STEP))
        except CheckpointError as error:
            raise _none(path, error.what) from error
        except ValueError as error:
            raise _none(path, ascii(" ".join(str(error).split())[:200])[1:-1]) from error


def _none(path: Path, reason: str) -> PromptError:
    return PromptError(f"{_no_results(path)}: {reason}", _NEXT_STEP)


def _no_results(path: Path) -> str:
    return f"{path} holds no results of Polygraphy"


def _results(found: object) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for entry in _items(found, "RunResults"):
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError("it has an entry that is no runner with its iterations")
        if not isinstance(entry[1], list):
            raise ValueError("it has a runner without a list of iterations")
        for iteration in entry[1]:
            outputs = iteration.get("outputs") if isinstance(iteration, dict) else None
            logits = outputs.get("logits") if isinstance(outputs, dict) else None
            if not isinstance(logits, dict):
                raise ValueError("it has an iteration without logits")
            yield entry[0], decode_array(logits.get("values", logits))


def _items(found: object, kind: str) -> list[object]:
    items = found.get("lst") if isinstance(found, dict) and found.get(CLASS) == kind else None
    if not isinstance(items, list):
        raise ValueError(f"it is no {kind}")
    return items


def decode_array(found: object) -> NDArray[np.float32]:
    """The float32 array of an encoded one. Raises ValueError for what is none: a pickle, another type, wrong sizes."""
    text = found.get("array") if isinstance(found, dict) and found.get(CLASS) == "ndarray" else None
    if not isinstance(text, str):
        raise ValueError("its logits are no numpy array")
    data = base64.b64decode(text, validate=True)
    try:
        start = data_offset(data)
        shape = header_shape(data[PREFIX_BYTES:start])
    except ValueError as error:
        raise ValueError(f"its logits are no array of ours: {error}") from error
    if math.prod(shape) * 4 != len(data) - start:
        raise ValueError("its logits are not of the size that they say")
    return np.frombuffer(data, "<f4", offset=start).reshape(shape)

"""Documents that are nearly right: a valid one with a few edits that know its structure, and then a few bytes.

All chance comes from a random.Random, which Hypothesis, atheris or a plain seed can be behind.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from random import Random
from typing import Any

NESTED: Any = json.loads("[" * 60 + "]" * 60)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 31, 2**31, 2**63, -(2**63), 10**19, 10**20, 10**300, 0.5, -0.0, 1e-300, 1e308,
    "", "a", "..", "../x", "/etc/passwd", "a/../b", "a\\b", "\x00", "\x1b[2J", "\ud800", "\u202e", "x" * 5000, "NaN",
    "model.safetensors", "*/_ORT_MEM_ADDR_/*", "0" * 64, [], {}, [[]], [0, -1], {"a": None}, NESTED,
)  # fmt: skip
TOKENS = (
    b"{", b"}", b"[", b"]", b'"', b":", b",", b"NaN", b"-Infinity", b"1e999", b"9" * 30, b"\\ud800", b"\xff", b"\x00",
    b"null", b"[" * 2000, b'{"a":' * 2000, b"'", b"\n", b"\t- ", b"&a *a", b"!!python/object/apply:os.system ",
    b'"\\UFFFFFFFF"', b"%YAML 9.9\n---\n", b"<<: ", b"? ", b"|", b"../", b"\xef\xbb\xbf",
)  # fmt: skip


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Up to four cuts, copies, flips and insertions."""
    edited = bytearray(data)
    for _ in range(random.randint(0, 4)):
        at = random.randrange(len(edited) + 1)
        kind = random.randrange(5)
        if kind == 0 and edited:
            edited[at % len(edited)] ^= 1 << random.randrange(8)
        elif kind == 1:
            edited[at:at] = random.choice(TOKENS)
        elif kind == 2:
            del edited[at : at + random.choice((1, 2, 8, 100, 100_000))]
        elif kind == 3:
            edited[at:at] = edited[at : at + random.choice((1, 8, 200))]
        else:
            edited[at : at + 8] = random.randbytes(random.randint(0, 8))
    return bytes(edited)


def mutate_json(random: Random, data: bytes) -> bytes:
    """Up to three edits of the parsed document, now and then a key that is there twice, now and then bytes."""
    document = json.loads(data)
    for _ in range(random.randint(1, 3)):
        _edit(random, document)
    text = json.dumps(document).encode("ascii")
    if random.random() < 0.1 and b'": ' in text:
        key = text[text.index(b'"') : text.index(b'": ') + 3]
        text = text.replace(b"{", b"{" + key + b"0, ", 1)
    return mutate_bytes(random, text) if random.random() < 0.2 else text


def mutate_lines(random: Random, data: bytes) -> bytes:
    """JSON lines: one of them changed."""
    lines = [line for line in data.split(b"\n") if line]
    if not lines:
        return mutate_bytes(random, data)
    at = random.randrange(len(lines))
    lines[at] = mutate_json(random, lines[at])
    return b"\n".join(lines)


def mutate_safetensors(random: Random, data: bytes) -> bytes:
    """A header changed, its length right or wrong, and the bytes after it as they were or not."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.2 or not 0 < length <= len(data) - 8:
        return mutate_bytes(random, data)
    header, buffer = mutate_json(random, data[8 : 8 + length]), data[8 + length :]
    said = random.choice((len(header),) * 8 + (0, len(header) - 1, len(header) + 1, 1 << 40, (1 << 64) - 1))
    if random.random() < 0.2:
        buffer = buffer[: random.randrange(len(buffer) + 1)]
    return struct.pack("<Q", said % (1 << 64)) + header + buffer


def mutate_onnx(random: Random, data: bytes) -> bytes:
    """External data that lead elsewhere, in an initializer or in a constant of a function."""
    import onnx

    model = onnx.ModelProto.FromString(data)
    if random.random() < 0.2:
        return mutate_bytes(random, data)
    holders = [model.graph.initializer[0], model.functions[0].node[0].attribute[0].t]
    tensor = random.choice(holders)
    tensor.data_location = random.choice((1, 1, 1, 0))
    for _ in range(random.randint(1, 2)):
        entry = tensor.external_data.add()
        entry.key = random.choice(("location", "offset", "length", "checksum", "__class__", "basepath", ""))
        value = random.choice(VALUES)
        entry.value = value.encode("utf-8", "replace").decode() if isinstance(value, str) else str(value)[:100]
    if random.random() < 0.5:
        del tensor.external_data[0]
    return bytes(model.SerializeToString())


def _edit(random: Random, document: Any) -> None:
    """One change at a place that is reached by walking down from the top."""
    at = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return
        key = random.choice(keys)
        child = at[key]
        if isinstance(child, dict | list) and child and random.random() < 0.8:
            at = child
            continue
        break
    kind = random.randrange(6)
    if kind == 0:
        del at[key]
    elif kind == 1 and isinstance(at, dict):
        at[str(random.choice(VALUES))[:300]] = at.pop(key)
    elif kind == 2 and isinstance(at, list):
        at.extend(deepcopy(child) for _ in range(random.choice((1, 5, 300))))
    elif kind == 3 and isinstance(child, int | float) and abs(child) < 1e300:
        at[key] = child + random.choice((-1, 1, 0.5, 1 << 40))
    else:
        at[key] = deepcopy(random.choice(VALUES))


MUTATIONS: dict[str, Callable[[Random, bytes], bytes]] = {
    "bytes": mutate_bytes,
    "json": mutate_json,
    "jsonl": mutate_lines,
    "safetensors": mutate_safetensors,
    "onnx": mutate_onnx,
}

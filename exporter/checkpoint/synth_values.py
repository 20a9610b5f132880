"""Random weights of a gpt-oss, each byte of which depends on the seed, its tensor and its place only.

So a checkpoint is the same whatever the pieces it is written in, and the same network in every layout. Values
keep activations near one through any number of layers: matrices have about unit gain, and so have experts.

Every value is made by two operations on random bits, `(bits & mask) + offset`, as fast as memory is. For a
bfloat16 the mask takes sign, mantissa and the lowest bits of the exponent: a symmetric distribution over two or
four octaves, whose kurtosis is 1.5 or 2.75 (a normal one has 3).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from gptoss_export.exporter.checkpoint.config import MXFP4_GROUP, ModelConfig
from gptoss_export.exporter.checkpoint.layouts import ITEMSIZE, Part, StoredTensor
from gptoss_export.exporter.checkpoint.mxfp4 import FP4_VALUES, decode_bf16

Bytes = NDArray[np.uint8]

# Each block of a tensor's stream has a generator of its own, so that a stream can be entered anywhere.
BLOCK_BYTES = 4 << 20


class RandomWeights:
    """The weights of one random network. seed: any integer from 0 on."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._seed = seed

    def pieces(self, tensor: StoredTensor) -> Iterator[Callable[[], Bytes]]:
        """The bytes of a stored tensor in order, as calls that make some megabytes each, in any thread."""
        for part in tensor.parts:
            if part.name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                yield from (partial(self._dequantised, part, e) for e in range(part.shape[0]))
                continue
            end = math.prod(part.shape) * ITEMSIZE[tensor.dtype]
            for start in range(0, end, BLOCK_BYTES):
                yield partial(self._range, part.name, start, min(start + BLOCK_BYTES, end))

    def _range(self, name: str, start: int, end: int) -> Bytes:
        """Bytes [start, end) of a canonical tensor; of a BF16 one, both even."""
        raw = self._stream(name, start, end)
        if name.endswith("_scales"):
            return (raw & np.uint8(1)) + _low_scale(self._fan_in(name))
        if not name.endswith("_blocks"):
            mask, offset = self._pattern(name)
            values = raw.view("<u2")
            values &= mask
            values += offset
        return raw

    def _stream(self, name: str, start: int, end: int) -> Bytes:
        key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little")
        first = start // BLOCK_BYTES
        blocks = []
        for block in range(first, -(-end // BLOCK_BYTES)):
            seeds = np.random.SeedSequence([self._seed, key, block])
            words = (min(end, (block + 1) * BLOCK_BYTES) - block * BLOCK_BYTES + 7) // 8
            # random_raw stays the same over versions of NumPy; methods of Generator may change (NEP 19).
            blocks.append(np.random.SFC64(seeds).random_raw(words).astype("<u8", copy=False))
        raw = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return raw.view(np.uint8)[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _dequantised(self, part: Part, expert: int) -> Bytes:
        """The same expert as in MXFP4, in bf16 (exact) and input-major, [columns, rows]."""
        _, columns, rows = part.shape
        groups = columns // MXFP4_GROUP
        start, end = expert * rows * groups, (expert + 1) * rows * groups
        blocks = self._range(f"{part.name}_blocks", start * 16, end * 16).reshape(rows, groups, 16)
        scales = self._range(f"{part.name}_scales", start, end).reshape(rows, groups)
        result = np.empty((columns, rows), np.uint16)
        for g in range(groups):  # a tile that fits into the cache, since it is read across
            tile = decode_bf16(blocks[:, g : g + 1], scales[:, g : g + 1]).view(np.uint16)
            result[g * MXFP4_GROUP : (g + 1) * MXFP4_GROUP] = tile.T
        return result.reshape(-1).view(np.uint8)

    def _fan_in(self, name: str) -> int:
        if ".o_proj." in name:
            return self._config.num_heads * self._config.head_dim
        return self._config.intermediate_size if "down_proj" in name else self._config.hidden_size

    def _pattern(self, name: str) -> tuple[np.uint16, np.uint16]:
        """Mask and offset of a BF16 tensor."""
        if name.endswith("norm.weight"):
            return np.uint16(0x000F), np.uint16(0x3F78)  # 0.97 to 1.05
        if name.endswith((".sinks", "embed_tokens.weight")):
            return _symmetric(1.0)
        if name.endswith("bias"):
            return _symmetric(0.1 if ".router." in name else 0.02)
        return _symmetric(self._fan_in(name) ** -0.5)


def _symmetric(deviation: float) -> tuple[np.uint16, np.uint16]:
    """Mask and offset of the bfloat16 pattern whose standard deviation is nearest to the one asked for.

    With b random exponent bits above 2^low the variance is 7/3 (of mantissas from 1 to 2) times 4^low times
    the mean of 4^0 ... 4^(2^b - 1). One or two bits leave none further away than 21 %.
    """
    fits = []
    for b in (1, 2):
        unit = math.sqrt(7 / 3 * sum(4.0**k for k in range(2**b)) / 2**b)
        low = round(math.log2(deviation / unit))
        fits.append((abs(math.log2(unit * 2.0**low / deviation)), b, low))
    _, b, low = min(fits)
    return np.uint16(0x807F | (2**b - 1) << 7), np.uint16(127 + low << 7)


def _low_scale(fan_in: int) -> np.uint8:
    """The lower of two neighbouring MXFP4 scales that, equally likely, give uniform codes about unit gain."""
    variance = float(np.square(FP4_VALUES).mean()) * (1.0 + 4.0) / 2
    return np.uint8(127 - round(math.log2(fan_in * variance) / 2))

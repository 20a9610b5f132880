"""The dense matrices in int8: the numbers, and the one file of the artifact that holds them.

Symmetric, 32 weights of a row with one scale: w = q s with s = max|w| / 127 rounded up to bfloat16 and q = w / s
rounded to the nearest integer, half to even. With s rounded up |q| <= 127, and a weight is off by at most s / 2.

    matrices = int8_matrices(checkpoint)
    file = plan_file(matrices, folder / INT8_DIR / INT8_FILE)   # sizes and places, nothing read or written
    write_file(matrices, file)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_export.engines.tensor_file import TensorFile, plan_tensor_file, write_tensor_file
from gptoss_export.exporter.checkpoint.read import read_rows
from gptoss_export.exporter.checkpoint.tensors import Checkpoint, TensorRef
from gptoss_export.exporter.errors import NonFiniteWeightError
from gptoss_export.exporter.ops.linear_int8 import BLOCK

INT8_DIR = "int8"
INT8_FILE = "linear.safetensors"

_CHUNK_WEIGHTS = 1 << 20
_LARGEST = 127

_INFINITY = 0x7F80
_MAGNITUDE = 0x7FFF
"""Bits of a bfloat16; without the sign, larger numbers have larger bits, infinity and NaN the largest."""


@dataclass(frozen=True)
class Matrix:
    """One matrix to be quantised: matrices [N_i, K] of the checkpoint, one above the other, and their biases [N_i].

    name: what its tensors are named by. biases: empty where there are none.
    """

    name: str
    weights: tuple[TensorRef, ...]
    biases: tuple[TensorRef, ...]

    @property
    def rows(self) -> int:
        return sum(weight.shape[0] for weight in self.weights)

    @property
    def columns(self) -> int:
        return self.weights[0].shape[1]

    @property
    def weight_name(self) -> str:
        return f"{self.name}.weight_int8"

    @property
    def scales_name(self) -> str:
        return f"{self.name}.weight_scales"

    @property
    def bias_name(self) -> str | None:
        """The bias: the checkpoint's own of a single matrix, a new tensor for stacked ones."""
        if self.stacks_biases:
            return f"{self.name}.bias"
        return self.biases[0].name if self.biases else None

    @property
    def stacks_biases(self) -> bool:
        return len(self.biases) > 1

    @property
    def replaced(self) -> tuple[str, ...]:
        """The checkpoint's tensors that are read no more."""
        return tuple(ref.name for ref in (*self.weights, *(self.biases if self.stacks_biases else ())))


def first_int8_layer(num_layers: int) -> int:
    """The layer from which on attention is in int8: what is rounded before it reaches the routers of all later layers.

    A third of the layers, rounded up; docs/adr/0011 has the figures.
    """
    return -(-num_layers // 3)


def int8_matrices(checkpoint: Checkpoint) -> tuple[Matrix, ...]:
    """q, k and v of each layer from `first_int8_layer` on as one matrix, each o, and lm_head, in the network's order.

    One whose rows are no whole number of blocks is left out and stays as stored; no released model has such.
    """
    tensors, num_layers = checkpoint.tensors, checkpoint.config.num_layers
    layers = (f"model.layers.{n}.self_attn" for n in range(first_int8_layer(num_layers), num_layers))
    names = chain.from_iterable(
        ((f"{layer}.qkv_proj", [f"{layer}.{part}_proj" for part in "qkv"]), (f"{layer}.o_proj", [f"{layer}.o_proj"]))
        for layer in layers
    )
    matrices = []
    for name, parts in chain(names, [("lm_head", ["lm_head"])]):
        weights = tuple(tensors[f"{part}.weight"] for part in parts)
        biases = tuple(tensors[f"{part}.bias"] for part in parts if f"{part}.bias" in tensors)
        if weights[0].shape[1] % BLOCK == 0:
            matrices.append(Matrix(name, weights, biases))
    return tuple(matrices)


def plan_file(matrices: tuple[Matrix, ...], path: Path) -> TensorFile:
    """What `path` will hold: weights int8 [N, K], scales bfloat16 [N, K/32], stacked biases bfloat16 [N]."""
    return plan_tensor_file(chain.from_iterable(map(_stored, matrices)), path)


def write_file(matrices: tuple[Matrix, ...], file: TensorFile) -> None:
    """Reads the matrices a few rows at a time and writes `file`, which must not exist, with its folder.

    Raises NonFiniteWeightError for an infinite or NaN weight, and what `write_tensor_file` raises.
    """
    write_tensor_file(file, chain.from_iterable(_pieces(matrix, file.tensors) for matrix in matrices))


def quantize(weight: NDArray[Any]) -> tuple[NDArray[np.int8], NDArray[Any]]:
    """bfloat16 [N, K] -> int8 [N, K] and bfloat16 scales [N, K/32]. A block of zeros gets zeros and the scale 0.

    The weights have to be finite. Every step is exact or correctly rounded in float32, and right: a bfloat16 and 127
    times one are too far apart for a float32 quotient to be rounded across a bfloat16 or a half.
    """
    bits = weight.view(np.uint16).reshape(*weight.shape[:-1], -1, BLOCK)
    largest = (bits & _MAGNITUDE).max(axis=-1)
    exact_scales = _float32(largest) / np.float32(_LARGEST)
    scales = ((exact_scales.view(np.uint32) + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)
    divisors = np.where(scales == 0, np.float32(1), _float32(scales))
    values = _float32(bits)
    values /= divisors[..., None]
    return np.rint(values, out=values).astype(np.int8).reshape(weight.shape), scales.view(weight.dtype)


def _float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _stored(matrix: Matrix) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    yield matrix.weight_name, "I8", (matrix.rows, matrix.columns)
    yield matrix.scales_name, "BF16", (matrix.rows, matrix.columns // BLOCK)
    if matrix.stacks_biases:
        yield str(matrix.bias_name), "BF16", (matrix.rows,)


def _pieces(matrix: Matrix, tensors: Mapping[str, TensorRef]) -> Iterator[tuple[int, NDArray[Any]]]:
    """What is to be written where in the file."""
    weight_at, scales_at = tensors[matrix.weight_name].offset, tensors[matrix.scales_name].offset
    step = max(1, _CHUNK_WEIGHTS // matrix.columns)
    for ref in matrix.weights:
        for start in range(0, ref.shape[0], step):
            rows = read_rows(ref, start, min(start + step, ref.shape[0]))
            _check_finite(rows, ref, start)
            weight, scales = quantize(rows)
            yield weight_at, weight
            yield scales_at, scales
            weight_at, scales_at = weight_at + weight.nbytes, scales_at + scales.nbytes
    if matrix.stacks_biases:
        bias_at = tensors[str(matrix.bias_name)].offset
        for ref in matrix.biases:
            yield bias_at, read_rows(ref, 0, ref.shape[0])
            bias_at += ref.nbytes


def _check_finite(rows: NDArray[Any], ref: TensorRef, start: int) -> None:
    bad = (rows.view(np.uint16) & _MAGNITUDE) >= _INFINITY
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        raise NonFiniteWeightError(
            f"{ref.name}: the weight in row {start + row}, column {column} is {rows[row, column]}, which has no int8",
            f"Download {ref.file.name} again, or export for ort-cpu, which keeps the weights as stored.",
        )
